//! Turns the framework's two ways of failing, panics and errors of its own, into ours.

use burn::tensor::Tensor;
use evalfw_engine::{Error, Result};
use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// Runs `work`. Most of burn's API has no other way to report a failing device than to panic.
pub fn guard<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| Err(Error::framework(message(&*panic))))
}

/// Reads a tensor back, row-major. This is where a device reports what went wrong before.
pub fn read<const D: usize>(tensor: Tensor<D>) -> Result<Vec<f32>> {
    tensor.try_into_vec_as::<f32>().map_err(Error::framework)
}

fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("burn panicked").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_an_error_of_the_kind_its_words_name() {
        let failed: Result<()> = guard(|| panic!("can't allocate buffer of size {}", 7));
        assert_eq!(failed, Err(Error::OutOfMemory { message: "can't allocate buffer of size 7".into() }));
        let failed: Result<()> = guard(|| panic!("shapes differ"));
        assert_eq!(failed, Err(Error::Framework { message: "shapes differ".into() }));
    }
}

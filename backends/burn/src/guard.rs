//! Turns the framework's two ways of failing, panics and errors of its own, into ours.

use burn::tensor::{Device, Tensor};
use evalfw_engine::{Error, Result};
use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Once, OnceLock};

/// Runs `work`. Most of burn's API has no other way to report a failing device than to panic.
pub fn guard<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    let result = catch_unwind(AssertUnwindSafe(work));
    result.unwrap_or_else(|panic| Err(Error::framework(message(&*panic)))).map_err(|error| match error {
        Error::Framework { message } => with_cause(message, DEVICE_ERROR.get()),
        other => other,
    })
}

/// What the driver said first of all when it failed.
static DEVICE_ERROR: OnceLock<String> = OnceLock::new();
/// How the panic begins in which it says so.
const DEVICE_PANIC: &str = "wgpu error";

/// From now on the words of a failing driver are kept: burn's own thread panics with them, catches that, and tells those
/// who read the results no more than that there are none.
pub fn keep_device_errors() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            let words = message(panic.payload());
            if words.starts_with(DEVICE_PANIC) {
                // Only the first is a cause.
                let _ = DEVICE_ERROR.set(words);
            }
            before(panic);
        }));
    });
}

fn with_cause(message: String, cause: Option<&String>) -> Error {
    match cause {
        Some(cause) if !message.contains(cause) => {
            let first = message.lines().next().unwrap_or_default();
            Error::framework(format_args!("{}; after it: {first}", cause.trim_end()))
        }
        _ => Error::Framework { message },
    }
}

/// Reads a tensor back, row-major. This is where a device reports what went wrong before.
pub fn read<const D: usize>(tensor: Tensor<D>) -> Result<Vec<f32>> {
    tensor.try_into_vec_as::<f32>().map_err(Error::framework)
}

/// Waits for all that was asked of a device. By reading a value back, which comes after all before it and fails where
/// the device has failed; Burn's own `sync` waits forever where the driver refuses what it submits.
pub fn wait_for(device: &Device) -> Result<()> {
    guard(|| read(Tensor::<1>::from_data([0f32], device)).map(drop))
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

    #[test]
    fn the_words_of_the_driver_come_before_what_followed_from_them() {
        let cause = "wgpu error: Out of Memory\n".to_owned();
        let with = |message: &str| with_cause(message.into(), Some(&cause));
        let message = "wgpu error: Out of Memory; after it: it failed".to_owned();
        assert_eq!(with("it failed\nno bytes"), Error::OutOfMemory { message });
        assert_eq!(with(&cause), Error::Framework { message: cause.clone() });
        assert_eq!(with_cause("it failed".into(), None), Error::Framework { message: "it failed".into() });
    }
}

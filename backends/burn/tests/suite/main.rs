//! The engine against a reference in plain Rust and f64, on flex, and on wgpu where there is an adapter.

mod device;
mod forward;
mod gradients;
mod reference;
mod support;
mod training;

/// Makes one test for each device out of a function that takes an engine. Without an adapter, the
/// test for wgpu has nothing to do and says so.
macro_rules! on_each_device {
    ($($test:ident),* $(,)?) => {
        mod flex {
            $(
                #[test]
                fn $test() {
                    super::$test(&mut *evalfw_burn::open(evalfw_burn::BurnDevice::Flex, evalfw_burn::Variant::Tuned, &evalfw_burn::Preparation::default()).unwrap());
                }
            )*
        }
        mod wgpu {
            $(
                #[test]
                fn $test() {
                    if let Some(mut engine) = crate::support::wgpu() {
                        super::$test(&mut *engine);
                    }
                }
            )*
        }
    };
}
pub(crate) use on_each_device;

//! What a GPU can do at best, with Burn's own operations.

use crate::BurnDevice;
use crate::device::OpenDevice;
use crate::guard::{guard, wait_for};
use burn::tensor::{Distribution, Tensor};
use evalfw_engine::Result;
use evalfw_engine::limits::{ELEMENTS, SIDE, bytes_per_second, flops, shortest};
use evalfw_engine::protocol::DeviceLimits;

pub fn measure(open: &OpenDevice) -> Result<DeviceLimits> {
    // What a software adapter can do says nothing, and takes minutes.
    if open.kind == BurnDevice::Flex || open.info.software {
        return Ok(DeviceLimits::default());
    }
    let device = &open.device;
    let uniform = Distribution::Uniform(-1.0, 1.0);
    guard(|| {
        let matrix = Tensor::<2>::random([SIDE, SIDE], uniform, device);
        let product = || {
            drop(matrix.clone().matmul(matrix.clone()));
            Ok(())
        };
        let seconds = shortest(product, || wait_for(device))?;
        let elements = ELEMENTS.min(open.max_buffer_bytes as usize / size_of::<f32>());
        let vector = Tensor::<1>::random([elements], uniform, device);
        let pass = || {
            drop(vector.clone().mul_scalar(2.0));
            Ok(())
        };
        let share = elements as f64 / ELEMENTS as f64;
        let pass = shortest(pass, || wait_for(device))? / share;
        Ok(DeviceLimits {
            memory_bytes_per_second: Some(bytes_per_second(pass)),
            f32_flops: Some(flops(seconds)),
            bf16_flops: None,
        })
    })
}

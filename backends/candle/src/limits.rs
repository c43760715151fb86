//! What a GPU can do at best, with candle's own operations.

use candle_core::{DType, Device, Tensor};
use evalfw_engine::limits::{ELEMENTS, SIDE, bytes_per_second, flops, shortest};
use evalfw_engine::protocol::DeviceLimits;
use evalfw_engine::{Error, Result};

pub fn measure(device: &Device) -> Result<DeviceLimits> {
    if device.is_cpu() {
        return Ok(DeviceLimits::default());
    }
    let product = |dtype: DType| {
        let matrix = Tensor::rand(-1f32, 1f32, (SIDE, SIDE), device).and_then(|m| m.to_dtype(dtype));
        let matrix = matrix.map_err(Error::framework)?;
        time(device, || matrix.matmul(&matrix)).map(flops)
    };
    let vector = Tensor::rand(-1f32, 1f32, ELEMENTS, device).map_err(Error::framework)?;
    Ok(DeviceLimits {
        memory_bytes_per_second: Some(bytes_per_second(time(device, || vector.affine(2.0, 1.0))?)),
        f32_flops: Some(product(DType::F32)?),
        // A device without the type has no such limit.
        bf16_flops: product(DType::BF16).ok(),
    })
}

fn time(device: &Device, work: impl Fn() -> candle_core::Result<Tensor>) -> Result<f64> {
    shortest(|| work().map(drop).map_err(Error::framework), || device.synchronize().map_err(Error::framework))
}

//! Devices: opening one, and what it says about itself.

use crate::CandleDevice;
use candle_core::Device;
use evalfw_engine::protocol::{DeviceInfo, DeviceKind, DeviceMemory};
use evalfw_engine::{Error, Result};
use evalfw_kernels::Products;
use evalfw_kernels::level::instructions;
use std::panic::catch_unwind;

pub fn open(kind: CandleDevice) -> Result<Device> {
    match kind {
        CandleDevice::Cpu => Ok(Device::Cpu),
        CandleDevice::Cuda => open_gpu(
            cfg!(feature = "cuda"),
            "cuda",
            gpu::open_cuda,
            "an NVIDIA GPU and its driver, of a CUDA version not older than that of the build, are needed",
        ),
        CandleDevice::Metal => open_gpu(
            cfg!(feature = "metal"),
            "metal",
            || Device::new_metal(0),
            "a Mac with a GPU that supports Metal is needed",
        ),
    }
}

fn open_gpu(
    compiled_in: bool,
    feature: &str,
    open: fn() -> candle_core::Result<Device>,
    needed: &str,
) -> Result<Device> {
    if !compiled_in {
        return Err(Error::Unavailable {
            reason: format!("candle was built without {feature}"),
            advice: format!("build with the cargo feature `{feature}`"),
        });
    }
    // Without a device, candle may panic instead of returning an error: it takes the first of an empty
    // list of Metal devices, and a driver library that is missing surfaces as a panic too.
    let reason = match catch_unwind(open) {
        Ok(Ok(device)) => return Ok(device),
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("candle found no {feature} device"),
    };
    Err(Error::Unavailable { reason, advice: needed.to_owned() })
}

/// What the speed depends on beside the device: the instructions that the kernels use, and features of the
/// build.
pub fn features(kind: CandleDevice, products: Products) -> Vec<String> {
    let instructions = (kind == CandleDevice::Cpu).then(|| instructions(products)).into_iter().flatten();
    let built = [("cuda", cfg!(feature = "cuda")), ("metal", cfg!(feature = "metal"))];
    let built = built.iter().filter(|(_, on)| *on).map(|(name, _)| *name);
    instructions.chain(built).map(str::to_owned).collect()
}

pub fn info(device: &Device) -> DeviceInfo {
    match device {
        Device::Cpu => DeviceInfo {
            kind: DeviceKind::Cpu,
            name: evalfw_engine::host::cpu_name(),
            driver: None,
            software: false,
            memory_bytes: None,
        },
        Device::Cuda(device) => DeviceInfo {
            kind: DeviceKind::DiscreteGpu,
            name: gpu::cuda_name(device).unwrap_or_else(|| "CUDA device".to_owned()),
            driver: Some("CUDA".to_owned()),
            software: false,
            memory_bytes: gpu::cuda_total(device),
        },
        Device::Metal(device) => DeviceInfo {
            kind: DeviceKind::UnifiedGpu,
            name: gpu::metal_name(device).unwrap_or_else(|| "Metal device".to_owned()),
            driver: Some("Metal".to_owned()),
            software: false,
            memory_bytes: None,
        },
    }
}

/// The allocator's figures; the CPU has no allocator of its own.
pub fn memory(device: &Device) -> DeviceMemory {
    match device {
        Device::Cpu => DeviceMemory::default(),
        Device::Cuda(device) => gpu::cuda_allocated(device),
        Device::Metal(device) => {
            DeviceMemory { reserved_bytes: gpu::metal_allocated(device), ..DeviceMemory::default() }
        }
    }
}

/// What only the real device types can tell; without their feature candle puts empty ones in their
/// place.
mod gpu {
    use candle_core::{CudaDevice, Device, MetalDevice, Result};
    use evalfw_engine::protocol::DeviceMemory;

    #[cfg(feature = "cuda")]
    pub fn open_cuda() -> Result<Device> {
        let device = Device::new_cuda(0)?;
        if let Device::Cuda(device) = &device {
            crate::cuda::keep_pool(device);
            // SAFETY: candle works on the stream of the calling thread, and a worker touches tensors on one thread
            // only: a single stream needs no events between its calls.
            unsafe { device.disable_event_tracking() };
        }
        Ok(device)
    }

    #[cfg(not(feature = "cuda"))]
    pub fn open_cuda() -> Result<Device> {
        Device::new_cuda(0)
    }

    #[cfg(feature = "cuda")]
    pub fn cuda_name(device: &CudaDevice) -> Option<String> {
        device.cuda_stream().context().name().ok()
    }

    #[cfg(feature = "cuda")]
    pub fn cuda_total(device: &CudaDevice) -> Option<u64> {
        let (_, total) = device.cuda_stream().context().mem_get_info().ok()?;
        Some(total as u64)
    }

    #[cfg(feature = "cuda")]
    pub fn cuda_allocated(device: &CudaDevice) -> DeviceMemory {
        crate::cuda::memory(device)
    }

    #[cfg(not(feature = "cuda"))]
    pub fn cuda_name(_: &CudaDevice) -> Option<String> {
        None
    }

    #[cfg(not(feature = "cuda"))]
    pub fn cuda_total(_: &CudaDevice) -> Option<u64> {
        None
    }

    #[cfg(not(feature = "cuda"))]
    pub fn cuda_allocated(_: &CudaDevice) -> DeviceMemory {
        DeviceMemory::default()
    }

    #[cfg(feature = "metal")]
    pub fn metal_name(device: &MetalDevice) -> Option<String> {
        // The chip's name says more to people than that of its architecture.
        Some(format!(
            "{} GPU ({})",
            evalfw_engine::host::cpu_name(),
            device.metal_device().architecture_name()
        ))
    }

    #[cfg(feature = "metal")]
    pub fn metal_allocated(device: &MetalDevice) -> Option<u64> {
        Some(device.metal_device().current_allocated_size() as u64)
    }

    #[cfg(not(feature = "metal"))]
    pub fn metal_name(_: &MetalDevice) -> Option<String> {
        None
    }

    #[cfg(not(feature = "metal"))]
    pub fn metal_allocated(_: &MetalDevice) -> Option<u64> {
        None
    }
}

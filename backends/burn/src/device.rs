//! Opens a device and says what it is.

use crate::BurnDevice;
use crate::adapters::{device_info, select};
use crate::guard::{guard, keep_device_errors};
use burn::tensor::Device;
use burn::tensor::wgpu::WgpuInitError;
use burn_wgpu::WgpuBackend;
use evalfw_engine::protocol::{Adapters, DeviceInfo, DeviceKind};
use evalfw_engine::{Error, Result};
use evalfw_kernels::Products;
use std::sync::Mutex;

/// A device that is ready for tensors.
#[derive(Clone)]
pub struct OpenDevice {
    pub kind: BurnDevice,
    pub device: Device,
    pub info: DeviceInfo,
    /// What there was to choose from, where it is a GPU.
    pub adapters: Option<Adapters>,
    /// The largest buffer a kernel can read, in bytes.
    pub max_buffer_bytes: u64,
    /// The type of the factors of products with frozen matrices, on the CPU.
    pub products: Products,
}

impl OpenDevice {
    pub fn open(kind: BurnDevice, products: Products) -> Result<Self> {
        match kind {
            BurnDevice::Flex => Ok(flex(products)),
            BurnDevice::Wgpu => wgpu(),
        }
    }
}

fn flex(products: Products) -> OpenDevice {
    let info = DeviceInfo {
        kind: DeviceKind::Cpu,
        name: evalfw_engine::host::cpu_name(),
        driver: None,
        software: false,
        memory_bytes: None,
    };
    OpenDevice {
        kind: BurnDevice::Flex,
        device: Device::flex(),
        info,
        adapters: None,
        max_buffer_bytes: u64::MAX,
        products,
    }
}

/// burn can set up an adapter only once in a process.
static WGPU: Mutex<Option<OpenDevice>> = Mutex::new(None);

fn wgpu() -> Result<OpenDevice> {
    let mut opened = WGPU.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    if let Some(device) = &*opened {
        return Ok(device.clone());
    }
    keep_device_errors();
    let selection = guard(select)?;
    let (device, setup) = guard(|| {
        let mut options = Device::wgpu_options().graphics_api(GRAPHICS_API);
        if let Some(selection) = &selection {
            options = options.device_kind(selection.selector.clone());
        }
        options.init_with_setup().map_err(unavailable)
    })?;
    let limits = setup.device.limits();
    let device = OpenDevice {
        kind: BurnDevice::Wgpu,
        device,
        info: device_info(&setup.adapter.get_info()),
        adapters: selection.map(|selection| selection.adapters),
        max_buffer_bytes: limits.max_storage_buffer_binding_size.min(limits.max_buffer_size),
        products: Products::F32,
    };
    Ok(opened.insert(device).clone())
}

/// Named, so that a machine without its driver is an error and not a slow way round through OpenGL.
pub const GRAPHICS_API: WgpuBackend = if cfg!(target_vendor = "apple") {
    WgpuBackend::Metal
} else if cfg!(windows) {
    WgpuBackend::Dx12
} else {
    WgpuBackend::Vulkan
};

fn unavailable(error: WgpuInitError) -> Error {
    match error {
        WgpuInitError::AdapterUnavailable { .. }
        | WgpuInitError::RequestDevice { .. }
        | WgpuInitError::UnsupportedGraphicsApi { .. } => Error::Unavailable {
            reason: format!("burn-wgpu finds no {GRAPHICS_API:?} device: {error}"),
            advice: match GRAPHICS_API {
                WgpuBackend::Vulkan => {
                    "install the GPU vendor's Vulkan driver and the Vulkan loader, or, to \
                    try it out on the CPU, a software adapter: `apt-get install mesa-vulkan-drivers`"
                        .into()
                }
                _ => "install the GPU vendor's current driver, or use burn-flex".into(),
            },
        },
        other => Error::framework(other),
    }
}

/// Flex, and wgpu where this machine has an adapter.
#[cfg(test)]
pub fn all_for_tests() -> Vec<OpenDevice> {
    let wgpu = match OpenDevice::open(BurnDevice::Wgpu, Products::F32) {
        Err(Error::Unavailable { .. }) => None,
        opened => Some(opened.unwrap()),
    };
    [flex(Products::F32)].into_iter().chain(wgpu).collect()
}

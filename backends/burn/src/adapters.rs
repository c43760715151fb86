//! The adapters of this machine, and the one that is taken: what the user chose, or else the first GPU.

use crate::device::GRAPHICS_API;
use burn::tensor::DeviceKind as Selector;
use burn_wgpu::wgpu::{self, AdapterInfo, DeviceType};
use cubecl::future::block_on;
use evalfw_engine::protocol::{Adapters, DeviceInfo, DeviceKind};
use evalfw_engine::{Error, Result};

/// Names the number of the adapter to take.
const CHOICE: &str = "EVALFW_GPU";

/// How burn is told to take an adapter, and all that there are.
pub struct Selection {
    pub selector: Selector,
    pub adapters: Adapters,
}

/// The adapter to take. `None` where there is none: burn then says what is missing.
pub fn select() -> Result<Option<Selection>> {
    let found = in_order(enumerate());
    if found.is_empty() {
        return Ok(None);
    }
    let all: Vec<DeviceInfo> = found.iter().map(device_info).collect();
    let choice = std::env::var_os(CHOICE).filter(|choice| !choice.is_empty());
    let taken = choice.map_or(Ok(0), |choice| number(&choice.to_string_lossy(), &all))?;
    let Some(selector) = selector(&found, taken) else {
        return Err(Error::Unavailable {
            reason: format!("Burn cannot take adapter {taken}, {}", all[taken].title()),
            advice: format!("of software adapters it takes the first only; set {CHOICE} to another number"),
        });
    };
    Ok(Some(Selection { selector, adapters: Adapters { taken, all } }))
}

fn enumerate() -> Vec<AdapterInfo> {
    let backends = GRAPHICS_API_OF_WGPU.into();
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor {
        backends,
        ..wgpu::InstanceDescriptor::new_without_display_handle()
    });
    block_on(instance.enumerate_adapters(backends)).iter().map(wgpu::Adapter::get_info).collect()
}

/// The same as [`GRAPHICS_API`].
const GRAPHICS_API_OF_WGPU: wgpu::Backend = match GRAPHICS_API {
    burn_wgpu::WgpuBackend::Metal => wgpu::Backend::Metal,
    burn_wgpu::WgpuBackend::Dx12 => wgpu::Backend::Dx12,
    _ => wgpu::Backend::Vulkan,
};

/// GPUs before software, and those with memory of their own first; else as the driver lists them.
fn in_order(mut found: Vec<AdapterInfo>) -> Vec<AdapterInfo> {
    found.sort_by_key(|adapter| match adapter.device_type {
        DeviceType::DiscreteGpu => 0,
        DeviceType::IntegratedGpu => 1,
        DeviceType::VirtualGpu => 2,
        DeviceType::Other => 3,
        DeviceType::Cpu => 4,
    });
    found
}

/// Burn numbers the adapters of each type by themselves.
fn selector(found: &[AdapterInfo], taken: usize) -> Option<Selector> {
    let device_type = found[taken].device_type;
    let index = found[..taken].iter().filter(|other| other.device_type == device_type).count();
    match device_type {
        DeviceType::DiscreteGpu => Some(Selector::DiscreteGpu(index)),
        DeviceType::IntegratedGpu => Some(Selector::IntegratedGpu(index)),
        DeviceType::VirtualGpu => Some(Selector::VirtualGpu(index)),
        DeviceType::Cpu => (index == 0).then_some(Selector::Cpu),
        // What it takes by itself where there is nothing better.
        DeviceType::Other => (taken == 0).then_some(Selector::DefaultDevice),
    }
}

fn number(choice: &str, all: &[DeviceInfo]) -> Result<usize> {
    let number = choice.trim().parse().ok();
    number.filter(|number| *number < all.len()).ok_or_else(|| {
        let list: Vec<String> = all
            .iter()
            .enumerate()
            .map(|(number, adapter)| format!("{number}: {}", adapter.title()))
            .collect();
        Error::Unavailable {
            reason: format!("{CHOICE} is {choice:?}, and the adapters here are {}", list.join(", ")),
            advice: format!("set {CHOICE} to one of these numbers, or leave it out for adapter 0"),
        }
    })
}

pub fn device_info(info: &AdapterInfo) -> DeviceInfo {
    let driver = format!("{:?} {} {}", info.backend, info.driver, info.driver_info);
    DeviceInfo {
        kind: match info.device_type {
            DeviceType::Cpu => DeviceKind::Cpu,
            DeviceType::IntegratedGpu => DeviceKind::UnifiedGpu,
            _ => DeviceKind::DiscreteGpu,
        },
        name: info.name.clone(),
        driver: Some(driver.trim().to_owned()),
        software: info.device_type == DeviceType::Cpu,
        // wgpu does not tell.
        memory_bytes: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adapters(types: &[DeviceType]) -> Vec<AdapterInfo> {
        let with_name = |(at, device_type): (usize, &DeviceType)| {
            let mut info = AdapterInfo::new(*device_type, wgpu::Backend::Vulkan);
            info.name = format!("adapter {at}");
            info
        };
        types.iter().enumerate().map(with_name).collect()
    }

    #[test]
    fn gpus_come_before_software_and_keep_the_order_of_the_driver() {
        use DeviceType::{Cpu, DiscreteGpu, IntegratedGpu};
        let found = in_order(adapters(&[Cpu, IntegratedGpu, DiscreteGpu, DiscreteGpu, Cpu]));
        let names: Vec<_> = found.iter().map(|adapter| &adapter.name[8..]).collect();
        assert_eq!(names, ["2", "3", "1", "0", "4"]);
        let selectors: Vec<_> = (0..5).map(|taken| selector(&found, taken)).collect();
        assert_eq!(
            selectors,
            [
                Some(Selector::DiscreteGpu(0)),
                Some(Selector::DiscreteGpu(1)),
                Some(Selector::IntegratedGpu(0)),
                Some(Selector::Cpu),
                None
            ]
        );
    }

    #[test]
    fn a_choice_that_is_no_number_of_an_adapter_lists_them() {
        let all: Vec<_> =
            adapters(&[DeviceType::DiscreteGpu, DeviceType::Cpu]).iter().map(device_info).collect();
        assert_eq!(number(" 1", &all), Ok(1));
        for choice in ["2", "-1", "llvmpipe"] {
            let error = number(choice, &all).unwrap_err().to_string();
            assert!(error.contains("0: adapter 0") && error.contains("1: adapter 1"), "{error}");
        }
    }
}

//! Opening devices.

use crate::support::{preparation, wgpu};
use evalfw_burn::{BurnDevice, Preparation, Variant, open};
use evalfw_engine::Error;
use evalfw_engine::protocol::DeviceKind;
use std::process::Command;

#[test]
fn flex_says_what_it_is() {
    let info = open(BurnDevice::Flex, Variant::Tuned, &Preparation::default()).unwrap().info();
    assert_eq!((&*info.engine, &*info.framework), ("burn-flex", "burn"));
    assert!(info.framework_version.starts_with("0.22."), "{}", info.framework_version);
    assert_eq!(info.device.kind, DeviceKind::Cpu);
    assert!(!info.device.software && !info.device.name.is_empty());
    assert!(info.threads > 0);
}

#[test]
fn wgpu_names_its_adapter_and_opens_again() {
    let Some(engine) = wgpu() else { return };
    let info = engine.info();
    assert_eq!(info.engine, "burn-wgpu");
    assert!(!info.device.name.is_empty());
    assert_eq!(info.device.software, info.device.kind == DeviceKind::Cpu, "{:?}", info.device);
    assert_eq!(open(BurnDevice::Wgpu, Variant::Tuned, &preparation()).unwrap().info(), info);
}

/// In a process of its own, whose Vulkan loader is pointed at nothing.
#[cfg(target_os = "linux")]
#[test]
fn wgpu_without_a_driver_is_unavailable() {
    const INSIDE: &str = "EVALFW_BURN_TEST_WITHOUT_DRIVER";
    if std::env::var_os(INSIDE).is_some() {
        match open(BurnDevice::Wgpu, Variant::Tuned, &preparation()).map(|_| ()) {
            Err(Error::Unavailable { reason, advice }) => {
                assert!(reason.contains("Vulkan") && advice.contains("driver"), "{reason}; {advice}");
            }
            other => panic!("{other:?}"),
        }
        return;
    }
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "device::wgpu_without_a_driver_is_unavailable"])
        .envs([
            (INSIDE, "1"),
            ("VK_DRIVER_FILES", "/nonexistent.json"),
            ("VK_ICD_FILENAMES", "/nonexistent.json"),
        ])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}

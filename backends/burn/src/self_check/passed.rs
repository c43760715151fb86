//! What a GPU has passed once, in a file of its own: the check of long sequences takes a software adapter twenty seconds. It
//! is checked again where anything of the key is another: the adapter, its driver, burn, or this build.

use evalfw_engine::protocol::DeviceInfo;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

/// The file of one adapter with one driver, and what must stand in it.
pub struct Passed {
    path: PathBuf,
    key: String,
}

impl Passed {
    /// `None` if this program cannot tell which build it is.
    pub fn of(folder: &Path, device: &DeviceInfo, lengths: &[usize]) -> Option<Self> {
        let driver = device.driver.as_deref().unwrap_or("no driver");
        let key = format!(
            "passed the self-check with {lengths:?} positions\nadapter {}\ndriver {driver}\nburn {}\nevalfw {}, {}\n",
            device.name,
            env!("BURN_VERSION"),
            env!("CARGO_PKG_VERSION"),
            build()?
        );
        Some(Self { path: folder.join(file_name(&[&device.name, driver])), key })
    }

    pub fn is_remembered(&self) -> bool {
        fs::read_to_string(&self.path).is_ok_and(|found| found == self.key)
    }

    pub fn remember(&self) -> std::io::Result<()> {
        fs::create_dir_all(self.path.parent().unwrap_or(Path::new(".")))?;
        // Whole at once, for another worker may be reading it.
        let draft = self.path.with_extension(std::process::id().to_string());
        fs::write(&draft, &self.key)?;
        fs::rename(draft, &self.path)
    }
}

/// Size and time of the program's file, which no two builds share.
fn build() -> Option<String> {
    let file = fs::metadata(std::env::current_exe().ok()?).ok()?;
    let time = file.modified().ok()?.duration_since(UNIX_EPOCH).ok()?;
    Some(format!("{} bytes of {}", file.len(), time.as_nanos()))
}

/// Different names may become one: the key in the file tells them apart.
fn file_name(parts: &[&str]) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
    let name: String = parts.join("-").chars().map(plain).take(120).collect();
    name + ".txt"
}

#[cfg(test)]
mod tests {
    use super::*;
    use evalfw_engine::protocol::DeviceKind;

    fn device(name: &str, driver: &str) -> DeviceInfo {
        DeviceInfo {
            kind: DeviceKind::DiscreteGpu,
            name: name.into(),
            driver: Some(driver.into()),
            software: false,
            memory_bytes: None,
        }
    }

    #[test]
    fn only_the_same_check_of_the_same_adapter_and_driver_is_remembered() {
        let folder = tempfile::tempdir().unwrap();
        let of = |name, driver, lengths: &[usize]| {
            Passed::of(folder.path(), &device(name, driver), lengths).unwrap()
        };
        let passed = of("GPU 1", "Vulkan 1.0", &[1024, 2048]);
        assert!(!passed.is_remembered());
        passed.remember().unwrap();
        assert!(passed.is_remembered());
        assert!(of("GPU 1", "Vulkan 1.0", &[1024, 2048]).is_remembered());
        // The second has the same file.
        for (name, driver) in [("GPU 2", "Vulkan 1.0"), ("GPU-1", "Vulkan 1.0"), ("GPU 1", "Vulkan 1.1")] {
            assert!(!of(name, driver, &[1024, 2048]).is_remembered(), "{name} {driver}");
        }
        assert!(!of("GPU 1", "Vulkan 1.0", &[1024, 2048, 4096]).is_remembered());
    }

    #[test]
    fn a_file_that_was_cut_off_is_no_verdict() {
        let folder = tempfile::tempdir().unwrap();
        let passed = Passed::of(folder.path(), &device("GPU", "Vulkan"), &[1024]).unwrap();
        passed.remember().unwrap();
        let file = fs::read_dir(folder.path()).unwrap().next().unwrap().unwrap().path();
        fs::write(&file, &passed.key[..passed.key.len() - 3]).unwrap();
        assert!(!passed.is_remembered());
    }
}

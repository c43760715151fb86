//! What a GPU has passed once, in a file of its own: the check of long sequences takes a software adapter twenty seconds. It
//! is checked again where anything of the key is another: the adapter, its driver, burn, or this build.

use crate::adapter_file::{path_part, write_whole};
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
        Some(Self { path: folder.join(path_part(&format!("{} {driver}", device.name)) + ".txt"), key })
    }

    pub fn is_remembered(&self) -> bool {
        fs::read_to_string(&self.path).is_ok_and(|found| found == self.key)
    }

    pub fn remember(&self) -> std::io::Result<()> {
        write_whole(&self.path, self.key.as_bytes())
    }
}

/// Size and time of the program's file, which no two builds share.
fn build() -> Option<String> {
    let file = fs::metadata(std::env::current_exe().ok()?).ok()?;
    let time = file.modified().ok()?.duration_since(UNIX_EPOCH).ok()?;
    Some(format!("{} bytes of {}", file.len(), time.as_nanos()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter_file::gpu;

    #[test]
    fn only_the_same_check_of_the_same_adapter_and_driver_is_remembered() {
        let folder = tempfile::tempdir().unwrap();
        let of =
            |name, driver, lengths: &[usize]| Passed::of(folder.path(), &gpu(name, driver), lengths).unwrap();
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
        let passed = Passed::of(folder.path(), &gpu("GPU", "Vulkan"), &[1024]).unwrap();
        passed.remember().unwrap();
        let file = fs::read_dir(folder.path()).unwrap().next().unwrap().unwrap().path();
        fs::write(&file, &passed.key[..passed.key.len() - 3]).unwrap();
        assert!(!passed.is_remembered());
    }
}

//! What was found on an adapter, in a file of its own below the cache folder:
//! `autotune/burn-VERSION/ADAPTER/DRIVER.json`.

use super::candidate::Candidate;
use super::problem::Problem;
use crate::adapter_file::{path_part, write_whole};
use evalfw_engine::protocol::DeviceInfo;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

pub struct Store {
    path: PathBuf,
    /// With no choices.
    head: Content,
}

/// Names that differ in punctuation only have one path, and another list of kernels may have another winner: both
/// stand in the file, and a file that is about something else is as good as none.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Content {
    burn: String,
    adapter: String,
    driver: String,
    kernels: Vec<Candidate>,
    choices: Vec<Entry>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Entry {
    product: Problem,
    kernel: Candidate,
}

impl Store {
    pub fn of(cache: &Path, device: &DeviceInfo) -> Self {
        let driver = device.driver.clone().unwrap_or_default();
        let version = env!("BURN_VERSION");
        let folder = cache.join("autotune").join(format!("burn-{version}")).join(path_part(&device.name));
        Self {
            path: folder.join(format!("{}.json", path_part(&driver))),
            head: Content {
                burn: version.to_owned(),
                adapter: device.name.clone(),
                driver,
                kernels: Candidate::ALL.to_vec(),
                choices: Vec::new(),
            },
        }
    }

    /// Nothing where there is no file, or none that fits: it can be made again.
    pub fn read(&self) -> BTreeMap<Problem, Candidate> {
        let content = std::fs::read(&self.path).ok();
        let content: Option<Content> = content.and_then(|bytes| serde_json::from_slice(&bytes).ok());
        let choices = content.filter(|content| self.is_about_this(content)).map(|content| content.choices);
        choices.into_iter().flatten().map(|entry| (entry.product, entry.kernel)).collect()
    }

    fn is_about_this(&self, content: &Content) -> bool {
        Content { choices: Vec::new(), ..content.clone() } == self.head
    }

    /// Adds to what is there, which another process may have found meanwhile.
    pub fn write(&self, found: BTreeMap<Problem, Candidate>) -> std::io::Result<()> {
        let mut all = self.read();
        all.extend(found);
        let choices = all.into_iter().map(|(product, kernel)| Entry { product, kernel }).collect();
        let content = Content { choices, ..self.head.clone() };
        write_whole(&self.path, &serde_json::to_vec_pretty(&content)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter_file::gpu;
    use crate::tune::problem::Layout;

    fn found(rows: usize, kernel: Candidate) -> BTreeMap<Problem, Candidate> {
        let (lhs, rhs) = (Layout::Rows, Layout::Columns);
        BTreeMap::from([(Problem { batch: 1, rows, inner: 64, columns: 32, lhs, rhs }, kernel)])
    }

    #[test]
    fn adapters_and_drivers_do_not_share_what_was_found() {
        let cache = tempfile::tempdir().unwrap();
        let store = |name: &str, driver: &str| Store::of(cache.path(), &gpu(name, driver));
        store("NVIDIA H100", "Vulkan 1").write(found(8, Candidate::Gemm)).unwrap();
        assert_eq!(store("NVIDIA H100", "Vulkan 1").read(), found(8, Candidate::Gemm));
        // The last two have the same path.
        for (name, driver) in
            [("NVIDIA L4", "Vulkan 1"), ("NVIDIA H100", "Vulkan 2"), ("NVIDIA-H100", "Vulkan 1")]
        {
            assert_eq!(store(name, driver).read(), BTreeMap::new(), "{name} {driver}");
        }
    }

    #[test]
    fn what_was_found_adds_up_and_a_broken_file_is_made_anew() {
        let cache = tempfile::tempdir().unwrap();
        let store = || Store::of(cache.path(), &gpu("../../GPU (1)", ""));
        assert!(store().path.starts_with(cache.path().join("autotune")), "{:?}", store().path);
        store().write(found(8, Candidate::Gemm)).unwrap();
        store().write(found(16, Candidate::Naive)).unwrap();
        assert_eq!(store().read().len(), 2);
        std::fs::write(&store().path, "{").unwrap();
        assert_eq!(store().read(), BTreeMap::new());
        store().write(found(8, Candidate::Gemm)).unwrap();
        assert_eq!(store().read(), found(8, Candidate::Gemm));
    }
}

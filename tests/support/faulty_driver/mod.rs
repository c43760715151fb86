//! A Vulkan driver that fails when it is told to, in front of Mesa's software one.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use tempfile::TempDir;

/// Where the Vulkan loader looks for the manifests of drivers.
const MANIFESTS: [&str; 3] =
    ["/etc/vulkan/icd.d", "/usr/local/share/vulkan/icd.d", "/usr/share/vulkan/icd.d"];

pub struct FaultyDriver {
    folder: TempDir,
    /// Manifest and library of the software driver.
    real: (PathBuf, PathBuf),
}

impl FaultyDriver {
    /// Builds it. `None`, with the reason on standard error, where there is no software driver.
    pub fn build() -> Option<Self> {
        let Some(real) = software_driver() else {
            eprintln!("not run: Mesa's software Vulkan driver is not installed");
            return None;
        };
        let folder = tempfile::tempdir().unwrap();
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/faulty_driver/driver.c");
        let library = folder.path().join("libfaulty.so");
        let built = Command::new("cc")
            .args(["-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o"])
            .args([&library, &source])
            .arg("-ldl")
            .status();
        assert!(built.unwrap().success());
        let manifest = serde_json::json!({
            "file_format_version": "1.0.0",
            "ICD": { "library_path": library, "api_version": "1.3.0" },
        });
        std::fs::write(folder.path().join("faulty.json"), manifest.to_string()).unwrap();
        Some(Self { folder, real })
    }

    pub fn manifest(&self) -> PathBuf {
        self.folder.path().join("faulty.json")
    }

    pub fn real_manifest(&self) -> &Path {
        &self.real.0
    }

    /// The environment of a process that has the drivers of these manifests, in this order. The cache is one for all
    /// tests: the self-check takes its time once.
    pub fn environment(&self, manifests: &[&Path]) -> Vec<(OsString, OsString)> {
        let drivers = std::env::join_paths(manifests).unwrap();
        vec![
            ("VK_DRIVER_FILES".into(), drivers.clone()),
            ("VK_ICD_FILENAMES".into(), drivers),
            ("EVALFW_CACHE".into(), env!("CARGO_TARGET_TMPDIR").into()),
            ("FAULTY_DRIVER_REAL".into(), self.real.1.clone().into()),
            ("FAULTY_DRIVER_TRIGGER".into(), self.trigger_file().into()),
        ]
    }

    /// One process fails in this way after so many submissions.
    pub fn trigger(&self, mode: &str, submissions: usize) {
        // Whole at once, for the driver may look for it at any time.
        let draft = self.folder.path().join("draft");
        std::fs::write(&draft, format!("{mode} {submissions}")).unwrap();
        std::fs::rename(draft, self.trigger_file()).unwrap();
    }

    /// Whether a process has taken the trigger.
    pub fn has_failed(&self) -> bool {
        !self.trigger_file().exists()
    }

    fn trigger_file(&self) -> PathBuf {
        self.folder.path().join("trigger")
    }
}

fn software_driver() -> Option<(PathBuf, PathBuf)> {
    let entries = MANIFESTS.iter().filter_map(|folder| std::fs::read_dir(folder).ok()).flatten().flatten();
    let mut files = entries.map(|entry| entry.path());
    let manifest = files.find(|path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with("lvp_icd") && name.ends_with(".json")
    })?;
    let text = std::fs::read_to_string(&manifest).unwrap();
    let content: serde_json::Value = serde_json::from_str(&text).unwrap();
    let library = PathBuf::from(content["ICD"]["library_path"].as_str().unwrap());
    // A path with a folder is relative to the manifest, a bare name is the dynamic linker's to find.
    let beside = library.components().count() > 1;
    let library = if beside { manifest.parent().unwrap().join(library) } else { library };
    Some((manifest, library))
}

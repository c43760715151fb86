//! `manifest.json` of a reference: what made the golden files, and their digests. Checked before anything
//! is held against them: an altered or missing file, or one that nobody vouches for, would let a wrong
//! engine pass.

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// The versions that the tolerances were found with.
const REQUIREMENTS: &str = include_str!("../../tests/reference/requirements.txt");

#[derive(Deserialize)]
pub struct Manifest {
    /// Python package → version.
    packages: BTreeMap<String, String>,
    /// Script → digest.
    sources: BTreeMap<String, String>,
    /// File below `golden/` → digest.
    golden: BTreeMap<String, String>,
}

impl Manifest {
    /// Parses the manifest and checks it against the folder that it is about.
    pub fn checked(text: &str, golden: &Path) -> Result<Self> {
        let manifest: Self = serde_json::from_str(text).context("manifest.json")?;
        manifest.check_packages().context("manifest.json")?;
        if manifest.sources.is_empty() {
            bail!("manifest.json: sources is empty: nothing says what made the golden files");
        }
        manifest.check_golden(golden)?;
        Ok(manifest)
    }

    /// The folders below `golden/` that hold a model.
    pub fn models(&self) -> BTreeSet<&str> {
        self.golden.keys().filter_map(|file| file.split_once("/model/")).map(|(name, _)| name).collect()
    }

    fn check_packages(&self) -> Result<()> {
        let pinned: BTreeMap<&str, &str> =
            REQUIREMENTS.lines().filter_map(|line| line.trim().split_once("==")).collect();
        for (name, version) in &pinned {
            match self.packages.get(*name) {
                Some(found) if found == version => {}
                Some(found) => {
                    bail!("the reference was made by {name} {found}, but requirements.txt asks for {version}")
                }
                None => bail!("packages has no {name}, but requirements.txt asks for {version}"),
            }
        }
        match self.packages.iter().find(|(name, _)| !pinned.contains_key(name.as_str())) {
            Some((name, found)) => {
                bail!("the reference was made with {name} {found}, which requirements.txt does not ask for")
            }
            None => Ok(()),
        }
    }

    fn check_golden(&self, golden: &Path) -> Result<()> {
        for (file, expected) in &self.golden {
            let path = golden.join(file);
            let bytes = std::fs::read(&path)
                .with_context(|| format!("{}: golden file is missing", path.display()))?;
            let found: String = Sha256::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect();
            if &found != expected {
                let path = path.display();
                bail!("{path}: golden file was altered: sha256 {found}, manifest.json has {expected}");
            }
        }
        self.check_all_listed(golden, "")
    }

    /// `below` is the path of `folder` from `golden/`, with a slash at its end.
    fn check_all_listed(&self, folder: &Path, below: &str) -> Result<()> {
        let unreadable = || folder.display().to_string();
        for entry in std::fs::read_dir(folder).with_context(unreadable)? {
            let path = entry.with_context(unreadable)?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let file = format!("{below}{name}");
            if path.is_dir() {
                self.check_all_listed(&path, &(file + "/"))?;
            } else if !self.golden.contains_key(&file) {
                bail!("{}: golden file is not listed in manifest.json", path.display());
            }
        }
        Ok(())
    }
}

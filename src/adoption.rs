//! What it took to adopt a framework, measured once by `benches/adoption/measure` and kept in `reports/adoption.toml`.

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

const BUILT_IN: &str = include_str!("../reports/adoption.toml");

/// Of the build of a framework's engines from nothing, and of the code and the texts they stand on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Adoption {
    pub framework: String,
    pub framework_version: String,
    /// The engines that such a build has.
    pub engines: Vec<String>,
    /// From a fresh machine with the language's own tools to a first result.
    pub commands: Vec<String>,
    /// Third-party packages that are compiled or installed.
    pub packages: usize,
    pub downloaded_bytes: u64,
    /// Processor time of a clean build or install, over all cores.
    pub build_cpu_seconds: f64,
    /// What the build leaves on disk.
    pub built_bytes: u64,
    /// Lines of code of the engine on top of the framework, without blank lines, comments and tests.
    pub glue_lines: usize,
    /// Public items of the framework's packages that the engine names.
    pub public_items: usize,
    /// Those of them that have a text.
    pub documented_items: usize,
    pub measured_at: String,
    pub machine: String,
    pub measured_by: String,
}

impl Adoption {
    /// That of an engine; `None` where it was not measured.
    pub fn of_engine(engine: &str) -> Result<Option<Self>> {
        let all: BTreeMap<String, Self> =
            toml::from_str(BUILT_IN).context("reports/adoption.toml (built in)")?;
        Ok(all.into_values().find(|facts| facts.engines.iter().any(|name| name == engine)))
    }

    pub fn documented_share(&self) -> Option<f64> {
        (self.public_items > 0).then(|| self.documented_items as f64 / self.public_items as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engines::Registry;

    #[test]
    fn the_built_in_file_is_sound_and_names_engines_that_are() {
        let registry = Registry::with(None).unwrap();
        let all: BTreeMap<String, Adoption> = toml::from_str(BUILT_IN).unwrap();
        for facts in all.values() {
            assert!(facts.documented_items <= facts.public_items && !facts.commands.is_empty(), "{facts:?}");
            for name in &facts.engines {
                assert!(registry.find(name).is_ok(), "{name}");
            }
        }
        assert_eq!(Adoption::of_engine("no-such-engine").unwrap(), None);
    }
}

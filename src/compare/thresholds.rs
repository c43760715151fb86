//! When a difference counts, read from TOML.

use super::figure::Metric;
use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;

const BUILT_IN_NAME: &str = "reports/thresholds.toml (built in)";
const BUILT_IN: &str = include_str!("../../reports/thresholds.toml");

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Thresholds {
    /// On each side.
    pub min_processes: usize,
    /// Of the bootstrap interval, e.g. 0.95.
    pub confidence: f64,
    percent: BTreeMap<Metric, f64>,
}

impl Thresholds {
    pub fn built_in() -> Result<Self> {
        Self::parse(BUILT_IN).context(BUILT_IN_NAME)
    }

    pub fn read(path: &Path) -> Result<Self> {
        let name = || path.display().to_string();
        Self::parse(&std::fs::read_to_string(path).with_context(name)?).with_context(name)
    }

    fn parse(text: &str) -> Result<Self> {
        let thresholds: Self = toml::from_str(text)?;
        if thresholds.min_processes < 2 {
            bail!(
                "min_processes is {} (at least 2: one process tells nothing of the noise between them)",
                thresholds.min_processes
            );
        }
        if !(0.5..1.0).contains(&thresholds.confidence) {
            bail!("confidence is {} (it is at least 0.5 and below 1)", thresholds.confidence);
        }
        for metric in Metric::ALL {
            match thresholds.percent.get(&metric) {
                None => bail!("percent.{} is missing", metric.name()),
                Some(percent) if percent.is_finite() && *percent >= 0.0 => {}
                Some(percent) => bail!("percent.{} is {percent} (0 or more)", metric.name()),
            }
        }
        Ok(thresholds)
    }

    /// As a fraction.
    pub fn of(&self, metric: Metric) -> f64 {
        self.percent.get(&metric).map_or(0.0, |percent| percent / 100.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_built_in_file_is_sound_and_a_bad_one_names_its_field() {
        assert_eq!(Thresholds::built_in().unwrap().of(Metric::PeakMemoryBytes), 0.02);
        for (from, to, field) in [
            ("min_processes = 3", "min_processes = 1", "min_processes"),
            ("confidence = 0.95", "confidence = 95", "confidence"),
            ("load_seconds = 10.0", "load_seconds = -1.0", "percent.load_seconds"),
            ("load_seconds = 10.0", "", "percent.load_seconds is missing"),
            ("load_seconds", "loud_seconds", "loud_seconds"),
        ] {
            let error = Thresholds::parse(&BUILT_IN.replace(from, to)).unwrap_err();
            assert!(format!("{error:#}").contains(field), "{error:#}");
        }
    }
}

//! When a difference counts, read from TOML.

use super::figure::Metric;
use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;

const BUILT_IN_NAME: &str = "reports/thresholds.toml (built in)";
const BUILT_IN: &str = include_str!("../../reports/thresholds.toml");

/// What a file leaves out is as in the built-in one.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    min_processes: Option<usize>,
    confidence: Option<f64>,
    #[serde(default)]
    percent: BTreeMap<Metric, f64>,
}

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
        let File { min_processes, confidence, percent } = toml::from_str(text)?;
        let mut thresholds: Self = toml::from_str(BUILT_IN).context(BUILT_IN_NAME)?;
        thresholds.min_processes = min_processes.unwrap_or(thresholds.min_processes);
        thresholds.confidence = confidence.unwrap_or(thresholds.confidence);
        thresholds.percent.extend(percent);
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
    fn what_a_file_leaves_out_is_as_built_in() {
        let thresholds = Thresholds::parse("percent.load_seconds = 1.5").unwrap();
        assert_eq!(thresholds.of(Metric::LoadSeconds), 0.015);
        assert_eq!(thresholds.of(Metric::PeakMemoryBytes), 0.02);
        assert_eq!(thresholds.min_processes, Thresholds::built_in().unwrap().min_processes);
    }

    #[test]
    fn the_built_in_file_is_sound_and_a_bad_one_names_its_field() {
        assert_eq!(Thresholds::built_in().unwrap().of(Metric::PeakMemoryBytes), 0.02);
        for (from, to, field) in [
            ("min_processes = 3", "min_processes = 1", "min_processes"),
            ("confidence = 0.95", "confidence = 95", "confidence"),
            ("load_seconds = 10.0", "load_seconds = -1.0", "percent.load_seconds"),
            ("load_seconds", "loud_seconds", "loud_seconds"),
        ] {
            let error = Thresholds::parse(&BUILT_IN.replace(from, to)).unwrap_err();
            assert!(format!("{error:#}").contains(field), "{error:#}");
        }
    }
}

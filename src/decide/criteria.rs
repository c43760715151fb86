//! The criteria of the decision, read from TOML.

use super::value::{Anchor, ValueFunction};
use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// How the built-in file is called in messages.
const BUILT_IN_NAME: &str = "reports/criteria.toml (built in)";
const BUILT_IN: &str = include_str!("../../reports/criteria.toml");

/// What a cell can show an engine to do. `run` puts these names in [`crate::record::Probe`].
pub const PROBES: &[&str] = &[
    "load_nf4",
    "train_nf4",
    "lora_all_projections",
    "lora_dropout",
    "gradient_checkpointing",
    "double_quantization",
    "save_peft_adapter",
    "load_checkpoint",
    "tied_head",
    "untied_head",
    "sharded_checkpoint",
    "kv_cache_generation",
];

/// A measured quantity that a criterion can be built from, on the reference job of its kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Metric {
    /// Largest memory of a QLoRA training job from start to end, in GB (10^9 bytes).
    PeakTrainingMemoryGb,
    /// As above, of an inference job.
    PeakInferenceMemoryGb,
}

impl Metric {
    const ALL: &[(&str, Metric)] = &[
        ("peak_training_memory_gb", Metric::PeakTrainingMemoryGb),
        ("peak_inference_memory_gb", Metric::PeakInferenceMemoryGb),
    ];

    /// The scenarios that measure it.
    pub fn scenario_kind(self) -> &'static str {
        match self {
            Self::PeakTrainingMemoryGb => "train",
            Self::PeakInferenceMemoryGb => "infer",
        }
    }
}

/// One item of a checklist.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Check {
    /// One of [`PROBES`].
    pub probe: String,
    pub title: String,
}

/// What a criterion's score is made of.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Source {
    Metric { metric: Metric, anchors: ValueFunction },
    Checklist { checks: Vec<Check> },
    NotMeasured { reason: String },
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Criterion {
    pub id: String,
    pub title: String,
    pub question: String,
    /// Percent.
    pub weight: f64,
    pub source: Source,
}

/// Criteria whose weights add up to 100.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Criteria {
    /// GB are 10^9 bytes.
    pub memory_target_gb: f64,
    pub criteria: Vec<Criterion>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CriteriaFile {
    memory_target_gb: f64,
    criteria: Vec<CriterionEntry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CriterionEntry {
    id: String,
    title: String,
    question: String,
    weight: f64,
    metric: Option<String>,
    anchors: Option<Vec<Anchor>>,
    checks: Option<Vec<Check>>,
    not_measured: Option<String>,
}

impl Criteria {
    pub fn built_in() -> Result<Self> {
        Self::parse(BUILT_IN).context(BUILT_IN_NAME)
    }

    pub fn read(path: &Path) -> Result<Self> {
        let name = || path.display().to_string();
        let text = std::fs::read_to_string(path).with_context(name)?;
        Self::parse(&text).with_context(name)
    }

    fn parse(text: &str) -> Result<Self> {
        let file: CriteriaFile = toml::from_str(text)?;
        if !(file.memory_target_gb.is_finite() && file.memory_target_gb > 0.0) {
            bail!("memory_target_gb must be above 0");
        }
        let mut criteria: Vec<Criterion> = Vec::new();
        for (index, entry) in file.criteria.into_iter().enumerate() {
            let place = format!("criteria[{index}] ({})", entry.id);
            if criteria.iter().any(|c| c.id == entry.id) {
                bail!("{place}: id is used twice");
            }
            criteria.push(Criterion::from_entry(entry).context(place)?);
        }
        let sum: f64 = criteria.iter().map(|c| c.weight).sum();
        if (sum - 100.0).abs() > 1e-9 {
            bail!("criteria: weight: the weights add up to {sum}, not to 100");
        }
        Ok(Self { memory_target_gb: file.memory_target_gb, criteria })
    }

    pub fn memory_target_bytes(&self) -> u64 {
        (self.memory_target_gb * 1e9) as u64
    }
}

impl Criterion {
    fn from_entry(entry: CriterionEntry) -> Result<Self> {
        if !(entry.weight.is_finite() && entry.weight > 0.0) {
            bail!("weight must be above 0");
        }
        let source = match (entry.metric, entry.anchors, entry.checks, entry.not_measured) {
            (Some(metric), Some(anchors), None, None) => {
                Source::Metric { metric: metric_named(&metric)?, anchors: value_function(anchors)? }
            }
            (Some(_), None, None, None) => bail!("anchors: a metric needs a value function"),
            (None, Some(_), None, None) => bail!("metric: anchors need a quantity"),
            (None, None, Some(checks), None) => Source::Checklist { checks: checklist(checks)? },
            (None, None, None, Some(reason)) if !reason.trim().is_empty() => Source::NotMeasured { reason },
            _ => bail!("needs exactly one of metric with anchors, checks, and not_measured with a reason"),
        };
        Ok(Self { id: entry.id, title: entry.title, question: entry.question, weight: entry.weight, source })
    }
}

fn metric_named(name: &str) -> Result<Metric> {
    let found = Metric::ALL.iter().find(|(known, _)| *known == name);
    let known = || Metric::ALL.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(", ");
    Ok(found.with_context(|| format!("metric: unknown metric {name}; there are {}", known()))?.1)
}

fn value_function(anchors: Vec<Anchor>) -> Result<ValueFunction> {
    ValueFunction::new(anchors).map_err(anyhow::Error::msg)
}

fn checklist(checks: Vec<Check>) -> Result<Vec<Check>> {
    if checks.is_empty() {
        bail!("checks: the list is empty");
    }
    for (index, check) in checks.iter().enumerate() {
        let probe = &check.probe;
        if !PROBES.contains(&probe.as_str()) {
            bail!("checks[{index}]: probe: unknown probe {probe}; there are {}", PROBES.join(", "));
        }
        if checks[..index].iter().any(|earlier| earlier.probe == *probe) {
            bail!("checks[{index}]: probe: {probe} is listed twice");
        }
    }
    Ok(checks)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The message that the built-in file gives with one text replaced.
    fn error(from: &str, to: &str) -> String {
        assert!(BUILT_IN.contains(from), "the file no longer holds {from:?}");
        format!("{:#}", Criteria::parse(&BUILT_IN.replacen(from, to, 1)).unwrap_err())
    }

    #[test]
    fn the_built_in_criteria_have_the_stated_weights() {
        let criteria = Criteria::built_in().unwrap();
        let weights: Vec<(&str, f64)> = criteria.criteria.iter().map(|c| (c.id.as_str(), c.weight)).collect();
        let expected = [
            ("hardware_optimisation", 25.0),
            ("memory_efficiency", 25.0),
            ("ease_of_use", 20.0),
            ("qlora_support", 20.0),
            ("model_compatibility", 10.0),
        ];
        assert_eq!(weights, expected);
        assert_eq!(criteria.memory_target_bytes(), 16_000_000_000);
    }

    #[test]
    fn weights_that_do_not_add_up_say_what_they_add_up_to() {
        assert!(error("weight = 25", "weight = 30").contains("105, not to 100"));
        assert!(error("weight = 25", "weight = -25").contains("criteria[0] (hardware_optimisation): weight"));
    }

    #[test]
    fn unknown_names_are_errors_with_their_field() {
        assert!(error("weight = 25", "wieght = 25").contains("wieght"));
        let message = error("peak_training_memory_gb", "peak_memory");
        assert!(message.contains("criteria[1] (memory_efficiency)"), "{message}");
        assert!(message.contains("unknown metric peak_memory"), "{message}");
        let message = error("\"lora_dropout\"", "\"dropout\"");
        assert!(message.contains("(qlora_support): checks[3]: probe: unknown probe dropout"), "{message}");
    }

    #[test]
    fn a_criterion_needs_exactly_one_source() {
        assert!(error("not_measured = ", "question2 = ").contains("question2"));
        assert!(error("metric = \"peak_training_memory_gb\"\n", "").contains("metric"));
        let both = error("metric = ", "not_measured = \"no\"\nmetric = ");
        assert!(both.contains("(memory_efficiency): needs exactly one of"), "{both}");
        assert!(error("\"tied_head\"", "\"untied_head\"").contains("listed twice"));
        assert!(error("\"ease_of_use\"", "\"memory_efficiency\"").contains("used twice"));
    }

    #[test]
    fn a_file_that_is_not_there_is_named() {
        let message = format!("{:#}", Criteria::read(Path::new("no/criteria.toml")).unwrap_err());
        assert!(message.contains("no/criteria.toml"), "{message}");
    }
}

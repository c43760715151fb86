//! The criteria of the decision, read from TOML.

use super::metric::Metric;
use super::value::{Anchor, BEST, ValueFunction};
use anyhow::{Context, Result, bail};
use evalfw_engine::protocol::DeviceKind;
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
    "load_peft_adapter",
    "save_peft_adapter",
    "load_checkpoint",
    "tied_head",
    "untied_head",
    "sharded_checkpoint",
    "tokenizer",
    "kv_cache_generation",
    "full_context",
];

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
    Metrics { parts: Vec<Part> },
    Checklist { checks: Vec<Check> },
    Judgement { judgements: Vec<Judgement> },
    NotMeasured { reason: String },
}

/// One measured quantity of a criterion.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Part {
    pub metric: Metric,
    pub title: &'static str,
    /// Percent of the criterion.
    pub weight: f64,
    pub anchors: ValueFunction,
}

/// A score that somebody gave, and is marked as such wherever it is shown.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Judgement {
    pub engine: String,
    pub score: f64,
    pub author: String,
    /// As in 2026-01-31.
    pub date: String,
    pub reason: String,
}

/// When a winner is called.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// In how large a share of the draws it has to be first, from 0.5 to 1.
    pub acceptability: f64,
    pub draws: usize,
    pub seed: u64,
    /// The weights that are drawn are up to so many times as large or as small as the stated ones, before they are
    /// scaled to 100 % again.
    pub weight_factor: f64,
}

impl Default for Rule {
    fn default() -> Self {
        Self { acceptability: 0.9, draws: 10_000, seed: 0, weight_factor: 2.0 }
    }
}

/// Hardware that the decision is for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Target {
    pub title: String,
    /// What the operating system's name holds there, e.g. `macOS`.
    pub system: Option<String>,
    pub device: DeviceKind,
    /// What somebody who has only read about it would take there.
    pub preferred: String,
    /// All that can run there, by name.
    pub engines: Vec<String>,
    /// What measures them there.
    pub command: String,
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
    pub decision: Rule,
    pub targets: Vec<Target>,
    pub criteria: Vec<Criterion>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CriteriaFile {
    memory_target_gb: f64,
    #[serde(default)]
    decision: Rule,
    #[serde(default)]
    targets: Vec<Target>,
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
    parts: Option<Vec<PartEntry>>,
    checks: Option<Vec<Check>>,
    judgements: Option<Vec<Judgement>>,
    not_measured: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PartEntry {
    metric: String,
    weight: f64,
    anchors: Vec<Anchor>,
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
        check_sum(criteria.iter().map(|c| c.weight)).context("criteria")?;
        file.decision.check().context("decision")?;
        Ok(Self {
            memory_target_gb: file.memory_target_gb,
            decision: file.decision,
            targets: file.targets,
            criteria,
        })
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
        let given = [
            entry.metric.is_some() || entry.anchors.is_some(),
            entry.parts.is_some(),
            entry.checks.is_some(),
            entry.judgements.is_some(),
            entry.not_measured.is_some(),
        ];
        if given.iter().filter(|given| **given).count() != 1 {
            bail!("needs exactly one of metric with anchors, parts, checks, judgements, and not_measured");
        }
        let source = if let Some(parts) = entry.parts {
            Source::Metrics { parts: parts_of(parts)? }
        } else if let Some(checks) = entry.checks {
            Source::Checklist { checks: checklist(checks)? }
        } else if let Some(judgements) = entry.judgements {
            Source::Judgement { judgements: checked(judgements)? }
        } else if let Some(reason) = entry.not_measured {
            if reason.trim().is_empty() {
                bail!("not_measured: the reason is empty");
            }
            Source::NotMeasured { reason }
        } else {
            let metric = entry.metric.context("metric: anchors need a quantity")?;
            let anchors = entry.anchors.context("anchors: a metric needs a value function")?;
            Source::Metrics { parts: parts_of(vec![PartEntry { metric, weight: 100.0, anchors }])? }
        };
        Ok(Self { id: entry.id, title: entry.title, question: entry.question, weight: entry.weight, source })
    }
}

impl Rule {
    /// No more draws than take seconds.
    const MOST_DRAWS: usize = 1_000_000;

    fn check(&self) -> Result<()> {
        if !(0.5..=1.0).contains(&self.acceptability) {
            bail!("acceptability is {}: from 0.5 to 1", self.acceptability);
        }
        if !(100..=Self::MOST_DRAWS).contains(&self.draws) {
            bail!("draws is {}: from 100 to {}", self.draws, Self::MOST_DRAWS);
        }
        if !(1.0..=100.0).contains(&self.weight_factor) {
            bail!("weight_factor is {}: from 1 to 100", self.weight_factor);
        }
        Ok(())
    }
}

fn check_sum(weights: impl Iterator<Item = f64>) -> Result<()> {
    let sum: f64 = weights.sum();
    if (sum - 100.0).abs() > 1e-9 {
        bail!("weight: the weights add up to {sum}, not to 100");
    }
    Ok(())
}

fn parts_of(entries: Vec<PartEntry>) -> Result<Vec<Part>> {
    let mut parts: Vec<Part> = Vec::new();
    for (index, entry) in entries.into_iter().enumerate() {
        let place = || format!("parts[{index}]");
        let metric = Metric::named(&entry.metric).with_context(place)?;
        if !(entry.weight.is_finite() && entry.weight > 0.0) {
            bail!("parts[{index}]: weight must be above 0");
        }
        if parts.iter().any(|part| part.metric == metric) {
            bail!("parts[{index}]: metric: {} is there twice", entry.metric);
        }
        let anchors = ValueFunction::new(entry.anchors).map_err(anyhow::Error::msg).with_context(place)?;
        parts.push(Part { metric, title: metric.title(), weight: entry.weight, anchors });
    }
    check_sum(parts.iter().map(|part| part.weight)).context("parts")?;
    Ok(parts)
}

fn checked(judgements: Vec<Judgement>) -> Result<Vec<Judgement>> {
    for (index, judgement) in judgements.iter().enumerate() {
        if !(0.0..=BEST).contains(&judgement.score) {
            bail!("judgements[{index}]: score is {}: from 0 to 10", judgement.score);
        }
        let texts = [("author", &judgement.author), ("date", &judgement.date), ("reason", &judgement.reason)];
        if let Some((name, _)) = texts.iter().find(|(_, text)| text.trim().is_empty()) {
            bail!("judgements[{index}]: {name} is empty");
        }
        if judgement.date.parse::<jiff::civil::Date>().is_err() {
            bail!("judgements[{index}]: date is {:?}: as in 2026-01-31", judgement.date);
        }
        if judgements[..index].iter().any(|earlier| earlier.engine == judgement.engine) {
            bail!("judgements[{index}]: engine: {} is judged twice", judgement.engine);
        }
    }
    Ok(judgements)
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
        assert!(error("question = ", "question2 = ").contains("question2"));
        assert!(error("metric = \"peak_training_memory_gb\"\n", "").contains("metric"));
        let peak = "metric = \"peak_training";
        let both = error(peak, &format!("not_measured = \"no\"\n{peak}"));
        assert!(both.contains("(memory_efficiency): needs exactly one of"), "{both}");
        assert!(error("\"tied_head\"", "\"untied_head\"").contains("listed twice"));
        assert!(error("\"ease_of_use\"", "\"memory_efficiency\"").contains("used twice"));
    }

    #[test]
    fn parts_judgements_and_the_rule_are_checked_by_field() {
        assert!(
            error("weight = 60", "weight = 61")
                .contains("(hardware_optimisation): parts: weight: the weights")
        );
        let twice = error("metric = \"prompt_share_percent\"", "metric = \"training_share_percent\"");
        assert!(twice.contains("parts[1]: metric: training_share_percent is there twice"), "{twice}");
        assert!(error("acceptability = 0.9", "acceptability = 9.0").contains("decision: acceptability is 9"));
        let judged = |entry: &str| {
            let text = format!(
                "memory_target_gb = 16\n[[criteria]]\nid = \"a\"\ntitle = \"A\"\nquestion = \"?\"\nweight = 100\n\
                 judgements = [{{ {entry} }}]"
            );
            Criteria::parse(&text)
        };
        let whole =
            "engine = \"x\", score = 7, author = \"Ann\", date = \"2026-01-31\", reason = \"tried it\"";
        assert!(matches!(judged(whole).unwrap().criteria[0].source, Source::Judgement { .. }));
        for (from, to, field) in [
            ("score = 7", "score = 11", "judgements[0]: score is 11"),
            ("2026-01-31", "soon", "judgements[0]: date is \"soon\""),
            ("\"Ann\"", "\" \"", "judgements[0]: author is empty"),
            ("reason = \"tried it\"", "resin = 1", "resin"),
        ] {
            let message = format!("{:#}", judged(&whole.replace(from, to)).unwrap_err());
            assert!(message.contains(field), "{message}");
        }
    }

    #[test]
    fn a_file_that_is_not_there_is_named() {
        let message = format!("{:#}", Criteria::read(Path::new("no/criteria.toml")).unwrap_err());
        assert!(message.contains("no/criteria.toml"), "{message}");
    }
}

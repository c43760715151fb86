//! What two records are compared in.

use crate::decide::jobs::Job;
use crate::measure::metrics::{
    counted_decodes, counted_prefills, counted_steps, peak_memory, seconds_per_amount, time_to_target,
};
use crate::record::CellRecord;
use crate::render::format::significant;
use crate::scenario::Scenario;
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Metric {
    LoadSeconds,
    /// Tokens that are not padding.
    TrainingTokensPerSecond,
    PromptTokensPerSecond,
    GeneratedTokensPerSecond,
    SecondsToTarget,
    PeakMemoryBytes,
}

impl Metric {
    pub const ALL: [Self; 6] = [
        Self::LoadSeconds,
        Self::TrainingTokensPerSecond,
        Self::PromptTokensPerSecond,
        Self::GeneratedTokensPerSecond,
        Self::SecondsToTarget,
        Self::PeakMemoryBytes,
    ];

    /// As in the thresholds and in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::LoadSeconds => "load_seconds",
            Self::TrainingTokensPerSecond => "training_tokens_per_second",
            Self::PromptTokensPerSecond => "prompt_tokens_per_second",
            Self::GeneratedTokensPerSecond => "generated_tokens_per_second",
            Self::SecondsToTarget => "seconds_to_target",
            Self::PeakMemoryBytes => "peak_memory_bytes",
        }
    }

    /// As in tables.
    pub fn title(self) -> &'static str {
        match self {
            Self::LoadSeconds => "load s",
            Self::TrainingTokensPerSecond => "training tokens/s",
            Self::PromptTokensPerSecond => "prompt tokens/s",
            Self::GeneratedTokensPerSecond => "generated tokens/s",
            Self::SecondsToTarget => "s to target",
            Self::PeakMemoryBytes => "peak GB",
        }
    }

    /// A figure in the unit of its column.
    pub fn shown(self, figure: f64) -> String {
        significant(if self == Self::PeakMemoryBytes { figure / 1e9 } else { figure })
    }

    /// Whether more of it is better.
    pub fn is_rate(self) -> bool {
        matches!(
            self,
            Self::TrainingTokensPerSecond | Self::PromptTokensPerSecond | Self::GeneratedTokensPerSecond
        )
    }

    /// The figure of a cost, and the other way round.
    pub fn turned(self, cost: f64) -> f64 {
        if self.is_rate() { 1.0 / cost } else { cost }
    }

    /// What each sample of a cell cost: seconds, seconds per token, or bytes. Their median is
    /// the figure of the report, or the inverse of it.
    fn costs(self, cell: &CellRecord) -> Vec<f64> {
        let samples = &cell.samples;
        match self {
            Self::LoadSeconds => samples.load.iter().map(|load| load.times.total_seconds).collect(),
            Self::TrainingTokensPerSecond => {
                seconds_per_amount(counted_steps(samples).map(|step| (step.real_tokens as f64, step.seconds)))
            }
            Self::PromptTokensPerSecond => seconds_per_amount(counted_prefills(samples)),
            Self::GeneratedTokensPerSecond => seconds_per_amount(counted_decodes(samples)),
            Self::SecondsToTarget => {
                let target = cell.parameters.target_loss();
                let met = target.and_then(|target| time_to_target(samples, target));
                met.map(|time| time.seconds).into_iter().collect()
            }
            Self::PeakMemoryBytes => peak_memory(samples).map(|bytes| bytes as f64).into_iter().collect(),
        }
    }

    /// Whether the scenario is there to measure it. Loading is a scenario of its own, and memory belongs to all.
    pub fn belongs_to(self, scenario: &Scenario) -> bool {
        match self {
            Self::LoadSeconds => matches!(scenario, Scenario::Load(_)),
            Self::TrainingTokensPerSecond => matches!(scenario, Scenario::Train(_)),
            Self::PromptTokensPerSecond | Self::GeneratedTokensPerSecond => {
                matches!(scenario, Scenario::Infer(_))
            }
            Self::SecondsToTarget => scenario.target_loss().is_some(),
            Self::PeakMemoryBytes => true,
        }
    }

    /// The costs of each process that ended ok and has any.
    pub fn processes(self, job: &Job) -> Vec<Vec<f64>> {
        job.ok().map(|cell| self.costs(cell)).filter(|costs| !costs.is_empty()).collect()
    }
}

//! Figures of a job, from the samples of all its repetitions that ended ok.

use super::jobs::Job;
use crate::measure::metrics::{counted_decodes, counted_prefills, counted_steps};
use crate::record::{CellRecord, LoadSample, TrainSample};
use crate::stats::median;
use evalfw_engine::protocol::DeviceKind;
use serde::Serialize;

/// A figure with what it is made of.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Spread {
    pub median: f64,
    pub min: f64,
    pub max: f64,
    /// Samples.
    pub n: usize,
}

impl Spread {
    /// `None` without samples, or with one that is not finite.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let values: Vec<f64> = values.into_iter().collect();
        let median = median(values.iter().copied())?;
        let min = values.iter().copied().fold(f64::INFINITY, f64::min);
        let max = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        Some(Self { median, min, max, n: values.len() })
    }

    /// A rate out of (amount, seconds): the mean amount over the median, the longest and the shortest time,
    /// as [`rate`](crate::measure::metrics::rate) defines it.
    pub fn of_rate(samples: impl IntoIterator<Item = (f64, f64)>) -> Option<Self> {
        let (amounts, seconds): (Vec<f64>, Vec<f64>) = samples.into_iter().unzip();
        let mean = amounts.iter().sum::<f64>() / amounts.len() as f64;
        let seconds = Self::of(seconds)?;
        let rate = |seconds: f64| mean / seconds;
        let spread = Self {
            median: rate(seconds.median),
            min: rate(seconds.max),
            max: rate(seconds.min),
            n: seconds.n,
        };
        (spread.median.is_finite() && spread.max.is_finite()).then_some(spread)
    }

    /// Whether every sample of this one is above every sample of the other.
    pub fn is_clear_of(&self, other: &Self) -> bool {
        self.min > other.max
    }
}

/// Seconds; every cell of whatever scenario loads its model once.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct LoadFigures {
    pub total: Spread,
    pub read: Spread,
    pub quantize: Spread,
    pub upload: Spread,
}

impl LoadFigures {
    pub fn of(samples: &[&LoadSample]) -> Option<Self> {
        let spread = |of: fn(&LoadSample) -> f64| Spread::of(samples.iter().map(|s| of(s)));
        Some(Self {
            total: spread(|s| s.times.total_seconds)?,
            read: spread(|s| s.times.read_seconds)?,
            quantize: spread(|s| s.times.quantize_seconds)?,
            upload: spread(|s| s.times.upload_seconds)?,
        })
    }
}

/// Rates per second of the steps that count; see [`rate`](crate::measure::metrics::rate).
#[derive(Debug, Clone, Copy, Serialize)]
pub struct TrainFigures {
    pub seconds_per_step: Spread,
    pub examples: Spread,
    /// Positions with a loss.
    pub trained_tokens: Spread,
    /// Positions that are not padding.
    pub real_tokens: Spread,
    /// All positions.
    pub slot_tokens: Spread,
    /// Share of all positions that are padding.
    pub pad_fraction: f64,
}

impl TrainFigures {
    pub fn of(job: &Job) -> Option<Self> {
        let counted: Vec<&TrainSample> = job.ok().flat_map(|c| counted_steps(&c.samples)).collect();
        let rate = |of: fn(&TrainSample) -> usize| {
            Spread::of_rate(counted.iter().map(|s| (of(s) as f64, s.seconds)))
        };
        let slots: usize = counted.iter().map(|s| s.slot_tokens).sum();
        let real: usize = counted.iter().map(|s| s.real_tokens).sum();
        Some(Self {
            seconds_per_step: Spread::of(counted.iter().map(|s| s.seconds))?,
            examples: rate(|s| s.examples)?,
            trained_tokens: rate(|s| s.trained_tokens)?,
            real_tokens: rate(|s| s.real_tokens)?,
            slot_tokens: rate(|s| s.slot_tokens)?,
            pad_fraction: 1.0 - real as f64 / slots.max(1) as f64,
        })
    }
}

/// In llama-bench's terms; one sample for each round that counts.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct InferFigures {
    /// Prompt tokens per second.
    pub prefill: Option<Spread>,
    /// Generated tokens per second: intervals over their time.
    pub decode: Option<Spread>,
    /// Seconds until the first token: the time of the prefill.
    pub first_token: Option<Spread>,
}

impl InferFigures {
    pub fn of(job: &Job) -> Option<Self> {
        let prefill: Vec<_> = job.ok().flat_map(|c| &c.samples.prefill).filter(|s| !s.warmup).collect();
        let figures = Self {
            prefill: Spread::of_rate(job.ok().flat_map(|c| counted_prefills(&c.samples))),
            decode: Spread::of_rate(job.ok().flat_map(|c| counted_decodes(&c.samples))),
            first_token: Spread::of(prefill.iter().map(|s| s.seconds)),
        };
        (figures.prefill.is_some() || figures.decode.is_some()).then_some(figures)
    }
}

/// The memory that counts against the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Footprint {
    /// The peak over the whole job.
    Peak {
        bytes: u64,
    },
    /// The peak may have been higher. Of a GPU with memory of its own, what its framework held at the end; of
    /// one that shares the host's, the larger of that and the resident peak of the process tree.
    AtLeast {
        bytes: u64,
    },
    Unknown,
}

impl Footprint {
    /// Of one cell: the process tree, with what a GPU that shares the host's memory holds, or the memory of a GPU
    /// that has its own.
    pub fn of_cell(cell: &CellRecord) -> Self {
        if !Self::is_of_device(cell) {
            let unified =
                cell.device.as_ref().is_some_and(|d| d.kind == DeviceKind::UnifiedGpu && !d.software);
            let on_gpu = cell
                .samples
                .device_memory
                .filter(|_| unified)
                .and_then(|m| m.peak_bytes.max(m.reserved_bytes));
            return match (cell.peak_memory_bytes, on_gpu) {
                // A GPU's private buffers may be missing from the resident size.
                (Some(resident), Some(on_gpu)) => Self::AtLeast { bytes: resident.max(on_gpu) },
                (Some(bytes), None) => Self::Peak { bytes },
                (None, _) => Self::Unknown,
            };
        }
        let Some(memory) = cell.samples.device_memory else { return Self::Unknown };
        match (memory.peak_bytes, memory.reserved_bytes.or(memory.in_use_bytes)) {
            (Some(bytes), _) => Self::Peak { bytes },
            (None, Some(bytes)) => Self::AtLeast { bytes },
            (None, None) => Self::Unknown,
        }
    }

    /// Whether it is the memory of a GPU that has its own, and the host's stands beside it.
    pub fn is_of_device(cell: &CellRecord) -> bool {
        cell.device.as_ref().is_some_and(|d| d.kind == DeviceKind::DiscreteGpu && !d.software)
    }

    /// The largest of the repetitions that ended ok, with its cell.
    pub fn of_job<'a>(job: &Job<'a>) -> Option<(Self, &'a CellRecord)> {
        job.ok().map(|cell| (Self::of_cell(cell), cell)).max_by_key(|(footprint, cell)| {
            // Of equal ones the first, so that the figure points to one cell.
            (footprint.bytes(), std::cmp::Reverse(cell.repetition))
        })
    }

    pub fn bytes(&self) -> Option<u64> {
        match *self {
            Self::Peak { bytes } | Self::AtLeast { bytes } => Some(bytes),
            Self::Unknown => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spread_keeps_the_median_the_ends_and_the_count() {
        let spread = Spread::of([3.0, 1.0, 2.0]).unwrap();
        assert_eq!(spread, Spread { median: 2.0, min: 1.0, max: 3.0, n: 3 });
        assert_eq!(Spread::of([]), None);
        assert_eq!(Spread::of([1.0, f64::INFINITY]), None);
    }

    #[test]
    fn one_is_clear_of_another_only_without_overlap() {
        let spread = |values: &[f64]| Spread::of(values.iter().copied()).unwrap();
        assert!(spread(&[5.0, 6.0]).is_clear_of(&spread(&[1.0, 4.9])));
        assert!(!spread(&[5.0, 6.0]).is_clear_of(&spread(&[1.0, 5.1])));
    }
}

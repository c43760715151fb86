//! How much arithmetic and how many bytes a job is, from the model's shape, and what share of the machine's limits its
//! speed is.
//!
//! Only work that the job itself asks for counts: what checkpointing computes again, or an engine reads twice, makes the
//! share smaller.

use super::jobs::Job;
use crate::measure::limits::Limits;
use crate::measure::metrics::{counted_decodes, counted_prefills, counted_steps, rate};
use crate::record::CellRecord;
use crate::scenario::Scenario;
use crate::stats::median;
use evalfw_engine::config::ModelConfig;
use evalfw_engine::lora::Target;
use evalfw_engine::protocol::Quantization;
use serde::Serialize;

/// NF4 in blocks of 64: 4 bits, a byte of scale for each block, and an f32 for each 256 of those.
const NF4_BYTES: f64 = 0.5 + 1.0 / 64.0 + 4.0 / (64.0 * 256.0);

/// Operations (a multiplication and an addition are two) of one training step of one example: products forward, and
/// backward one for each frozen matrix and two for each factor of the adapter. The head works on positions with a loss;
/// causal attention is half of the square.
pub fn step_flops(config: &ModelConfig, sequence: usize, rank: usize, trained_tokens: f64) -> f64 {
    let tokens = sequence as f64;
    let projections = || Target::ALL.iter().map(|target| config.projection_shape(*target));
    let base: f64 = projections().map(|[rows, cols]| 2.0 * tokens * (rows * cols) as f64).sum();
    let lora: f64 = projections().map(|[rows, cols]| 2.0 * tokens * (rank * (rows + cols)) as f64).sum();
    let attention = 2.0 * tokens * tokens * (config.num_attention_heads * config.head_dim) as f64;
    let forward = base + lora + attention;
    let backward = base + 2.0 * lora + 2.0 * attention;
    config.num_hidden_layers as f64 * (forward + backward) + 2.0 * trained_tokens * head_flops(config)
}

/// Operations of a prompt, of which the head sees the last position alone.
pub fn prefill_flops(config: &ModelConfig, tokens: usize) -> f64 {
    let count = tokens as f64;
    let shapes = Target::ALL.iter().map(|target| config.projection_shape(*target));
    let base: f64 = shapes.map(|[rows, cols]| 2.0 * count * (rows * cols) as f64).sum();
    let attention = 2.0 * count * count * (config.num_attention_heads * config.head_dim) as f64;
    config.num_hidden_layers as f64 * (base + attention) + head_flops(config)
}

fn head_flops(config: &ModelConfig) -> f64 {
    2.0 * (config.hidden_size * config.vocab_size) as f64
}

/// Bytes of weights that a generated token reads at least: the projections as they are stored, and a head of 16 bits.
/// A format of the framework's own counts as NF4: four bits are what the job asks for, and what it reads beyond them is
/// no credit to it.
pub fn token_bytes(config: &ModelConfig, quantization: Quantization) -> f64 {
    let shapes = Target::ALL.iter().map(|target| config.projection_shape(*target));
    let projections: usize = shapes.map(|[rows, cols]| rows * cols).sum();
    let of_weight = match quantization {
        Quantization::Nf4 | Quantization::Native => NF4_BYTES,
        Quantization::None => 2.0,
    };
    let head = 2 * config.hidden_size * config.vocab_size;
    of_weight * (config.num_hidden_layers * projections) as f64 + head as f64
}

/// Shares of the limits, from 0 to 1 and above it where the limit was measured too low; each `None` where limit or
/// shape is not known.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Shares {
    /// Of the rate of matrix products.
    pub train: Option<f64>,
    /// The same, of the prompt.
    pub prefill: Option<f64>,
    /// Of the rate at which memory is read.
    pub decode: Option<f64>,
}

impl Shares {
    /// Medians over the job's cells.
    pub fn of(job: &Job) -> Self {
        let share = |of: fn(&CellRecord) -> Option<f64>| median(job.ok().filter_map(of));
        Self { train: share(train_share), prefill: share(prefill_share), decode: share(decode_share) }
    }
}

/// Of the page cache's rate: the checkpoint's bytes over the time of a load that found them there.
pub fn load_share(cell: &CellRecord) -> Option<f64> {
    let load = cell.samples.load.as_ref().filter(|load| load.page_cache == "warm")?;
    let limit = cell.limits?.host.page_cache_bytes_per_second?;
    finite(cell.model.checkpoint_bytes as f64 / load.times.total_seconds / limit)
}

/// Of the rate of matrix products, in training.
pub fn train_share(cell: &CellRecord) -> Option<f64> {
    let config = cell.model.config.as_ref()?;
    let Scenario::Train(scenario) = &cell.parameters else { return None };
    let rows = scenario.rows_per_step() as f64;
    let steps: Vec<_> = counted_steps(&cell.samples).collect();
    let trained = steps.iter().map(|step| step.trained_tokens as f64).sum::<f64>() / steps.len() as f64;
    let flops = rows * step_flops(config, scenario.sequence_length, scenario.lora_r, trained / rows);
    let seconds = median(steps.iter().map(|step| step.seconds))?;
    finite(flops / seconds / matrix_limit_of(cell)?)
}

/// The same, of the prompt.
pub fn prefill_share(cell: &CellRecord) -> Option<f64> {
    let config = cell.model.config.as_ref()?;
    let Scenario::Infer(scenario) = &cell.parameters else { return None };
    let seconds = median(counted_prefills(&cell.samples).map(|(_, seconds)| seconds))?;
    finite(prefill_flops(config, scenario.prompt_tokens) / seconds / matrix_limit_of(cell)?)
}

/// Of the rate at which memory is read, in generating.
pub fn decode_share(cell: &CellRecord) -> Option<f64> {
    let config = cell.model.config.as_ref()?;
    let rate = rate(counted_decodes(&cell.samples))?;
    finite(token_bytes(config, cell.quantization) * rate / read_limit_of(cell)?)
}

fn finite(share: f64) -> Option<f64> {
    Some(share).filter(|share| share.is_finite())
}

/// The rates that the machine has at its best: its fastest matrix products and its fastest memory, be they the CPU's or a
/// GPU's.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Best {
    pub flops: f64,
    pub bytes_per_second: f64,
}

impl Best {
    pub fn of<'a>(cells: impl Iterator<Item = &'a CellRecord>) -> Self {
        cells.filter_map(|cell| cell.limits.as_ref()).fold(Self::default(), |best, limits| {
            let device = limits.device.unwrap_or_default();
            let host = limits.host;
            let of_host = [host.f32_flops, host.bf16_flops, host.int16_flops];
            let flops = of_host.into_iter().chain([device.f32_flops, device.bf16_flops]);
            let bytes = [host.memory_bytes_per_second, device.memory_bytes_per_second];
            Self {
                flops: flops.flatten().fold(best.flops, f64::max),
                bytes_per_second: bytes.into_iter().flatten().fold(best.bytes_per_second, f64::max),
            }
        })
    }
}

/// The limit that [`train_share`] and [`prefill_share`] are held against.
pub fn matrix_limit_of(cell: &CellRecord) -> Option<f64> {
    matrix_limit(cell.compute_dtype.as_deref().unwrap_or("f32"), cell.limits.as_ref()?)
}

/// That of [`decode_share`].
pub fn read_limit_of(cell: &CellRecord) -> Option<f64> {
    let limits = cell.limits.as_ref()?;
    match &limits.device {
        Some(device) => device.memory_bytes_per_second,
        None => limits.host.memory_bytes_per_second,
    }
}

/// Of the type in which the engine multiplies: one that does so in 16 bits is held against the faster of that and f32.
fn matrix_limit(compute_dtype: &str, limits: &Limits) -> Option<f64> {
    let (f32, bf16, int16) = match &limits.device {
        Some(device) => (device.f32_flops, device.bf16_flops, None),
        None => (limits.host.f32_flops, limits.host.bf16_flops, limits.host.int16_flops),
    };
    let in_16_bits =
        [("bf16", bf16), ("int16", int16)].into_iter().filter(|(name, _)| compute_dtype.contains(name));
    f32.map(|f32| in_16_bits.filter_map(|(_, rate)| rate).fold(f32, f64::max))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measure::limits::HostLimits;
    use crate::model::Preset;
    use evalfw_engine::protocol::DeviceLimits;

    /// By benches/peers/work.py, an implementation of its own: `Shapes(896, 4864, 24, 14, 2, 64, 151936)` with a sequence
    /// of 512, rank 16 and 400 trained tokens, without recompute, and `nf4_weight_bytes`.
    #[test]
    fn the_work_of_a_step_and_the_bytes_of_a_token_are_those_of_the_peers_script() {
        let config = Preset::parse("0.5b").unwrap().config;
        let flops = step_flops(&config, 512, 16, 400.0);
        assert_eq!(flops, STEP_FLOPS);
        let bytes = token_bytes(&config, Quantization::Nf4);
        assert_eq!(bytes.round(), TOKEN_BYTES);
        assert_eq!(token_bytes(&config, Quantization::Native), token_bytes(&config, Quantization::Nf4));
    }

    #[test]
    fn an_engine_is_held_against_the_rate_of_what_it_multiplies() {
        let host = |bf16_flops, int16_flops| HostLimits {
            f32_flops: Some(100.0),
            bf16_flops,
            int16_flops,
            ..HostLimits::default()
        };
        let limit = |dtype, host| matrix_limit(dtype, &Limits { host, device: None });
        let (bf16, int16) = (host(Some(200.0), None), host(None, Some(150.0)));
        for (dtype, of_bf16, of_int16) in
            [("f32", 100.0, 100.0), ("bf16 products", 200.0, 100.0), ("int16 products", 100.0, 150.0)]
        {
            assert_eq!((limit(dtype, bf16), limit(dtype, int16)), (Some(of_bf16), Some(of_int16)), "{dtype}");
        }
        // f32 is always there to take.
        assert_eq!(limit("int16 products", host(None, Some(50.0))), Some(100.0));
        let gpu = DeviceLimits { f32_flops: Some(1e3), bf16_flops: Some(4e3), ..DeviceLimits::default() };
        let limits = Limits { host: bf16, device: Some(gpu) };
        assert_eq!(matrix_limit("bf16", &limits), Some(4e3));
    }

    const STEP_FLOPS: f64 = 1_011_495_206_912.0;
    const TOKEN_BYTES: f64 = 456_860_992.0;
}

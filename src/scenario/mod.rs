//! Scenarios and suites, read from TOML.
//!
//! A scenario file says what is run; a suite combines scenarios with models, repetitions and other
//! values of their parameters. In a suite, an array stands for one cell per value.

mod library;

pub use library::Library;

use anyhow::{Result, bail};
use evalfw_engine::lora::LoraConfig;
use evalfw_engine::protocol::{Quantization, TrainingConfig};
use serde::{Deserialize, Serialize};

/// What one cell does, with all its parameters.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Scenario {
    Load(LoadScenario),
    Train(TrainScenario),
    Infer(InferScenario),
    Quality(QualityScenario),
}

/// From the folder on disk to the first possible forward pass.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LoadScenario {
    pub quantization: Quantization,
    /// The longest that one call may take.
    pub timeout_seconds: u64,
}

/// LoRA training on the instruction data.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainScenario {
    pub quantization: Quantization,
    pub timeout_seconds: u64,
    /// Slots of a row. Longer examples are cut, shorter ones padded.
    pub sequence_length: usize,
    pub batch_size: usize,
    pub gradient_accumulation_steps: usize,
    /// Fill a row with several whole examples instead of padding.
    pub packing: bool,
    /// Steps that run first and do not count.
    pub warmup_steps: usize,
    /// Steps that count.
    pub steps: usize,
    /// Batches of the validation set, before the first step and after the last. 0: none.
    pub evaluation_batches: usize,
    pub learning_rate: f64,
    pub weight_decay: f64,
    /// 0: no clipping.
    pub max_grad_norm: f64,
    pub gradient_checkpointing: bool,
    /// Memory, in GB of 10^9 bytes, for activations that checkpointing may keep, so that an engine
    /// computes only the rest again.
    #[serde(default)]
    pub kept_activations_gb: f64,
    pub lora_r: usize,
    pub lora_alpha: f64,
    pub lora_dropout: f32,
}

/// Prompt processing and greedy generation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InferScenario {
    pub quantization: Quantization,
    pub timeout_seconds: u64,
    pub prompt_tokens: usize,
    pub generate_tokens: usize,
    /// Rounds of prompt and generation that run first and do not count.
    pub warmup: usize,
    /// Rounds that count.
    pub repeats: usize,
}

/// Time to quality: training on the clock until an evaluation loss is reached, after the idea of
/// MLPerf Training. It brings its own model, one that is small and can learn the data set.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QualityScenario {
    /// A preset, a hub id or a folder, whatever model the run is about.
    pub model: String,
    /// Mean nats per supervised position of the validation set.
    pub target_loss: f64,
    /// Steps between two evaluations.
    pub evaluation_interval: usize,
    /// `steps` is the limit at which training gives up.
    pub train: TrainScenario,
}

impl Scenario {
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Load(_) => "load",
            Self::Train(_) => "train",
            Self::Infer(_) => "infer",
            Self::Quality(_) => "quality",
        }
    }

    pub fn quantization(&self) -> Quantization {
        match self {
            Self::Load(s) => s.quantization,
            Self::Train(s) => s.quantization,
            Self::Infer(s) => s.quantization,
            Self::Quality(s) => s.train.quantization,
        }
    }

    /// The same with the base in another form.
    pub fn quantized(&self, form: Quantization) -> Self {
        let mut other = self.clone();
        match &mut other {
            Self::Load(s) => s.quantization = form,
            Self::Train(s) => s.quantization = form,
            Self::Infer(s) => s.quantization = form,
            Self::Quality(s) => s.train.quantization = form,
        }
        other
    }

    pub fn timeout_seconds(&self) -> u64 {
        match self {
            Self::Load(s) => s.timeout_seconds,
            Self::Train(s) => s.timeout_seconds,
            Self::Infer(s) => s.timeout_seconds,
            Self::Quality(s) => s.train.timeout_seconds,
        }
    }

    /// The model that the scenario is defined on, where it is not the run's.
    pub fn own_model(&self) -> Option<&str> {
        match self {
            Self::Quality(s) => Some(&s.model),
            _ => None,
        }
    }

    /// The evaluation loss that it trains to, if it does.
    pub fn target_loss(&self) -> Option<f64> {
        match self {
            Self::Quality(s) => Some(s.target_loss),
            _ => None,
        }
    }

    /// How it trains, if it does.
    pub fn training(&self) -> Option<&TrainScenario> {
        match self {
            Self::Train(s) => Some(s),
            Self::Quality(s) => Some(&s.train),
            Self::Load(_) | Self::Infer(_) => None,
        }
    }

    /// A name that tells cells of one run apart, e.g. `train-s512-b1`.
    pub fn label(&self) -> String {
        match self {
            Self::Load(_) => "load".into(),
            Self::Train(s) => format!("train-{}", s.shape()),
            Self::Infer(s) => format!("infer-pp{}-tg{}", s.prompt_tokens, s.generate_tokens),
            Self::Quality(s) => format!("quality-{}-to{}", s.train.shape(), s.target_loss),
        }
    }

    /// Checks what the types cannot say. The message names the key.
    fn check(&self) -> Result<()> {
        if self.timeout_seconds() == 0 {
            bail!("timeout_seconds must be at least 1");
        }
        match self {
            Self::Load(_) => Ok(()),
            Self::Train(s) => s.check(),
            Self::Infer(s) => at_least_1(&[
                ("prompt_tokens", s.prompt_tokens),
                ("generate_tokens", s.generate_tokens),
                ("repeats", s.repeats),
            ]),
            Self::Quality(s) => s.check(),
        }
    }
}

fn at_least_1(values: &[(&str, usize)]) -> Result<()> {
    match values.iter().find(|(_, value)| *value == 0) {
        Some((key, _)) => bail!("{key} must be at least 1"),
        None => Ok(()),
    }
}

impl QualityScenario {
    /// Whether an evaluation with this loss is at the target.
    pub fn is_met_by(&self, loss: Option<f64>) -> bool {
        loss.is_some_and(|loss| loss <= self.target_loss)
    }

    fn check(&self) -> Result<()> {
        self.train.check()?;
        at_least_1(&[
            ("evaluation_interval", self.evaluation_interval),
            ("train.evaluation_batches", self.train.evaluation_batches),
        ])?;
        if !(self.target_loss.is_finite() && self.target_loss > 0.0) {
            bail!("target_loss must be above 0");
        }
        if self.train.warmup_steps > 0 {
            bail!("train.warmup_steps must be 0: every step counts on the way to the target");
        }
        Ok(())
    }
}

impl TrainScenario {
    fn check(&self) -> Result<()> {
        at_least_1(&[
            ("batch_size", self.batch_size),
            ("gradient_accumulation_steps", self.gradient_accumulation_steps),
            ("steps", self.steps),
            ("lora_r", self.lora_r),
        ])?;
        if self.sequence_length < 2 {
            bail!("sequence_length must be at least 2: a token and the one to predict");
        }
        if !(0.0..1.0).contains(&self.lora_dropout) {
            bail!("lora_dropout must be in [0, 1)");
        }
        for (key, value) in [
            ("learning_rate", self.learning_rate),
            ("weight_decay", self.weight_decay),
            ("max_grad_norm", self.max_grad_norm),
            ("kept_activations_gb", self.kept_activations_gb),
        ] {
            if !(value.is_finite() && value >= 0.0) {
                bail!("{key} must be a number of at least 0");
            }
        }
        if !(self.lora_alpha.is_finite() && self.lora_alpha > 0.0) {
            bail!("lora_alpha must be above 0");
        }
        Ok(())
    }

    /// The parameters that people vary, e.g. `s512-b1`.
    fn shape(&self) -> String {
        let mut shape = format!("s{}-b{}", self.sequence_length, self.batch_size);
        if self.gradient_accumulation_steps > 1 {
            shape += &format!("-ga{}", self.gradient_accumulation_steps);
        }
        for (unusual, mark) in [(!self.gradient_checkpointing, "-nockpt"), (!self.packing, "-padded")] {
            shape += if unusual { mark } else { "" };
        }
        if self.lora_r != LoraConfig::default().r {
            shape += &format!("-r{}", self.lora_r);
        }
        shape
    }

    pub fn lora(&self) -> LoraConfig {
        LoraConfig { r: self.lora_r, lora_alpha: self.lora_alpha, lora_dropout: self.lora_dropout }
    }

    pub fn training(&self) -> TrainingConfig {
        TrainingConfig {
            learning_rate: self.learning_rate,
            weight_decay: self.weight_decay,
            max_grad_norm: (self.max_grad_norm > 0.0).then_some(self.max_grad_norm),
            gradient_checkpointing: self.gradient_checkpointing,
            kept_activation_bytes: (self.kept_activations_gb * 1e9) as u64,
            ..TrainingConfig::default()
        }
    }

    pub fn total_steps(&self) -> usize {
        self.warmup_steps + self.steps
    }

    pub fn rows_per_step(&self) -> usize {
        self.batch_size * self.gradient_accumulation_steps
    }
}

/// What `evalfw run` runs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Suite {
    pub name: String,
    pub description: String,
    /// A preset, a hub id or a folder.
    pub model: String,
    /// For adapters that render on the CPU: their speed says nothing, so that a small model shows
    /// that the engine works without taking an hour.
    pub software_adapter_model: String,
    pub seed: u64,
    /// Stock forms that suites leave out unless they are named take part too.
    #[serde(default)]
    pub all_stock_forms: bool,
    pub cells: Vec<SuiteCell>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SuiteCell {
    pub scenario: Scenario,
    pub repetitions: u32,
    #[serde(default)]
    pub kernels: CellKernels,
}

impl SuiteCell {
    /// Whether the cells of one engine would have one name: it tells the parameters that people vary, and how the
    /// base is stored.
    pub fn has_name_of(&self, other: &Self) -> bool {
        let name = |cell: &Self| (cell.scenario.label(), cell.scenario.quantization());
        name(self) == name(other)
    }
}

/// With whose kernels a cell is run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CellKernels {
    /// Those of the engines as they are named: ours, where an engine has any.
    #[default]
    Custom,
    /// The framework's own: the stock form of each engine that has one.
    Stock,
}

impl Suite {
    /// Checks what the types cannot say.
    pub fn check(&self) -> Result<()> {
        for cell in &self.cells {
            if !(1..=MAX_REPETITIONS).contains(&cell.repetitions) {
                bail!("repetitions is {}: 1 to {MAX_REPETITIONS}", cell.repetitions);
            }
            cell.scenario.check()?;
        }
        check_distinct(&self.cells)
    }
}

/// Each is a process of some seconds at least.
const MAX_REPETITIONS: u32 = 1000;

/// Cells are told apart by their label, which names the parameters that people vary, by how the base is stored and
/// by whose kernels run.
fn check_distinct(cells: &[SuiteCell]) -> Result<()> {
    let mut seen = std::collections::BTreeSet::new();
    match cells.iter().find(|c| !seen.insert((c.scenario.label(), c.scenario.quantization(), c.kernels))) {
        Some(cell) => {
            let label = cell.scenario.label();
            bail!(
                "two cells are called {label}: they must differ in a parameter that is in the name, in \
                 quantization or in kernels"
            )
        }
        None => Ok(()),
    }
}

//! The cells of a record, arranged: all repetitions of one engine, model and scenario are a job.

use crate::engines::is_stock_form_of;
use crate::record::{CellRecord, ModelRecord, Outcome};
use crate::scenario::Scenario;
use evalfw_engine::protocol::Quantization;

/// All repetitions of one engine doing one scenario on one model.
#[derive(Debug, Clone)]
pub struct Job<'a> {
    pub engine: &'a str,
    pub model: &'a ModelRecord,
    /// Name with parameters, e.g. `train-s512-b1`.
    pub scenario: &'a str,
    pub parameters: &'a Scenario,
    pub quantization: Quantization,
    /// The base is in NF4, or the engine has none and took its framework's own format in its place.
    pub is_qlora: bool,
    /// By repetition; never empty.
    pub cells: Vec<&'a CellRecord>,
}

impl<'a> Job<'a> {
    /// The cells whose figures count.
    pub fn ok(&self) -> impl Iterator<Item = &'a CellRecord> + '_ {
        self.cells.iter().copied().filter(|c| c.outcome == Outcome::Ok)
    }

    pub fn is_kind(&self, kind: &str) -> bool {
        self.parameters.kind() == kind
    }

    /// `ok`, or how often which outcome came, e.g. `ok 2 of 3, oom 1 of 3`.
    pub fn outcomes(&self) -> String {
        outcomes(&self.cells)
    }

    /// `train-s512-b1`, with the storage of the base where it is not the usual NF4.
    pub fn label(&self) -> String {
        match self.quantization {
            Quantization::Nf4 => self.scenario.to_owned(),
            Quantization::None => format!("{} (unquantized)", self.scenario),
            Quantization::Native => format!("{} (native)", self.scenario),
        }
    }
}

/// How the cells ended, in words.
pub fn outcomes(cells: &[&CellRecord]) -> String {
    let mut kinds: Vec<Outcome> = cells.iter().map(|c| c.outcome).collect();
    kinds.sort();
    kinds.dedup();
    if let ([kind], 1) = (kinds.as_slice(), cells.len()) {
        return kind.as_str().to_owned();
    }
    let count = |kind: &Outcome| cells.iter().filter(|c| c.outcome == *kind).count();
    let part = |kind: &Outcome| format!("{} {} of {}", kind.as_str(), count(kind), cells.len());
    kinds.iter().map(part).collect::<Vec<_>>().join(", ")
}

/// Arranges the cells: by model from small to large, then engine, then scenario.
pub fn arrange(cells: &[CellRecord]) -> Vec<Job<'_>> {
    let mut jobs: Vec<Job> = Vec::new();
    for cell in cells {
        let same = |job: &&mut Job| {
            job.engine == cell.engine
                && job.model.name == cell.model.name
                && job.scenario == cell.scenario
                && job.quantization == cell.quantization
        };
        match jobs.iter_mut().find(same) {
            Some(job) => job.cells.push(cell),
            None => jobs.push(Job {
                engine: &cell.engine,
                model: &cell.model,
                scenario: &cell.scenario,
                parameters: &cell.parameters,
                quantization: cell.quantization,
                is_qlora: is_qlora(cells, cell),
                cells: vec![cell],
            }),
        }
    }
    for job in &mut jobs {
        job.cells.sort_by_key(|c| c.repetition);
    }
    let order: Vec<String> = models(&jobs).iter().map(|m| m.name.clone()).collect();
    jobs.sort_by_key(|job| {
        let model = order.iter().position(|name| *name == job.model.name);
        (model, job.engine.to_owned(), size(job.parameters), job.scenario.to_owned(), job.quantization)
    });
    jobs
}

fn is_qlora(cells: &[CellRecord], cell: &CellRecord) -> bool {
    let of_engine = || cells.iter().filter(|other| other.engine == cell.engine);
    match cell.quantization {
        Quantization::Nf4 => true,
        Quantization::Native => of_engine().all(|other| other.quantization != Quantization::Nf4),
        Quantization::None => false,
    }
}

/// The jobs that engines are compared on in memory and speed. A scenario with a model of its own asks
/// something else.
pub fn compared<'a>(jobs: &[Job<'a>]) -> Vec<Job<'a>> {
    jobs.iter().filter(|j| j.parameters.own_model().is_none()).cloned().collect()
}

/// The models of the jobs, from small to large.
pub fn models<'a>(jobs: &[Job<'a>]) -> Vec<&'a ModelRecord> {
    let mut models: Vec<&ModelRecord> = jobs.iter().map(|j| j.model).collect();
    // The cell of an engine that never started may not know the size.
    models.sort_by(|a, b| (&a.name, b.parameters).cmp(&(&b.name, a.parameters)));
    models.dedup_by(|a, b| a.name == b.name);
    models.sort_by_key(|m| m.parameters);
    models
}

/// Orders scenarios: load, train, infer, quality, and each from small to large.
fn size(scenario: &Scenario) -> (u8, usize) {
    match scenario {
        Scenario::Load(_) => (0, 0),
        Scenario::Train(s) => (1, s.sequence_length * s.batch_size),
        Scenario::Infer(s) => (2, s.prompt_tokens + s.generate_tokens),
        Scenario::Quality(s) => (3, s.train.sequence_length * s.train.batch_size),
    }
}

/// Whether the engine's device is one that renders on the CPU, as far as any of its cells tells.
pub fn is_software_adapter(cells: &[CellRecord], engine: &str) -> bool {
    cells.iter().filter(|c| c.engine == engine).any(|c| c.device.as_ref().is_some_and(|d| d.software))
}

/// Whether the engine is the stock form of one that ran as well.
pub fn is_beside_tuned(cells: &[CellRecord], engine: &str) -> bool {
    let ran = |c: &&CellRecord| c.outcome != Outcome::Unavailable;
    cells.iter().filter(ran).any(|c| is_stock_form_of(engine, &c.engine))
}

/// Of each engine, the training job that engines are compared on.
pub fn reference_jobs<'j, 'a>(jobs: &'j [Job<'a>], model: &str) -> Vec<&'j Job<'a>> {
    let scenario = reference_scenario(jobs, model, "train");
    let is_reference = |j: &&Job| j.model.name == model && Some(j.scenario) == scenario && j.is_qlora;
    jobs.iter().filter(is_reference).collect()
}

/// The job that engines are compared on: the largest of its kind with an NF4 base or what stands for one, and for training
/// with gradient checkpointing where any job has it. It is chosen by what the run set out to do and
/// not by what succeeded, so that no engine can choose it by failing.
pub fn reference_scenario<'a>(jobs: &[Job<'a>], model: &str, kind: &str) -> Option<&'a str> {
    let rank = |scenario: &Scenario| match scenario {
        Scenario::Train(s) => (s.gradient_checkpointing, s.sequence_length * s.batch_size, s.rows_per_step()),
        other => (true, size(other).1, 0),
    };
    let of_kind = jobs.iter().filter(|j| j.model.name == model && j.is_kind(kind) && j.is_qlora);
    of_kind.max_by_key(|j| (rank(j.parameters), j.scenario)).map(|j| j.scenario)
}

//! Runs one cell in a worker of its own and gathers what was seen, whatever happened.

use super::inputs::ModelInputs;
use super::progress::Progress;
use super::scenarios;
use crate::plan::Cell;
use crate::record::{self, CellError, Outcome, Samples};
use crate::worker::{Client, Failure, Workers};
use evalfw_engine::protocol::{CallType, EngineInfo, Quantization};
use std::path::PathBuf;
use std::time::{Duration, Instant};

/// Runs cells. A trait, so that the order and the bookkeeping of a run can be tested without workers.
pub trait Executor {
    fn execute(&mut self, cell: &Cell, progress: &Progress) -> Execution;
}

/// A cell as it went: samples up to the failure, if there was one.
pub struct Execution {
    pub info: Option<EngineInfo>,
    pub started_at: String,
    pub wall_seconds: f64,
    pub samples: Samples,
    pub failure: Option<(Outcome, CellError)>,
}

/// Starts a worker process for each cell.
pub struct WorkerExecutor {
    pub models: Vec<ModelInputs>,
    /// Folder for what workers write to standard error.
    pub logs: PathBuf,
    pub workers: Workers,
}

impl Executor for WorkerExecutor {
    fn execute(&mut self, cell: &Cell, progress: &Progress) -> Execution {
        let started_at = record::now();
        let start = Instant::now();
        let mut execution = Execution {
            info: None,
            started_at,
            wall_seconds: 0.0,
            samples: Samples::default(),
            failure: None,
        };
        let inputs = &self.models[cell.model];
        let log = self.logs.join(format!("{}.log", cell.id(&inputs.name).replace('/', "_")));
        let timeout = Duration::from_secs(cell.scenario.timeout_seconds());
        let client = self
            .workers
            .of_engine(&cell.engine)
            .map_err(Failure::Start)
            .and_then(|command| Client::start(&command, Some(&log), timeout));
        match client {
            Err(failure) => {
                execution.failure = Some((failure.outcome(), failure.record("start", Vec::new())));
            }
            Ok(mut client) => {
                client.observe();
                let mut session = Session {
                    client,
                    samples: Samples::default(),
                    during: String::new(),
                    progress,
                    tunes: false,
                    quantizations: Vec::new(),
                };
                let result = session.run(cell, inputs, &mut execution.info);
                let stderr_tail = session.client.stderr_tail();
                let seen = session.client.observations();
                session.samples.observe(seen);
                execution.samples = session.samples;
                // A worker that fails on its way out has given its answers, but may have lost a file.
                let result = result.and_then(|()| {
                    session.during = "bye".into();
                    session.client.finish()
                });
                execution.failure = result
                    .err()
                    .map(|failure| (failure.outcome(), failure.record(&session.during, stderr_tail)));
            }
        }
        execution.wall_seconds = start.elapsed().as_secs_f64();
        execution
    }
}

/// A conversation with a worker, and the samples so far.
pub struct Session<'a> {
    client: Client,
    pub samples: Samples,
    /// What is being done, for the error of a failure.
    during: String,
    progress: &'a Progress,
    /// Whether the engine chooses kernels by measuring.
    pub tunes: bool,
    /// The forms of the base that it can load.
    pub quantizations: Vec<Quantization>,
}

impl Session<'_> {
    fn run(
        &mut self,
        cell: &Cell,
        inputs: &ModelInputs,
        info: &mut Option<EngineInfo>,
    ) -> Result<(), Failure> {
        self.during = "hello".into();
        let answer = self.client.hello()?;
        self.tunes = answer.tunes;
        self.quantizations.clone_from(&answer.quantizations);
        *info = Some(answer);
        scenarios::run(self, cell, inputs)
    }

    /// Begins a phase of the memory figures.
    pub fn phase(&mut self, name: &str) {
        self.client.begin_phase(name);
    }

    /// One call, named for progress and errors.
    pub fn call<C: CallType>(&mut self, during: impl Into<String>, call: C) -> Result<C::Reply, Failure> {
        self.during = during.into();
        self.progress.doing(&self.during);
        self.client.call(call)
    }
}

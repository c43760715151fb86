//! The agent: observes a worker that runs elsewhere than the harness.
//!
//! It starts the worker beside itself and passes the lines of the protocol on. Lines that are for the agent itself are
//! `{"agent": …}` in both directions; the worker never sees them.

use super::process::{Line, Process, Stderr, WorkerCommand};
use super::{host_oom_kills, is_oom_kill};
use crate::interrupt;
use crate::measure::host::Environment;
use crate::measure::watch::{Observations, Observer};
use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use std::io::{BufRead, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

/// A line for or from the agent.
#[derive(Debug, Serialize, Deserialize)]
pub struct Envelope<T> {
    pub agent: T,
}

/// What the harness asks.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ask {
    /// Has no reply.
    BeginPhase(String),
    Environment,
    /// Ends the observations.
    Observations,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Tell {
    Environment(Box<Environment>),
    Observations(Box<Observations>),
    /// The worker died; the agent ends as well.
    Died {
        how: String,
        out_of_memory: bool,
        observations: Option<Box<Observations>>,
    },
}

/// How every line of the agent begins, so that it is told apart without parsing.
pub const MARK: &str = "{\"agent\":";

/// How long the worker may take to end after its pipe closed.
const GRACE: Duration = Duration::from_secs(10);

/// How often is looked for a request to end.
const LOOK: Duration = Duration::from_millis(50);

enum Event {
    FromHarness(String),
    /// The harness is gone.
    HarnessEnded,
    FromWorker(Line),
    WorkerEnded,
}

/// Serves until the worker or the harness ends.
pub fn serve(engine: &str, threads: Option<usize>, engines_file: Option<&Path>) -> Result<ExitCode> {
    // Asked to end, it takes its worker and what that has left with it.
    interrupt::install()?;
    let oom_kills = host_oom_kills();
    let command = WorkerCommand::here(engine, threads, engines_file).context("where is this program?")?;
    let mut process =
        Process::start(&command, Stderr::PassedOn).context("the worker could not be started")?;
    let mut observer = Some(Observer::start(process.pid()));
    let events = events(process.take_lines());
    let mut output = std::io::stdout().lock();
    let mut say = |line: &str| -> std::io::Result<()> {
        output.write_all(line.trim_end_matches('\n').as_bytes())?;
        output.write_all(b"\n")?;
        output.flush()
    };
    let line = |tell: Tell| serde_json::to_string(&Envelope { agent: tell });
    loop {
        let event = match events.recv_timeout(LOOK) {
            Err(RecvTimeoutError::Timeout) if !interrupt::requested() => continue,
            Err(_) => break,
            Ok(event) => event,
        };
        match event {
            Event::HarnessEnded => break,
            Event::FromHarness(text) if text.starts_with(MARK) => {
                let ask: Envelope<Ask> = serde_json::from_str(&text).context("a line for the agent")?;
                match ask.agent {
                    Ask::BeginPhase(name) => observer.iter().for_each(|observer| observer.begin_phase(&name)),
                    Ask::Environment => say(&line(Tell::Environment(Box::new(Environment::detect())))?)?,
                    Ask::Observations => {
                        let seen = observer.take().map(Observer::finish).unwrap_or_default();
                        say(&line(Tell::Observations(Box::new(seen)))?)?;
                    }
                }
            }
            // If the worker is gone its end is the next event.
            Event::FromHarness(text) => drop(process.send(text.trim_end())),
            // Without its end the line was cut off by the worker's own end, which is the next event.
            Event::FromWorker(Line::Text(text)) if !text.ends_with('\n') => {}
            Event::FromWorker(Line::Text(text)) => say(&text)?,
            // The harness refuses it as it would have refused the worker's own line.
            Event::FromWorker(Line::Garbage(what)) => say(&what)?,
            Event::WorkerEnded => {
                let status = process.wait(GRACE);
                if status.is_some_and(|status| status.success()) {
                    return Ok(ExitCode::SUCCESS);
                }
                let how = status.map_or("it closed its output but did not end".into(), |s| s.to_string());
                let out_of_memory = is_oom_kill(oom_kills, &how);
                let observations = observer.take().map(Observer::finish).map(Box::new);
                say(&line(Tell::Died { how, out_of_memory, observations })?)?;
                return Ok(ExitCode::FAILURE);
            }
        }
    }
    // Dropping the process ends the worker with all that it has started.
    Ok(ExitCode::FAILURE)
}

fn events(worker: Receiver<Line>) -> Receiver<Event> {
    let (sender, events) = channel();
    let from_worker: Sender<Event> = sender.clone();
    std::thread::spawn(move || {
        for line in worker {
            if from_worker.send(Event::FromWorker(line)).is_err() {
                return;
            }
        }
        // Nobody listens any more only where all has ended.
        let _ = from_worker.send(Event::WorkerEnded);
    });
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines() {
            let Ok(line) = line else { break };
            if sender.send(Event::FromHarness(line)).is_err() {
                return;
            }
        }
        let _ = sender.send(Event::HarnessEnded);
    });
    events
}

//! Asks an engine, in a worker of its own, whether it can run here: a crashing driver takes the worker
//! down and not the harness.

use crate::record::Outcome;
use crate::worker::{Client, Failure, Launcher, Workers};
use evalfw_engine::protocol::EngineInfo;
use serde::Serialize;
use std::time::Duration;

/// Opening a device may compile or load a driver's kernels.
const TIMEOUT: Duration = Duration::from_secs(120);

#[derive(Debug, Clone, Serialize)]
pub enum Availability {
    #[serde(rename = "info")]
    Available(Box<EngineInfo>),
    #[serde(rename = "problem")]
    Unavailable(Reason),
}

#[derive(Debug, Clone, Serialize)]
pub struct Reason {
    /// `unavailable` as the engine says, or how its worker failed.
    pub outcome: Outcome,
    pub reason: String,
    pub advice: Option<String>,
    pub stderr_tail: Vec<String>,
}

pub fn probe(engine: &str, workers: &Workers) -> Availability {
    let command = match workers.of_engine(engine) {
        Ok(command) => command,
        Err(error) => return unavailable(Failure::Start(error), Vec::new(), workers),
    };
    let mut client = match Client::start(&command, None, TIMEOUT) {
        Ok(client) => client,
        Err(failure) => return unavailable(failure, Vec::new(), workers),
    };
    match client.hello() {
        Ok(info) => {
            // It has told what was asked; how it ends changes nothing.
            let _ = client.finish();
            Availability::Available(Box::new(info))
        }
        Err(failure) => unavailable(failure, client.stderr_tail(), workers),
    }
}

fn unavailable(failure: Failure, stderr_tail: Vec<String>, workers: &Workers) -> Availability {
    let error = failure.record("hello", stderr_tail);
    Availability::Unavailable(Reason {
        outcome: failure.outcome(),
        reason: error.message,
        advice: error.advice.or_else(|| launchers_part(&failure, workers.launcher.as_ref()?)),
        stderr_tail: error.stderr_tail,
    })
}

/// What to do where the launcher rather than the engine is to blame.
fn launchers_part(failure: &Failure, launcher: &Launcher) -> Option<String> {
    match failure {
        Failure::Start(_) => Some(format!("is --launcher {:?} right?", launcher.text)),
        Failure::Protocol(_) => Some(format!(
            "through {:?} standard output has to be the worker's alone: what a launcher or a login shell says belongs \
             on standard error",
            launcher.text
        )),
        _ => None,
    }
}

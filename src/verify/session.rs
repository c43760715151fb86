//! A conversation with a worker that has one reference model loaded.

use crate::record::{CellError, Outcome};
use crate::worker::{Client, Failure, WorkerCommand};
use evalfw_engine::Error as EngineError;
use evalfw_engine::protocol::{CallType, EngineInfo, Load, Quantization};
use std::path::Path;
use std::time::Duration;

/// Shader compilation on a software adapter is the slowest thing that happens in one call.
const TIMEOUT: Duration = Duration::from_secs(300);

/// What ended the checks of an engine early.
pub struct Break {
    pub outcome: Outcome,
    pub error: CellError,
    /// The engine said that it does not do this.
    pub refused: bool,
}

pub type Broken = Box<Break>;

fn broken(failure: &Failure, during: &str, stderr_tail: Vec<String>) -> Broken {
    let refused = matches!(failure, Failure::Engine(EngineError::Unsupported { .. }));
    Box::new(Break { outcome: failure.outcome(), error: failure.record(during, stderr_tail), refused })
}

pub struct Session {
    client: Client,
}

impl Session {
    pub fn open(
        command: &WorkerCommand,
        model: &Path,
        quantization: Quantization,
    ) -> Result<(Self, EngineInfo), Broken> {
        let client = Client::start(command, None, TIMEOUT).map_err(|f| broken(&f, "start", Vec::new()))?;
        let mut session = Self { client };
        let hello = session.client.hello();
        let info = session.named("hello", hello)?;
        session.call("load", Load { model: model.to_owned(), quantization })?;
        Ok((session, info))
    }

    pub fn call<C: CallType>(&mut self, during: &str, call: C) -> Result<C::Reply, Broken> {
        let reply = self.client.call(call);
        self.named(during, reply)
    }

    /// The harness's own trouble with a file, or with what an engine wrote.
    pub fn harness<T, E: std::fmt::Display>(&self, during: &str, result: Result<T, E>) -> Result<T, Broken> {
        self.named(during, result.map_err(|e| Failure::Wrong(e.to_string())))
    }

    fn named<T>(&self, during: &str, result: Result<T, Failure>) -> Result<T, Broken> {
        result.map_err(|failure| broken(&failure, during, self.client.stderr_tail()))
    }
}

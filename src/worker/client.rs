//! The harness's side of the protocol: typed calls with a deadline.

use super::agent::{Ask, Envelope, MARK, Tell};
use super::failure::Failure;
use super::process::{Line, Process, Stderr, WorkerCommand};
use super::{host_oom_kills, is_oom_kill};
use crate::interrupt;
use crate::measure::host::Environment;
use crate::measure::watch::{Observations, Observer};
use evalfw_engine::protocol::{Bye, CallType, EngineInfo, Hello, Request, Response, VERSION};
use serde::de::DeserializeOwned;
use std::path::Path;
use std::process::ExitStatus;
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

/// How often a waiting call looks for Ctrl-C.
const POLL: Duration = Duration::from_millis(50);
/// How long a worker may take to end after `bye`, or to be seen as ended after its pipe closed.
const GRACE: Duration = Duration::from_secs(10);
/// How long a launcher may wait for its turn before the worker says hello.
const LAUNCH_TIMEOUT: Duration = Duration::from_secs(3600);

/// A worker, and what is seen of it from outside.
pub struct Client {
    process: Process,
    next_id: u64,
    timeout: Duration,
    oom_kills: Option<u64>,
    witness: Witness,
}

/// Who observes the worker.
enum Witness {
    /// Nobody.
    None,
    /// The harness.
    Here(Box<Observer>),
    /// An agent on the worker's side.
    Agent,
    /// Nobody any more; this was seen.
    Ended(Box<Observations>),
}

impl Client {
    pub fn start(command: &WorkerCommand, log: Option<&Path>, timeout: Duration) -> Result<Self, Failure> {
        let oom_kills = host_oom_kills();
        let process = Process::start(command, Stderr::Kept(log)).map_err(Failure::Start)?;
        let witness = if command.agent { Witness::Agent } else { Witness::None };
        Ok(Self { process, next_id: 1, timeout, oom_kills, witness })
    }

    /// Begins to observe the worker, in a phase called `start`. An agent has done so from the first.
    pub fn observe(&mut self) {
        if matches!(self.witness, Witness::None) {
            self.witness = Witness::Here(Box::new(Observer::start(self.process.pid())));
        }
    }

    /// Ends a phase of what is observed and begins the next.
    pub fn begin_phase(&mut self, name: &str) {
        match &self.witness {
            Witness::Here(observer) => observer.begin_phase(name),
            // If the agent is gone, the next call says so.
            Witness::Agent => drop(self.tell_agent(Ask::BeginPhase(name.to_owned()))),
            Witness::None | Witness::Ended(_) => {}
        }
    }

    /// Ends observing and returns what was seen.
    pub fn observations(&mut self) -> Observations {
        match std::mem::replace(&mut self.witness, Witness::None) {
            Witness::Here(observer) => observer.finish(),
            Witness::Ended(seen) => *seen,
            Witness::None => Observations::default(),
            Witness::Agent => {
                self.witness = Witness::Agent;
                let asked = self.tell_agent(Ask::Observations).and_then(|()| self.agent_line());
                match (asked, &mut self.witness) {
                    (Ok(Tell::Observations(seen)), _) => *seen,
                    // It may have died with the worker, and have told what it saw.
                    (_, Witness::Ended(seen)) => std::mem::take(seen),
                    _ => Observations::default(),
                }
            }
        }
    }

    /// The machine that the worker runs on.
    pub fn environment(&mut self) -> Result<Environment, Failure> {
        if !matches!(self.witness, Witness::Agent) {
            return Ok(Environment::detect());
        }
        self.tell_agent(Ask::Environment)?;
        match self.agent_line()? {
            Tell::Environment(environment) => Ok(*environment),
            other => Err(Failure::Protocol(format!("the agent told {other:?} when asked for its machine"))),
        }
    }

    fn tell_agent(&mut self, ask: Ask) -> Result<(), Failure> {
        let line = serde_json::to_string(&Envelope { agent: ask });
        let line = line.map_err(|e| Failure::Protocol(e.to_string()))?;
        match self.process.send(&line) {
            Ok(()) => Ok(()),
            Err(_) => Err(self.death()),
        }
    }

    pub fn stderr_tail(&self) -> Vec<String> {
        self.process.stderr_tail()
    }

    pub fn hello(&mut self) -> Result<EngineInfo, Failure> {
        let usual = self.timeout;
        if matches!(self.witness, Witness::Agent) {
            self.timeout = usual.max(LAUNCH_TIMEOUT);
        }
        let info = self.call(Hello { protocol: VERSION });
        self.timeout = usual;
        let info = info?;
        match info.protocol {
            VERSION => Ok(info),
            other => Err(Failure::Protocol(format!("it speaks version {other}, evalfw version {VERSION}"))),
        }
    }

    /// Sends one call and waits for its reply.
    pub fn call<C: CallType>(&mut self, call: C) -> Result<C::Reply, Failure> {
        let id = self.next_id;
        self.next_id += 1;
        let request = serde_json::to_string(&Request { id, call: call.into() });
        let request = request.map_err(|e| Failure::Protocol(e.to_string()))?;
        if self.process.send(&request).is_err() {
            return Err(self.death());
        }
        let response = self.response()?;
        if response.id != id {
            return Err(Failure::Protocol(format!(
                "a reply to call {}, while call {id} was open",
                response.id
            )));
        }
        match (response.result, response.error) {
            (Some(result), None) => serde_json::from_value(result)
                .map_err(|e| Failure::Protocol(format!("reply to call {id}: {e}"))),
            (None, Some(error)) => Err(Failure::Engine(error)),
            _ => Err(Failure::Protocol("a reply needs either a result or an error".into())),
        }
    }

    /// Says goodbye and waits until the worker has ended.
    pub fn finish(mut self) -> Result<(), Failure> {
        self.call(Bye {})?;
        match self.process.wait(GRACE) {
            Some(status) if status.success() => Ok(()),
            Some(status) => Err(self.died(Some(status))),
            None => Err(Failure::Timeout(GRACE)),
        }
    }

    fn response(&mut self) -> Result<Response, Failure> {
        let line = self.line()?;
        if matches!(self.witness, Witness::Agent)
            && line.starts_with(MARK)
            && let Ok(Envelope { agent }) = serde_json::from_str::<Envelope<Tell>>(&line)
        {
            return Err(self.told(agent));
        }
        parsed(&line)
    }

    /// The agent's next word.
    fn agent_line(&mut self) -> Result<Tell, Failure> {
        let line = self.line()?;
        let envelope: Envelope<Tell> = parsed(&line)?;
        match envelope.agent {
            died @ Tell::Died { .. } => Err(self.told(died)),
            other => Ok(other),
        }
    }

    /// What the agent said of its own accord: only that the worker died.
    fn told(&mut self, tell: Tell) -> Failure {
        match tell {
            Tell::Died { how, out_of_memory, observations } => {
                self.witness = Witness::Ended(observations.unwrap_or_default());
                Failure::Died { how, out_of_memory }
            }
            other => Failure::Protocol(format!("the agent was not asked for {other:?}")),
        }
    }

    fn line(&mut self) -> Result<String, Failure> {
        let deadline = Instant::now() + self.timeout;
        loop {
            if interrupt::requested() {
                return Err(Failure::Interrupted);
            }
            match self.process.lines().recv_timeout(POLL) {
                // Without its end the line was cut off by the worker's own end.
                Ok(Line::Text(line)) if !line.ends_with('\n') => return Err(self.death()),
                Ok(Line::Text(line)) => return Ok(line),
                Ok(Line::Garbage(what)) => return Err(Failure::Protocol(what)),
                Err(RecvTimeoutError::Timeout) if Instant::now() >= deadline => {
                    return Err(Failure::Timeout(self.timeout));
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Err(self.death()),
            }
        }
    }

    fn death(&mut self) -> Failure {
        let status = self.process.wait(GRACE);
        self.died(status)
    }

    fn died(&self, status: Option<ExitStatus>) -> Failure {
        let how = match status {
            Some(status) => status.to_string(),
            None => "it closed its output but did not end".to_owned(),
        };
        let out_of_memory = is_oom_kill(self.oom_kills, &how);
        Failure::Died { how, out_of_memory }
    }
}

fn parsed<T: DeserializeOwned>(line: &str) -> Result<T, Failure> {
    serde_json::from_str(line).map_err(|e| {
        let shown: String = line.trim_end().chars().take(200).collect();
        Failure::Protocol(format!("{e} in {shown:?}"))
    })
}

//! The harness's side of the protocol: typed calls with a deadline.

use super::failure::Failure;
use super::process::{Line, Process, WorkerCommand};
use crate::interrupt;
use evalfw_engine::protocol::{Bye, CallType, EngineInfo, Hello, Request, Response, VERSION};
use std::path::Path;
use std::process::ExitStatus;
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

/// How often a waiting call looks for Ctrl-C.
const POLL: Duration = Duration::from_millis(50);
/// How long a worker may take to end after `bye`, or to be seen as ended after its pipe closed.
const GRACE: Duration = Duration::from_secs(10);

/// A worker that has said hello.
pub struct Client {
    process: Process,
    next_id: u64,
    timeout: Duration,
    oom_kills: Option<u64>,
}

impl Client {
    pub fn start(command: &WorkerCommand, log: Option<&Path>, timeout: Duration) -> Result<Self, Failure> {
        let oom_kills = oom_kills();
        let process = Process::start(command, log).map_err(Failure::Start)?;
        Ok(Self { process, next_id: 1, timeout, oom_kills })
    }

    pub fn pid(&self) -> u32 {
        self.process.pid()
    }

    pub fn stderr_tail(&self) -> Vec<String> {
        self.process.stderr_tail()
    }

    pub fn hello(&mut self) -> Result<EngineInfo, Failure> {
        let info = self.call(Hello { protocol: VERSION })?;
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
        let deadline = Instant::now() + self.timeout;
        loop {
            if interrupt::requested() {
                return Err(Failure::Interrupted);
            }
            match self.process.lines().recv_timeout(POLL) {
                // Without its end the line was cut off by the worker's own end.
                Ok(Line::Text(line)) if !line.ends_with('\n') => return Err(self.death()),
                Ok(Line::Text(line)) => {
                    return serde_json::from_str(&line).map_err(|e| {
                        let shown: String = line.trim_end().chars().take(200).collect();
                        Failure::Protocol(format!("{e} in {shown:?}"))
                    });
                }
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
        let killed_for_memory = match (self.oom_kills, oom_kills()) {
            (Some(before), Some(now)) => now > before && how.contains("signal: 9"),
            _ => false,
        };
        Failure::Died { how, out_of_memory: killed_for_memory }
    }
}

/// Processes that the kernel has killed for memory since it booted, to tell such an end from a plain kill.
fn oom_kills() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/vmstat").ok()?;
    text.lines().find_map(|l| l.strip_prefix("oom_kill ")?.trim().parse().ok())
}

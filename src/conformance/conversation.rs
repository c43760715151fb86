//! A conversation with a worker in raw lines, so that what a good client never sends can be sent.

use crate::interrupt;
use crate::worker::{Line, Process, Stderr, WorkerCommand};
use evalfw_engine::Error as EngineError;
use evalfw_engine::protocol::{CallType, Request, Response};
use serde_json::{Value, json};
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

/// The longest that a call on the small model may take.
const PATIENCE: Duration = Duration::from_secs(120);
/// How often is looked for Ctrl-C.
const LOOK: Duration = Duration::from_millis(100);
/// How long a worker may take to end.
const GRACE: Duration = Duration::from_secs(10);

/// A rule was broken; what was seen.
pub struct Broke {
    pub seen: String,
}

impl<T: std::fmt::Display> From<T> for Broke {
    fn from(seen: T) -> Self {
        Self { seen: seen.to_string() }
    }
}

pub type Seen = Result<String, Broke>;

/// A worker that was started for one rule. Dropping it ends it with all that it has started.
pub struct Conversation {
    process: Process,
    next_id: u64,
}

impl Conversation {
    pub fn start(command: &WorkerCommand) -> Result<Self, Broke> {
        let process = Process::start(command, Stderr::Kept(None));
        let process =
            process.map_err(|error| format!("{} cannot be started: {error}", command.program.display()))?;
        // Not 1: a worker that counts for itself would hit upon that.
        Ok(Self { process, next_id: 41 })
    }

    /// One call by its types.
    pub fn call<C: CallType>(&mut self, call: C) -> Result<Result<C::Reply, EngineError>, Broke> {
        Ok(self.exchange(call)?.1)
    }

    /// One call that has to succeed.
    pub fn done<C: CallType>(&mut self, call: C) -> Result<C::Reply, Broke> {
        let (method, outcome) = self.exchange(call)?;
        outcome.map_err(|error| format!("{method} failed: {error}").into())
    }

    /// The method's name with the outcome.
    fn exchange<C: CallType>(&mut self, call: C) -> Result<(String, Result<C::Reply, EngineError>), Broke> {
        let request = serde_json::to_value(Request { id: self.next_id, call: call.into() })?;
        let method = request["method"].as_str().unwrap_or_default().to_owned();
        let outcome = match self.send(&request)? {
            Ok(result) => {
                let reply = serde_json::from_value(result);
                Ok(reply.map_err(|error| format!("the reply to {method}: {error}"))?)
            }
            Err(error) => Err(error),
        };
        Ok((method, outcome))
    }

    /// One call by its name.
    pub fn named(&mut self, method: &str, params: Value) -> Result<Result<Value, EngineError>, Broke> {
        self.send(&json!({"id": self.next_id, "method": method, "params": params}))
    }

    /// A line as it is; returns the id and the outcome of the reply.
    pub fn line(&mut self, line: &str) -> Result<(u64, Result<Value, EngineError>), Broke> {
        self.process.send(line).map_err(|_| self.end())?;
        let text = match self.next_line() {
            Ok(Line::Text(text)) if text.ends_with('\n') => text,
            Ok(Line::Text(text)) => return Err(format!("a line without an end: {}", shown(&text)).into()),
            Ok(Line::Garbage(what)) => return Err(what.into()),
            Err(RecvTimeoutError::Timeout) => {
                return Err(format!("no reply within {} s", PATIENCE.as_secs()).into());
            }
            Err(RecvTimeoutError::Disconnected) => return Err(self.end()),
        };
        let response: Response = serde_json::from_str(&text).map_err(|error| {
            format!("on standard output, which is the protocol's: {} ({error})", shown(&text))
        })?;
        match (response.result, response.error) {
            (Some(result), None) => Ok((response.id, Ok(result))),
            (None, Some(error)) => Ok((response.id, Err(error))),
            _ => Err("a reply with both or neither of `result` and `error`".into()),
        }
    }

    /// Waits for as long as a call may take, or until Ctrl-C.
    fn next_line(&self) -> Result<Line, RecvTimeoutError> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.process.lines().recv_timeout(LOOK) {
                Err(RecvTimeoutError::Timeout) if Instant::now() < deadline && !interrupt::requested() => {}
                seen => return seen,
            }
        }
    }

    fn send(&mut self, request: &Value) -> Result<Result<Value, EngineError>, Broke> {
        let id = self.next_id;
        self.next_id += 1;
        let (replied, outcome) = self.line(&request.to_string())?;
        match replied == id {
            true => Ok(outcome),
            false => Err(format!("the reply to call {id} has the id {replied}").into()),
        }
    }

    /// Whether it ends with success.
    pub fn ends(&mut self) -> Seen {
        match self.process.wait(GRACE) {
            Some(status) if status.success() => Ok(String::new()),
            Some(status) => Err(format!("it ended with {status}{}", self.last_words()).into()),
            None => Err(format!("it still runs after {} s", GRACE.as_secs()).into()),
        }
    }

    pub fn close(&mut self) {
        self.process.close();
    }

    fn end(&mut self) -> Broke {
        let how =
            self.process.wait(GRACE).map_or("it closed its output".to_owned(), |status| status.to_string());
        format!("it ended instead of replying ({how}){}", self.last_words()).into()
    }

    fn last_words(&self) -> String {
        self.process.stderr_tail().last().map_or_else(String::new, |line| format!("; its last words: {line}"))
    }
}

fn shown(text: &str) -> String {
    let start: String = text.trim_end().chars().take(120).collect();
    format!("{start:?}")
}

/// Requires an error of this kind that says all of the words.
pub fn refused(outcome: Result<Value, EngineError>, kind: &str, words: &[&str]) -> Seen {
    let error = match outcome {
        Ok(result) => return Err(format!("it was done: {}", shown(&result.to_string())).into()),
        Err(error) => error,
    };
    let said = serde_json::to_value(&error)?;
    if said["kind"] != kind {
        return Err(format!("an error of kind {}, and not `{kind}`: {error}", said["kind"]).into());
    }
    let message = error.to_string();
    match words.iter().find(|word| !message.contains(**word)) {
        Some(word) => Err(format!("the message does not name {word}: {message}").into()),
        None => Ok(message),
    }
}

//! Whether a command speaks the worker protocol, rule by rule: what is missing, and where the protocol says so.

mod conversation;
mod rules;

use crate::verify::reference::Reference;
use crate::verify::{Scope, Verdict, verify};
use crate::worker::WorkerCommand;
use anyhow::Result;
use conversation::Broke;
use evalfw_engine::protocol::EngineInfo;
use rules::{RULES, Subject};
use serde::Serialize;

/// What came of one rule.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Finding {
    /// The section of backends/PROTOCOL.md.
    pub section: &'static str,
    pub rule: &'static str,
    pub held: bool,
    /// What was seen, where that says more than the rule.
    pub seen: String,
}

#[derive(Debug, Serialize)]
pub struct Conformance {
    pub engine: Option<EngineInfo>,
    pub findings: Vec<Finding>,
    /// Optional calls that the engine does not have.
    pub without: Vec<&'static str>,
    /// The numbers against the reference; `None` if the rules do not hold.
    pub numbers: Option<Verdict>,
}

impl Conformance {
    pub fn holds(&self) -> bool {
        self.findings.iter().all(|finding| finding.held) && self.numbers.as_ref().is_some_and(Verdict::passed)
    }
}

/// Tries every rule, each in a worker of its own, and then the numbers.
pub fn check(command: &WorkerCommand, progress: &mut dyn FnMut(&str)) -> Result<Conformance> {
    let reference = Reference::built_in()?;
    let subject = Subject::new(command, &reference)?;
    let mut conformance =
        Conformance { engine: None, findings: Vec::new(), without: Vec::new(), numbers: None };
    for rule in RULES {
        progress(rule.title);
        let outcome = (rule.tried)(&subject, &mut conformance);
        let held = outcome.is_ok();
        let seen = match outcome {
            Ok(seen) => seen,
            Err(Broke { seen }) => seen,
        };
        conformance.findings.push(Finding { section: rule.section, rule: rule.title, held, seen });
        // Without a hello there is nothing to try.
        if conformance.engine.is_none() {
            return Ok(conformance);
        }
    }
    if conformance.findings.iter().all(|finding| finding.held) {
        progress("the numbers against the reference");
        let name = conformance.engine.as_ref().map_or("", |info| info.engine.as_str());
        conformance.numbers = Some(verify(name, command, &reference, Scope::Short));
    }
    Ok(conformance)
}

//! Whether a command speaks the worker protocol, rule by rule: what is missing, and where the protocol says so.

mod conversation;
mod rules;

use crate::interrupt;
use crate::verify::reference::Reference;
use crate::verify::{Scope, Verdict, verify};
use crate::worker::WorkerCommand;
use anyhow::Result;
use conversation::Broke;
use evalfw_engine::protocol::EngineInfo;
use rules::{LOAD, RULES, Subject};
use serde::Serialize;

/// What came of one rule.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Finding {
    /// The section of backends/PROTOCOL.md.
    pub section: &'static str,
    pub rule: &'static str,
    pub held: bool,
    /// Not, where it needs what the engine has not.
    pub tried: bool,
    /// What was seen, where that says more than the rule.
    pub seen: String,
}

#[derive(Debug, Serialize)]
pub struct Conformance {
    pub engine: Option<EngineInfo>,
    /// Why it cannot run here, by its own word.
    pub unavailable: Option<String>,
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
    let mut conformance = Conformance {
        engine: None,
        unavailable: None,
        findings: Vec::new(),
        without: Vec::new(),
        numbers: None,
    };
    let mut loads = true;
    for rule in RULES {
        let tried = loads || !rule.needs_load;
        let outcome = match tried {
            true => {
                progress(rule.title);
                (rule.tried)(&subject, &mut conformance)
            }
            false => Err(Broke::from("not tried: it needs `load`")),
        };
        let held = outcome.is_ok();
        let seen = match outcome {
            Ok(seen) => seen,
            Err(Broke { seen }) => seen,
        };
        loads &= held || rule.section != LOAD;
        conformance.findings.push(Finding { section: rule.section, rule: rule.title, held, tried, seen });
        // Without a hello there is nothing to try.
        if conformance.engine.is_none() || interrupt::requested() {
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

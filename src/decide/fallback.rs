//! What to take on each hardware that the decision is for, as far as the record knows it.

use super::criteria::Target;
use super::jobs::is_software_adapter;
use super::ranking::Ranking;
use crate::record::{CellRecord, Outcome};
use serde::Serialize;

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TargetVerdict {
    pub title: String,
    /// Whether the record has cells from such hardware.
    pub is_measured: bool,
    /// The best of those that were measured there.
    pub best: Option<String>,
    pub preferred: String,
    /// What the record says against it.
    pub against_preferred: Option<String>,
    /// Of the engines that can run there, the preferred one first.
    pub engines: Vec<TargetEngine>,
    /// What measures them there.
    pub command: String,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TargetEngine {
    pub engine: String,
    /// Why it has no figures of this hardware; `None` if it has.
    pub missing: Option<String>,
}

pub fn verdicts(cells: &[CellRecord], ranking: Option<&Ranking>, targets: &[Target]) -> Vec<TargetVerdict> {
    targets.iter().map(|target| verdict(cells, ranking, target)).collect()
}

fn verdict(cells: &[CellRecord], ranking: Option<&Ranking>, target: &Target) -> TargetVerdict {
    let mut names = vec![target.preferred.as_str()];
    names.extend(target.engines.iter().map(String::as_str).filter(|name| *name != target.preferred));
    let of =
        |engine: &&str| TargetEngine { engine: engine.to_string(), missing: missing(cells, engine, target) };
    let engines: Vec<TargetEngine> = names.iter().map(of).collect();
    let there: Vec<&str> =
        engines.iter().filter(|e| e.missing.is_none()).map(|e| e.engine.as_str()).collect();
    let best = ranking.and_then(|r| r.best_of(&there)).map(|candidate| candidate.engine.clone());
    TargetVerdict {
        title: target.title.clone(),
        is_measured: !there.is_empty(),
        against_preferred: ranking
            .filter(|_| there.contains(&target.preferred.as_str()))
            .and_then(|ranking| against(ranking, &target.preferred, best.as_deref())),
        best,
        preferred: target.preferred.clone(),
        engines,
        command: target.command.clone(),
    }
}

/// Of an engine that was measured there.
fn against(ranking: &Ranking, preferred: &str, best: Option<&str>) -> Option<String> {
    if let Some(out) = ranking.knocked_out.iter().find(|e| e.engine == preferred) {
        let reasons: Vec<&str> = out.reasons.iter().map(|reason| reason.title).collect();
        return Some(format!("knocked out: {}", reasons.join(", ")));
    }
    best.filter(|best| *best != preferred).map(|_| "measured, and not the best there".to_owned())
}

fn missing(cells: &[CellRecord], engine: &str, target: &Target) -> Option<String> {
    let own: Vec<&CellRecord> = cells.iter().filter(|cell| cell.engine == engine).collect();
    if own.iter().any(|cell| is_of(cell, target)) {
        return None;
    }
    if is_software_adapter(cells, engine) {
        return Some("here it ran on a software adapter".to_owned());
    }
    if own.iter().any(|cell| cell.outcome == Outcome::Ok) {
        return Some("here it ran on other hardware".to_owned());
    }
    let told = own.iter().find_map(|cell| cell.error.as_ref()).map(|error| error.message.clone());
    Some(told.unwrap_or_else(|| "it was not run".to_owned()))
}

fn is_of(cell: &CellRecord, target: &Target) -> bool {
    let on_device = cell.device.as_ref().is_some_and(|d| d.kind == target.device && !d.software);
    let on_system = target.system.as_ref().is_none_or(|system| cell.environment.os.contains(system.as_str()));
    cell.outcome == Outcome::Ok && on_device && on_system
}

//! What stands beside the decision: speed, memory, and who is dominated or knocked out.

use super::format::{gb, list, markdown, plain, significant};
use super::prose::{knocked_out, lower};
use crate::decide::Decision;
use crate::decide::metric::Metric;
use crate::decide::ranking::{Candidate, Dominated, EngineSpeed, Ranking};
use crate::measure::metrics::LOAD_PHASE;

/// Speed and memory of the candidates, and who is dominated.
pub fn beside(ranking: &Ranking, decision: &Decision) -> String {
    let mut sentences = Vec::new();
    sentences.extend(speed(ranking));
    sentences.extend(peaks(ranking, decision));
    sentences.extend(dominated_by_whom(ranking));
    if !ranking.candidates.is_empty() && !ranking.knocked_out.is_empty() {
        sentences.push(format!("Knocked out: {}.", knocked_out(ranking)));
    }
    sentences.join(" ")
}

/// The fastest of the frameworks against each of the others.
fn speed(ranking: &Ranking) -> Option<String> {
    let speed = ranking.speed.as_ref()?;
    let is_finalist = |e: &&EngineSpeed| ranking.finalists.contains(&e.engine);
    let finalists: Vec<&EngineSpeed> = speed.engines.iter().filter(is_finalist).collect();
    let [fastest, others @ ..] = finalists.as_slice() else { return None };
    let against = |other: &&EngineSpeed| {
        format!(
            "{} times as fast as {} ({} tokens/s)",
            significant(fastest.real_tokens.median / other.real_tokens.median),
            markdown(&other.engine),
            significant(other.real_tokens.median)
        )
    };
    let mut text = format!(
        "In {}, {} trains {} tokens/s",
        markdown(&speed.scenario),
        markdown(&fastest.engine),
        significant(fastest.real_tokens.median)
    );
    if !others.is_empty() {
        text += &format!(": {}", list(&others.iter().map(against).collect::<Vec<_>>()));
    }
    text.push('.');
    let handicapped: Vec<String> =
        finalists.iter().filter(|e| e.has_caveats).map(|e| markdown(&e.engine)).collect();
    if !handicapped.is_empty() {
        text += &format!(" Handicaps on this machine are named in the sections of {}.", list(&handicapped));
    }
    Some(text)
}

fn peaks(ranking: &Ranking, decision: &Decision) -> Option<String> {
    let peak = |c: &Candidate| {
        let peak = c.scores.iter().find_map(|s| s.metric(Metric::PeakTrainingMemoryGb))?;
        let when = if c.training_peak_in.as_deref() == Some(LOAD_PHASE) { " (while loading)" } else { "" };
        Some(format!("{} {} GB{when}", markdown(&c.engine), gb(peak.value * 1e9)))
    };
    let peaks: Vec<String> = ranking.candidates.iter().filter_map(peak).collect();
    let target = plain(decision.memory_target_bytes as f64 / 1e9);
    (!peaks.is_empty()).then(|| {
        format!("Peak memory of a training run from loading to saving, of {target} GB: {}.", list(&peaks))
    })
}

/// In short; the matrix tells in what.
fn dominated_by_whom(ranking: &Ranking) -> Option<String> {
    let one = |d: &Dominated| format!("{} by {}", markdown(&d.engine), markdown(&d.by));
    let all: Vec<String> = ranking.dominated.iter().map(one).collect();
    (!all.is_empty())
        .then(|| format!("Dominated (in nothing better, and worse in something): {}.", list(&all)))
}

pub fn dominated(d: &Dominated) -> String {
    let worse: Vec<String> = d.worse_in.iter().map(|w| lower(w)).collect();
    let speeds: Vec<String> = d.speeds.iter().map(|s| s.to_string()).collect();
    let and_speeds = match speeds.as_slice() {
        [] => String::new(),
        speeds => format!(" and in {} speed", list(speeds)),
    };
    format!(
        "{} is dominated by {}: it is nowhere better in the measured criteria{and_speeds}, and worse in {}.",
        markdown(&d.engine),
        markdown(&d.by),
        list(&worse)
    )
}

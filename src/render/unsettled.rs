//! What the decision does not settle, one sentence each.

use super::facts::Facts;
use super::format::{list, markdown, parameters, plain};
use super::prose::{fewest_steps, lower};
use crate::decide::Decision;
use crate::decide::criteria::Criteria;
use crate::decide::ranking::{Candidate, Ranking};
use crate::engines::stock_form;
use std::cmp::Ordering;

/// What the decision does not cover, one sentence each.
pub fn unsettled(decision: &Decision, facts: &Facts, criteria: &Criteria) -> Vec<String> {
    let ranking = decision.headline();
    let mut limits = Vec::new();
    if facts.models.iter().all(|m| m.synthetic) {
        limits.push("The weights are random: speed and memory hold, text quality was not judged.".to_owned());
    }
    if facts.ok_cells > 0 && facts.all_on_cpu() {
        limits.push(
            "Everything ran on the CPU. Nothing here says how the engines compare on a GPU.".to_owned(),
        );
    }
    if let Some(ranking) = ranking.filter(|r| r.parameters > 0 && decision.rankings.len() == 1) {
        limits.push(format!(
            "One model size was compared ({} parameters). Whether a larger one fits is open.",
            parameters(ranking.parameters)
        ));
    }
    if let Some(speed) = ranking.and_then(|r| r.speed.as_ref()) {
        limits.push(format!(
            "Rows of training had {} tokens. Longer ones take more memory, and shift speeds.",
            speed.sequence_length
        ));
    }
    if let Some(steps) = ranking.filter(|r| r.speed.is_some()).map(fewest_steps) {
        let speeds = ranking.iter().flat_map(|r| &r.speed).flat_map(|s| &s.engines);
        let processes = speeds.map(|e| e.processes).min().unwrap_or(0);
        limits.push(format!(
            "The training speed of each engine is a median over at least {steps} steps in {processes} {}: the draws \
             vary it as far as those did.",
            if processes == 1 { "process" } else { "processes" }
        ));
    }
    limits.extend(ranking.and_then(|ranking| without_difference(ranking, criteria)));
    limits.extend(ranking.and_then(kernels));
    if !decision.software_adapters.is_empty() && ranking.is_some() {
        let names: Vec<String> = decision.software_adapters.iter().map(|e| markdown(e)).collect();
        limits.push(format!("Not compared, because it ran on a software adapter: {}.", list(&names)));
    }
    if !decision.stock_forms.is_empty() {
        let names: Vec<String> = decision.stock_forms.iter().map(|e| markdown(e)).collect();
        limits.push(format!("Not ranked beside its tuned form: {}.", list(&names)));
    }
    if facts.builds.len() > 1 {
        limits.push("The cells come from different builds of evalfw.".to_owned());
    }
    if facts.builds.iter().any(|b| b.commit.as_ref().is_some_and(|c| c.ends_with("-dirty"))) {
        limits.push("The build had changes that are in no commit.".to_owned());
    }
    match facts.cells - facts.ok_cells - facts.unavailable_cells {
        0 => {}
        1 => limits.push(format!("1 of {} cells ran and did not end ok.", facts.cells)),
        n => limits.push(format!("{n} of {} cells ran and did not end ok.", facts.cells)),
    }
    limits
}

/// The criteria in which all finalists score alike.
fn without_difference(ranking: &Ranking, criteria: &Criteria) -> Option<String> {
    let finalists: Vec<&Candidate> =
        ranking.finalists.iter().filter_map(|engine| ranking.candidate(engine)).collect();
    let [first, others @ ..] = finalists.as_slice() else { return None };
    let is_alike = |index: &usize| {
        let equal = |c: &&Candidate| first.scores[*index].compare(&c.scores[*index]) == Some(Ordering::Equal);
        !others.is_empty() && others.iter().all(equal)
    };
    let alike: Vec<usize> = (0..criteria.criteria.len()).filter(is_alike).collect();
    let weight: f64 = alike.iter().map(|index| criteria.criteria[*index].weight).sum();
    let titles: Vec<String> =
        alike.iter().map(|index| markdown(&lower(&criteria.criteria[*index].title))).collect();
    (!titles.is_empty()).then(|| {
        format!(
            "All score alike in {}: {} % of the weight does not tell the frameworks apart.",
            list(&titles),
            plain(weight)
        )
    })
}

/// Which candidates run kernels of this project.
fn kernels(ranking: &Ranking) -> Option<String> {
    let is_tuned = |c: &&Candidate| stock_form(&c.engine).is_some_and(|form| form != c.engine);
    let tuned: Vec<String> =
        ranking.candidates.iter().filter(is_tuned).map(|c| markdown(&c.engine)).collect();
    (!tuned.is_empty()).then(|| {
        format!(
            "Kernels of this project, beside those that the frameworks ship, are in {}: their figures tell what the \
             frameworks can be made to do. `evalfw run --suite stock` measures what all of them do without.",
            list(&tuned)
        )
    })
}

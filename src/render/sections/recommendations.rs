//! What to do next, as commands.

use super::LARGE;
use crate::decide::Decision;
use crate::decide::ranking::Verdict;
use crate::record::CellRecord;
use serde::Serialize;

#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Recommendation {
    pub purpose: String,
    pub command: String,
}

pub fn recommendations(cells: &[CellRecord], decision: &Decision) -> Vec<Recommendation> {
    let mut all = Vec::new();
    let mut add = |purpose: &str, command: String| {
        all.push(Recommendation { purpose: purpose.to_owned(), command });
    };
    if let Some(engine) = decision.headline().and_then(|ranking| ranking.first()) {
        let adopted = cells.iter().filter(|c| c.engine == engine).find_map(|c| c.adoption.as_ref());
        for command in adopted.iter().flat_map(|facts| &facts.commands) {
            add("install it and see it run", command.clone());
        }
        add("hold it against the reference in full", format!("evalfw verify --engine {engine}"));
        if cells.iter().any(|cell| cell.model.synthetic) {
            let model = "Qwen/Qwen2.5-Coder-0.5B-Instruct";
            let command = format!("evalfw run --engine {engine} --model {model}");
            add("the same on the real weights, which also tells what it learns", command);
        }
        let is_large = |cell: &&CellRecord| cell.model.parameters > LARGE;
        if !cells.iter().any(|cell| is_large(&cell)) {
            let command = format!("evalfw run --engine {engine} --suite large");
            add("the largest model that has to fit", command);
        }
    }
    let close = matches!(decision.headline().map(|r| &r.verdict), Some(Verdict::NoClearWinner { .. }));
    if close {
        add("more processes, which make the figures surer", "evalfw run --all --repetitions 6".to_owned());
    }
    if cells.iter().any(|cell| cell.outcome == crate::record::Outcome::Ok && cell.limits.is_none()) {
        add("with the machine's limits, by which speeds are scored", "evalfw run --all".to_owned());
    }
    for target in decision.targets.iter().filter(|target| !target.is_measured) {
        add(&format!("on the {}, to settle it there", target.title), target.command.clone());
    }
    if decision.targets.iter().any(|target| !target.is_measured) {
        let command = "evalfw merge here=results/RUN there=results/OTHER --out results/all".to_owned();
        add("one report of several machines", command);
    }
    all
}

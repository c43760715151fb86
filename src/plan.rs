//! Which cells are run, in which order.

use crate::scenario::{Scenario, Suite};
use evalfw_engine::protocol::Quantization;
use std::collections::BTreeMap;

/// One cell to run.
#[derive(Debug, Clone, PartialEq)]
pub struct Cell {
    pub engine: String,
    /// Index into the run's models.
    pub model: usize,
    pub scenario: Scenario,
    pub repetition: u32,
    pub seed: u64,
}

impl Cell {
    /// The cell's name in the record, unique within the run.
    pub fn id(&self, model_name: &str) -> String {
        let quantization = quantization_name(self.scenario.quantization());
        format!("{}/{model_name}/{}/{quantization}/{}", self.engine, self.scenario.label(), self.repetition)
    }
}

pub fn quantization_name(quantization: Quantization) -> &'static str {
    match quantization {
        Quantization::None => "none",
        Quantization::Nf4 => "nf4",
    }
}

/// Orders the cells so that a slow drift of the machine hits all engines alike: each repetition goes
/// through all engines, in turn from the front and from the back (A B B A). A scenario that brings its
/// own model finds it in `own_models`.
pub fn interleaved(
    suite: &Suite,
    engines: &[(String, usize)],
    own_models: &BTreeMap<String, usize>,
) -> Vec<Cell> {
    let rounds = suite.cells.iter().map(|c| c.repetitions).max().unwrap_or(0);
    let mut cells = Vec::new();
    for repetition in 0..rounds {
        for cell in suite.cells.iter().filter(|c| c.repetitions > repetition) {
            let mut round: Vec<_> = engines.iter().collect();
            if repetition % 2 == 1 {
                round.reverse();
            }
            let own_model = cell.scenario.own_model().and_then(|name| own_models.get(name));
            cells.extend(round.into_iter().map(|(engine, model)| Cell {
                engine: engine.clone(),
                model: *own_model.unwrap_or(model),
                scenario: cell.scenario.clone(),
                repetition,
                seed: suite.seed,
            }));
        }
    }
    cells
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scenario::Library;

    #[test]
    fn engines_take_turns_from_both_ends() {
        let mut suite = Library::built_in().suite("quick", Some(&["load".into()])).unwrap();
        suite.cells[0].repetitions = 3;
        let cells = interleaved(&suite, &[("a".into(), 0), ("b".into(), 1)], &BTreeMap::new());
        let order: Vec<_> = cells.iter().map(|c| format!("{}{}", c.engine, c.repetition)).collect();
        assert_eq!(order, ["a0", "b0", "b1", "a1", "a2", "b2"]);
        assert!(cells.iter().all(|c| (c.engine == "b") == (c.model == 1)));
    }
}

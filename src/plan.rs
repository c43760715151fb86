//! Which cells are run, in which order.

use crate::engines::stock_form;
use crate::scenario::{CellKernels, Scenario, Suite};
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
        Quantization::Native => "native",
    }
}

/// Orders the cells so that a slow drift of the machine hits all engines alike: each repetition goes
/// through all engines, in turn from the front and from the back (A B B A). `engines` are those that can run,
/// of the ones that were `selected` and their stock forms. A scenario that brings its own model finds it in
/// `own_models`.
pub fn interleaved(
    suite: &Suite,
    selected: &[String],
    engines: &[(String, usize)],
    own_models: &BTreeMap<String, usize>,
) -> Vec<Cell> {
    let rounds = suite.cells.iter().map(|c| c.repetitions).max().unwrap_or(0);
    let mut cells = Vec::new();
    for repetition in 0..rounds {
        for cell in suite.cells.iter().filter(|c| c.repetitions > repetition) {
            let taking = taking(cell.kernels, selected);
            let mut round: Vec<_> = engines.iter().filter(|(engine, _)| taking.contains(engine)).collect();
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
    // A stock form that was named takes cells of both kinds, which are then the same.
    let mut distinct: Vec<Cell> = Vec::new();
    for cell in cells {
        if !distinct.contains(&cell) {
            distinct.push(cell);
        }
    }
    distinct
}

/// All engines that the suite's cells go to, in the order in which they were selected.
pub fn engines_of(suite: &Suite, selected: &[String]) -> Vec<String> {
    let mut all = Vec::new();
    for kernels in [CellKernels::Custom, CellKernels::Stock] {
        if suite.cells.iter().any(|c| c.kernels == kernels) {
            let missing: Vec<_> =
                taking(kernels, selected).into_iter().filter(|e| !all.contains(e)).collect();
            all.extend(missing);
        }
    }
    all
}

/// The engines that take a cell with these kernels.
fn taking(kernels: CellKernels, selected: &[String]) -> Vec<String> {
    match kernels {
        CellKernels::Custom => selected.to_vec(),
        CellKernels::Stock => {
            let mut forms: Vec<String> = Vec::new();
            for form in selected.iter().filter_map(|engine| stock_form(engine)) {
                if !forms.iter().any(|known| known == form) {
                    forms.push(form.to_owned());
                }
            }
            forms
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scenario::{Library, SuiteCell};

    #[test]
    fn engines_take_turns_from_both_ends() {
        let mut suite = Library::built_in().suite("quick", Some(&["load".into()])).unwrap();
        suite.cells[0].repetitions = 3;
        let selected = ["a".to_owned(), "b".to_owned()];
        let cells = interleaved(&suite, &selected, &[("a".into(), 0), ("b".into(), 1)], &BTreeMap::new());
        let order: Vec<_> = cells.iter().map(|c| format!("{}{}", c.engine, c.repetition)).collect();
        assert_eq!(order, ["a0", "b0", "b1", "a1", "a2", "b2"]);
        assert!(cells.iter().all(|c| (c.engine == "b") == (c.model == 1)));
    }

    #[test]
    fn a_stock_cell_goes_to_the_stock_forms_once() {
        let mut suite = Library::built_in().suite("quick", Some(&["load".into()])).unwrap();
        let stock = SuiteCell { kernels: CellKernels::Stock, ..suite.cells[0].clone() };
        suite.cells.push(stock);
        let selected = ["candle-cpu".to_owned(), "candle-cpu-bf16".to_owned(), "burn-flex".to_owned()];
        let engines = engines_of(&suite, &selected);
        assert_eq!(engines, ["candle-cpu", "candle-cpu-bf16", "burn-flex", "candle-cpu-stock"]);
        let engines: Vec<_> = engines.into_iter().map(|e| (e, 0)).collect();
        let cells = interleaved(&suite, &selected, &engines, &BTreeMap::new());
        assert_eq!(
            cells.iter().map(|c| c.engine.clone()).collect::<Vec<_>>(),
            engines.iter().map(|e| e.0.clone()).collect::<Vec<_>>()
        );
        // A stock form that was named takes the other cells as well, each of them once.
        let named = ["candle-cpu-stock".to_owned()];
        let cells = interleaved(&suite, &named, &[("candle-cpu-stock".into(), 0)], &BTreeMap::new());
        assert_eq!(cells.len(), 1);
    }
}

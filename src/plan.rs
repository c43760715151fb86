//! Which cells are run, in which order.

use crate::engines::stock_form_in_suites;
use crate::scenario::{CellKernels, Scenario, Suite, SuiteCell};
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
        for (index, cell) in suite.cells.iter().enumerate().filter(|(_, c)| c.repetitions > repetition) {
            let takes = |c: &SuiteCell, engine: &String| taking(suite, c.kernels, selected).contains(engine);
            // A stock form that was named takes cells of both kinds. Of two with one name, which may differ in
            // parameters that are not in it, it takes the first.
            let has_taken = |engine: &String| {
                suite.cells[..index].iter().any(|c| c.has_name_of(cell) && takes(c, engine))
            };
            let mut round: Vec<_> =
                engines.iter().filter(|(engine, _)| takes(cell, engine) && !has_taken(engine)).collect();
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

/// All engines that the suite's cells go to, in the order in which they were selected.
pub fn engines_of(suite: &Suite, selected: &[String]) -> Vec<String> {
    let mut all = Vec::new();
    for kernels in [CellKernels::Custom, CellKernels::Stock] {
        if suite.cells.iter().any(|c| c.kernels == kernels) {
            let missing: Vec<_> =
                taking(suite, kernels, selected).into_iter().filter(|e| !all.contains(e)).collect();
            all.extend(missing);
        }
    }
    all
}

/// The engines that take a cell with these kernels.
fn taking(suite: &Suite, kernels: CellKernels, selected: &[String]) -> Vec<String> {
    match kernels {
        CellKernels::Custom => selected.to_vec(),
        CellKernels::Stock => {
            let mut forms: Vec<String> = Vec::new();
            for form in
                selected.iter().filter_map(|engine| stock_form_in_suites(engine, suite.all_stock_forms))
            {
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
    use crate::engines::tuned;
    use crate::scenario::Library;
    use std::collections::BTreeSet;

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
    }

    #[test]
    fn a_stock_form_that_is_left_out_runs_where_it_is_named() {
        let suite = Library::built_in().suite("default", None).unwrap();
        let engines = |selected: &[&str]| {
            engines_of(&suite, &selected.iter().map(|&name| name.to_owned()).collect::<Vec<_>>())
        };
        assert_eq!(engines(&["burn-flex"]), ["burn-flex"]);
        assert_eq!(engines(&["burn-flex", "burn-flex-stock"]), ["burn-flex", "burn-flex-stock"]);
    }

    #[test]
    fn the_suite_of_stock_forms_leaves_none_out_and_gives_each_a_job_that_it_can_do() {
        let suite = Library::built_in().suite("stock", None).unwrap();
        let selected: Vec<String> = tuned().map(|engine| engine.name.to_owned()).collect();
        let engines = engines_of(&suite, &selected);
        for stock in ["burn-flex-stock", "burn-wgpu-stock", "candle-cpu-stock"] {
            assert!(engines.iter().any(|engine| engine == stock), "{stock} is not in {engines:?}");
        }
        for cell in suite.cells.iter().filter(|c| c.kernels == CellKernels::Stock) {
            let scenario = &cell.scenario;
            assert_ne!(scenario.quantization(), Quantization::Nf4, "Burn has none: {scenario:?}");
            assert!(scenario.training().is_none_or(|t| t.lora_dropout == 0.0), "{scenario:?}");
            // Beside it stands a job of the same name in the tuned form.
            let beside =
                |c: &&SuiteCell| c.kernels == CellKernels::Custom && c.scenario.label() == scenario.label();
            assert!(suite.cells.iter().any(|c| beside(&c)), "{scenario:?}");
        }
    }

    #[test]
    fn a_stock_form_that_was_named_takes_one_cell_of_each_name() {
        let suite = Library::built_in().suite("default", None).unwrap();
        let steps = |cell: &Cell| cell.scenario.training().map(|s| (s.warmup_steps, s.steps));
        for named in [vec!["candle-cpu-stock"], vec!["candle-cpu", "candle-cpu-stock"]] {
            let selected: Vec<String> = named.into_iter().map(str::to_owned).collect();
            let engines: Vec<_> = engines_of(&suite, &selected).into_iter().map(|e| (e, 0)).collect();
            let cells = interleaved(&suite, &selected, &engines, &BTreeMap::new());
            let ids: BTreeSet<String> = cells.iter().map(|c| c.id("m")).collect();
            assert_eq!(ids.len(), cells.len(), "two cells of one name: {ids:?}");
            // It trains as the tuned engines do, in both repetitions.
            let trained = cells.iter().filter(|c| c.scenario.kind() == "train");
            assert!(trained.clone().all(|c| steps(c) == Some((1, 3))), "{cells:?}");
            assert_eq!(trained.filter(|c| c.engine == "candle-cpu-stock").count(), 2);
            // The format that only the cells of stock kernels ask for is there as well.
            assert!(
                ids.iter().any(|id| id.starts_with("candle-cpu-stock/") && id.contains("/native/")),
                "{ids:?}"
            );
        }
    }
}

//! What kernels of our own add to a framework: each engine beside its stock form, which runs nothing but what the
//! framework ships.

use super::trace::{CellRef, Lines};
use crate::decide::figures::{Footprint, InferFigures, Spread, TrainFigures};
use crate::decide::jobs::{Job, arrange, compared, models};
use crate::engines::is_stock_form_of;
use crate::record::{CellRecord, ModelRecord};
use evalfw_engine::protocol::Quantization;
use serde::Serialize;

/// Of the rows about training speed.
pub const TRAINING: &str = "slot tokens/s";

/// One figure of a job on both.
#[derive(Debug, Clone, Serialize)]
pub struct StockRow {
    pub engine: String,
    pub stock_engine: String,
    pub job: String,
    /// How each stores the base.
    pub stock_base: Quantization,
    pub tuned_base: Quantization,
    /// E.g. `slot tokens/s`.
    pub figure: &'static str,
    pub stock: Spread,
    pub tuned: Spread,
    /// Tuned over stock, of the medians.
    pub ratio: f64,
    pub cells: Vec<CellRef>,
}

/// Of all models, without references to lines.
pub fn of_cells(cells: &[CellRecord]) -> Vec<StockRow> {
    let jobs = compared(&arrange(cells));
    let of_model = |model: &ModelRecord| {
        let own: Vec<&Job> = jobs.iter().filter(|job| job.model.name == model.name).collect();
        stock_rows(&own, &Lines::default())
    };
    models(&jobs).into_iter().flat_map(of_model).collect()
}

/// `jobs` are of one model.
pub fn stock_rows(jobs: &[&Job], lines: &Lines) -> Vec<StockRow> {
    let mut rows = Vec::new();
    for stock in jobs {
        let is_tuned = |job: &&&Job| is_stock_form_of(stock.engine, job.engine);
        for tuned in jobs.iter().filter(is_tuned) {
            let same_base = tuned.quantization == stock.quantization;
            if tuned.scenario == stock.scenario && (same_base || four_bits_each(tuned, stock, jobs)) {
                rows.extend(compare(tuned, stock, lines));
            }
        }
    }
    rows
}

/// Whether each did the job on the only format of 4 bits that it has: NF4, and the framework's own.
fn four_bits_each(tuned: &Job, stock: &Job, jobs: &[&Job]) -> bool {
    let measured = |engine: &str, quantization| {
        jobs.iter().any(|job| {
            job.engine == engine
                && job.scenario == stock.scenario
                && job.quantization == quantization
                && job.ok().next().is_some()
        })
    };
    let forms = (tuned.quantization, stock.quantization);
    forms == (Quantization::Nf4, Quantization::Native)
        && !measured(tuned.engine, Quantization::Native)
        && !measured(stock.engine, Quantization::Nf4)
}

/// Of two that did the same job.
fn compare(tuned: &Job, stock: &Job, lines: &Lines) -> Vec<StockRow> {
    let cells: Vec<CellRef> = tuned.ok().chain(stock.ok()).map(|cell| lines.refer(cell)).collect();
    figures(tuned)
        .into_iter()
        .zip(figures(stock))
        .filter_map(|((figure, tuned_figure), (_, stock_figure))| {
            let (tuned_figure, stock_figure) = (tuned_figure?, stock_figure?);
            Some(StockRow {
                engine: tuned.engine.to_owned(),
                stock_engine: stock.engine.to_owned(),
                job: stock.scenario.to_owned(),
                stock_base: stock.quantization,
                tuned_base: tuned.quantization,
                figure,
                stock: stock_figure,
                tuned: tuned_figure,
                ratio: tuned_figure.median / stock_figure.median,
                cells: cells.clone(),
            })
        })
        .collect()
}

/// The same ones, in the same order, of every job.
fn figures(job: &Job) -> [(&'static str, Option<Spread>); 4] {
    let train = TrainFigures::of(job);
    let infer = InferFigures::of(job);
    // Lower bounds have no ratio.
    let peak = match Footprint::of_job(job) {
        Some((Footprint::Peak { bytes }, _)) => Spread::of([bytes as f64 / 1e9]),
        _ => None,
    };
    [
        (TRAINING, train.map(|t| t.slot_tokens)),
        ("prompt tokens/s", infer.and_then(|i| i.prefill)),
        ("generated tokens/s", infer.and_then(|i| i.decode)),
        ("peak GB", peak),
    ]
}

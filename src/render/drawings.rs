//! The pictures of the decision: totals by criterion, how often each is first, speeds against the machine's limits.

use super::charts::{Chart, acceptability, predicted, shares, stacked};
use super::report::Findings;
use super::tables::ModelTables;
use crate::decide::criteria::Criteria;
use crate::decide::ranking::Ranking;
use crate::fit::Checked;
use anyhow::Result;
use std::collections::BTreeMap;

pub fn of_decision(findings: &Findings) -> Result<Vec<Chart>> {
    let mut all = Vec::new();
    for ranking in &findings.decision.rankings {
        all.extend(totals(ranking, &findings.criteria)?);
        all.extend(ranks(ranking)?);
    }
    for tables in &findings.models {
        all.extend(limits(tables)?);
    }
    all.extend(predictions(findings)?);
    Ok(all)
}

fn predictions(findings: &Findings) -> Result<Option<Chart>> {
    let checked = findings.predictions.iter().flat_map(|p| &p.checked);
    let point = |c: &Checked| Some((c.engine.clone(), c.predicted? as f64 / 1e9, c.measured? as f64 / 1e9));
    let points: Vec<(String, f64, f64)> = checked.filter_map(point).collect();
    if points.is_empty() {
        return Ok(None);
    }
    predicted("all", "Peak memory: predicted against measured", &points).map(Some)
}

fn totals(ranking: &Ranking, criteria: &Criteria) -> Result<Option<Chart>> {
    if ranking.candidates.is_empty() {
        return Ok(None);
    }
    let parts: Vec<String> = criteria.criteria.iter().map(|c| c.title.clone()).collect();
    let known = |scores: &[crate::decide::score::Score]| -> Vec<f64> {
        scores.iter().zip(&criteria.criteria).map(|(s, c)| s.range().low * c.weight / 100.0).collect()
    };
    let bars: Vec<(String, Vec<f64>)> =
        ranking.candidates.iter().map(|c| (c.engine.clone(), known(&c.scores))).collect();
    let unknown: Vec<f64> = ranking.candidates.iter().map(|c| c.total.high - c.total.low).collect();
    let title = format!("{}: total by criterion, outlined what is unknown", ranking.model);
    stacked(&ranking.model, &title, &parts, &bars, &unknown, "points of 10").map(Some)
}

fn ranks(ranking: &Ranking) -> Result<Option<Chart>> {
    let Some(drawn) = &ranking.acceptability else { return Ok(None) };
    let engines: Vec<String> = drawn.engines.iter().map(|e| e.engine.clone()).collect();
    let matrix: Vec<Vec<f64>> = drawn.engines.iter().map(|e| e.ranks.clone()).collect();
    let title = format!("{}: share of the draws in which each takes each rank", ranking.model);
    acceptability(&ranking.model, &title, &engines, &matrix).map(Some)
}

/// Of the jobs with an NF4 base or what stands for one; of several of one kind the last, which is the largest.
fn limits(tables: &ModelTables) -> Result<Option<Chart>> {
    let mut found: BTreeMap<String, Vec<Option<f64>>> = BTreeMap::new();
    let mut set = |engine: &str, index: usize, share: Option<f64>| {
        let of_engine = found.entry(engine.to_owned()).or_insert_with(|| vec![None; 3]);
        of_engine[index] = share.or(of_engine[index]);
    };
    for row in tables.train.iter().filter(|row| row.is_qlora) {
        set(&row.engine, 0, row.shares.train);
    }
    for row in tables.infer.iter().filter(|row| row.is_qlora) {
        set(&row.engine, 1, row.shares.prefill);
        set(&row.engine, 2, row.shares.decode);
    }
    let groups: Vec<(String, Vec<Option<f64>>)> =
        found.into_iter().filter(|(_, shares)| shares.iter().any(Option::is_some)).collect();
    if groups.is_empty() {
        return Ok(None);
    }
    let series =
        ["training, of the matrix rate", "prompt, of the matrix rate", "generating, of the read rate"]
            .map(str::to_owned);
    let title = format!("{}: speeds as shares of the machine's limits", tables.model.name);
    shares(&tables.model.name, &title, &series, &groups).map(Some)
}

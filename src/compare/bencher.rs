//! Bencher Metric Format: <https://bencher.dev/docs/reference/bencher-metric-format/>. Figures of one side, for a history
//! that Bencher keeps.

use super::Comparison;
use super::figure::Metric;
use serde_json::{Map, Value, json};

/// The head's figures, by job and metric. The format has no place for a job
/// without a figure, such as one that failed: [`without_figures`] names them.
pub fn of_head(comparison: &Comparison) -> Value {
    let mut jobs: Map<String, Value> = Map::new();
    for row in &comparison.rows {
        let (Some(metric), Some(value)) = (row.metric, row.head.figure) else { continue };
        let measures = jobs.entry(row.job.clone()).or_insert_with(|| json!({}));
        measures[slug(metric)] = json!({ "value": value });
    }
    Value::Object(jobs)
}

/// Jobs of which the head has no figure, with how they ended.
pub fn without_figures(comparison: &Comparison) -> Vec<String> {
    let mut jobs: Vec<String> = comparison.rows.iter().map(|row| row.job.clone()).collect();
    jobs.dedup();
    let has_figure = |job: &String| comparison.rows.iter().any(|r| r.job == *job && r.head.figure.is_some());
    jobs.retain(|job| !has_figure(job));
    let outcome =
        |job: &String| comparison.rows.iter().find(|r| r.job == *job).map(|r| r.head.outcomes.clone());
    jobs.iter().map(|job| format!("{job} ({})", outcome(job).unwrap_or_default())).collect()
}

/// Measures are named with hyphens.
fn slug(metric: Metric) -> String {
    metric.name().replace('_', "-")
}

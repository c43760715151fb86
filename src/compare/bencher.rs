//! Bencher Metric Format: <https://bencher.dev/docs/reference/bencher-metric-format/>. Figures of one side, for a history
//! that Bencher keeps.

use super::Comparison;
use super::figure::Metric;
use serde_json::{Map, Value, json};

/// The head's figures, by job and metric.
pub fn of_head(comparison: &Comparison) -> Value {
    let mut jobs: Map<String, Value> = Map::new();
    for row in &comparison.rows {
        let (Some(metric), Some(value)) = (row.metric, row.head.figure) else { continue };
        let measures = jobs.entry(row.job.clone()).or_insert_with(|| json!({}));
        measures[slug(metric)] = json!({ "value": value });
    }
    Value::Object(jobs)
}

/// Measures are named with hyphens.
fn slug(metric: Metric) -> String {
    metric.name().replace('_', "-")
}

//! Measured cells: a run's record, or what a comparison with other tools has of our engines.

use crate::record::{self, CELLS_FILE, CellRecord};
use anyhow::{Context, Result, bail};
use serde::Deserialize;
use std::fs;
use std::path::Path;

/// What `benches/peers` writes.
const PEERS_FILE: &str = "samples.json";

/// The cells of a run folder, of its `cells.jsonl`, or of a folder of `results/peers`.
pub fn read(path: &Path) -> Result<Vec<CellRecord>> {
    let peers = path.join(PEERS_FILE);
    match peers.is_file() && !path.join(CELLS_FILE).exists() {
        true => of_peers(&peers),
        false => record::read(path),
    }
}

#[derive(Deserialize)]
struct Peers {
    measurements: Vec<Measurement>,
}

#[derive(Deserialize)]
struct Measurement {
    samples: Option<PeerSamples>,
}

#[derive(Deserialize)]
struct PeerSamples {
    #[serde(default)]
    detail: serde_json::Value,
}

fn of_peers(path: &Path) -> Result<Vec<CellRecord>> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let peers: Peers = serde_json::from_str(&text).with_context(|| path.display().to_string())?;
    let details = peers.measurements.into_iter().filter_map(|measurement| Some(measurement.samples?.detail));
    // Other tools have details of their own.
    let ours = details.filter(|detail| detail.get("cell").is_some());
    let cells = ours.map(|mut detail| {
        // The course of memory over time and the probes are left out there.
        if let Some(samples) = detail.get_mut("samples").and_then(serde_json::Value::as_object_mut) {
            for left_out in ["memory", "probes"] {
                samples.entry(left_out).or_insert_with(|| serde_json::Value::Array(Vec::new()));
            }
        }
        serde_path_to_error::deserialize(detail).with_context(|| format!("{}: a cell", path.display()))
    });
    let cells: Vec<CellRecord> = cells.collect::<Result<_>>()?;
    if cells.is_empty() {
        bail!("{}: none of our engines was measured there", path.display());
    }
    Ok(cells)
}

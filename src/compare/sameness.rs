//! Whether two sides may be compared: the same machine, the same work.

use crate::decide::jobs::{Job, arrange};
use crate::measure::host::Environment;
use crate::record::CellRecord;
use crate::scenario::Scenario;

/// Two machines with the same memory may report a little of it apart.
const MEMORY_TOLERANCE: f64 = 0.02;
/// What engines on the CPU name among their features.
const INSTRUCTIONS: [&str; 4] = ["portable", "neon", "avx2", "avx512"];

/// In what the sides differ that should be the same, each difference once, in words.
pub fn differences(base: &[CellRecord], head: &[CellRecord]) -> Vec<String> {
    let mut found: Vec<String> = Vec::new();
    let mut add = |difference: String| {
        if !found.contains(&difference) {
            found.push(difference);
        }
    };
    // Each side's own cells, too: several records of one side are one sample.
    let (Some(first), all) = (base.first(), base.iter().chain(head)) else { return found };
    for cell in all {
        for (what, ours, theirs) in machine_parts(&first.environment, &cell.environment) {
            add(format!("{what}: {ours} and {theirs}"));
        }
    }
    let cells: Vec<CellRecord> = base.iter().chain(head).cloned().collect();
    for job in arrange(&cells) {
        for difference in in_job(&job) {
            add(difference);
        }
    }
    found
}

/// Whether both are the same machine, as far as records tell.
pub fn is_same_machine(a: &Environment, b: &Environment) -> bool {
    machine_parts(a, b).is_empty()
}

fn machine_parts(a: &Environment, b: &Environment) -> Vec<(&'static str, String, String)> {
    let parts = [
        ("CPU", a.cpu.clone(), b.cpu.clone()),
        ("architecture", a.arch.clone(), b.arch.clone()),
        ("logical cores", a.logical_cores.to_string(), b.logical_cores.to_string()),
        ("operating system", a.os.clone(), b.os.clone()),
        ("GPUs", listed(&a.gpus), listed(&b.gpus)),
    ];
    let mut different: Vec<_> = parts.into_iter().filter(|(_, a, b)| a != b).collect();
    let [a, b] = [a, b].map(|environment| environment.memory_bytes as f64);
    if (a - b).abs() > MEMORY_TOLERANCE * a.max(b) {
        different.push(("memory", format!("{:.1} GB", a / 1e9), format!("{:.1} GB", b / 1e9)));
    }
    different
}

/// The instruction set that an engine on the CPU uses, as far as it tells.
pub fn instructions(cell: &CellRecord) -> Option<&str> {
    cell.engine_features.iter().map(String::as_str).find(|feature| INSTRUCTIONS.contains(feature))
}

/// Loading is the one scenario that it matters to.
fn page_cache(cell: &CellRecord) -> Option<&str> {
    let load = cell.samples.load.as_ref()?;
    matches!(cell.parameters, Scenario::Load(_)).then_some(load.page_cache.as_str())
}

fn listed(gpus: &[String]) -> String {
    if gpus.is_empty() { "none".to_owned() } else { gpus.join(", ") }
}

fn in_job(job: &Job) -> Vec<String> {
    let Some(first) = job.cells.first() else { return Vec::new() };
    let name = super::name(job);
    let mut found = Vec::new();
    for cell in &job.cells {
        if cell.parameters != first.parameters {
            found.push(format!("{name}: the scenario's parameters differ"));
        }
        if !cell.model.is_same_as(&first.model) {
            let [ours, theirs] = [first, cell].map(|cell| &cell.model);
            found.push(format!(
                "{name}: the model is {} ({} parameters) and {} ({})",
                ours.origin, ours.parameters, theirs.origin, theirs.parameters
            ));
        }
        if cell.schema != first.schema {
            found.push(format!(
                "{name}: memory is defined as in records of schema {} and {}",
                first.schema, cell.schema
            ));
        }
        if cell.seed != first.seed {
            found.push(format!("{name}: the seed is {} and {}", first.seed, cell.seed));
        }
    }
    // A cell whose engine never started knows no device.
    let mut started = job.cells.iter().filter(|cell| cell.device.is_some());
    let Some(a) = started.next() else { return found };
    for b in started {
        if a.threads != b.threads {
            let threads = |cell: &CellRecord| cell.threads.map_or("unknown".to_owned(), |n| n.to_string());
            found.push(format!("{name}: {} and {} threads", threads(a), threads(b)));
        }
        // Processors may go by one name and have different instructions.
        let [ours, theirs] = [a, b].map(|cell| instructions(cell).unwrap_or("not told"));
        if ours != theirs {
            found.push(format!("{name}: the instructions are {ours} and {theirs}"));
        }
        let [ours, theirs] = [a, b].map(|cell| cell.compute_dtype.as_deref().unwrap_or("an unknown type"));
        if ours != theirs {
            found.push(format!("{name}: it computes in {ours} and {theirs}"));
        }
        if let (Some(ours), Some(theirs)) = (page_cache(a), page_cache(b))
            && ours != theirs
        {
            found.push(format!("{name}: the page cache was {ours} and {theirs}"));
        }
        if a.launcher != b.launcher {
            let [ours, theirs] = [a, b].map(|cell| cell.launcher.as_deref().unwrap_or("nothing"));
            found.push(format!("{name}: workers were launched through {ours} and {theirs}"));
        }
        if let (Some(a), Some(b)) = (&a.device, &b.device)
            && a.name != b.name
        {
            found.push(format!("{name}: the device is {} and {}", a.name, b.name));
        }
    }
    found
}

//! What can run on this machine, and what is missing.

use crate::engines::{ENGINES, Registry};
use crate::output::print;
use crate::probe::{Availability, probe};
use anyhow::Result;
use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{ContentArrangement, Table};
use evalfw_engine::protocol::EngineInfo;
use serde::Serialize;
use std::process::ExitCode;

#[derive(Serialize)]
struct Row<'a> {
    engine: &'a str,
    summary: &'a str,
    available: bool,
    #[serde(flatten)]
    details: Availability,
}

pub fn run(registry: &Registry, json: bool) -> Result<ExitCode> {
    let workers = registry.workers();
    let built_in = ENGINES.iter().map(|engine| (engine.name, engine.summary));
    let external = registry.external().map(|engine| (engine.name(), engine.declaration.summary.as_str()));
    let row = |(engine, summary)| {
        let details = probe(engine, &workers);
        Row { engine, summary, available: matches!(details, Availability::Available(_)), details }
    };
    let rows: Vec<Row<'_>> = built_in.chain(external).map(row).collect();
    let text = match json {
        true => serde_json::to_string_pretty(&rows)?,
        false => table(&rows).to_string(),
    };
    print(&(text + "\n"))?;
    Ok(ExitCode::SUCCESS)
}

fn table(rows: &[Row<'_>]) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED).set_content_arrangement(ContentArrangement::Dynamic).set_header([
        "engine",
        "runs here",
        "version",
        "device",
    ]);
    for row in rows {
        match &row.details {
            Availability::Available(info) => {
                let version = format!("{} {}", info.framework, info.framework_version);
                table.add_row([row.engine, "yes", &version, &device(info)]);
            }
            Availability::Unavailable(reason) => {
                let advice = reason.advice.as_deref().unwrap_or("see the messages of the worker with --json");
                table.add_row([row.engine, "no", "", &format!("{}: {advice}", reason.reason)]);
            }
        }
    }
    table
}

/// The device that would be taken, and below it all that there are to choose from, if there is a choice.
fn device(info: &EngineInfo) -> String {
    let mut text = info.device.title();
    for (number, adapter) in info.choice().into_iter().flat_map(|adapters| adapters.all.iter().enumerate()) {
        text += &format!("\n  EVALFW_GPU={number}: {}", adapter.title());
    }
    text
}

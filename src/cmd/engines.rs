//! `evalfw engines`: what can run on this machine, and what is missing.

use crate::engines::ENGINES;
use crate::output::print;
use crate::probe::{Availability, probe};
use crate::worker::Workers;
use anyhow::Result;
use clap::Args;
use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{ContentArrangement, Table};
use evalfw_engine::protocol::EngineInfo;
use serde::Serialize;
use std::process::ExitCode;

/// List every engine and device, whether it can run here, and what to install if not
#[derive(Args)]
#[command(
    after_help = "Examples:\n  evalfw engines\n  evalfw engines --json | jq '.[] | select(.available)'"
)]
pub struct EnginesArgs {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Row {
    engine: &'static str,
    summary: &'static str,
    available: bool,
    #[serde(flatten)]
    details: Availability,
}

pub fn run(args: &EnginesArgs) -> Result<ExitCode> {
    let rows: Vec<Row> = ENGINES
        .iter()
        .map(|engine| {
            let details = probe(engine.name, &Workers::default());
            let available = matches!(details, Availability::Available(_));
            Row { engine: engine.name, summary: engine.summary, available, details }
        })
        .collect();
    let text = match args.json {
        true => serde_json::to_string_pretty(&rows)?,
        false => table(&rows).to_string(),
    };
    print(&(text + "\n"))?;
    Ok(ExitCode::SUCCESS)
}

fn table(rows: &[Row]) -> Table {
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

//! `evalfw worker ENGINE`: a built-in engine as a worker process.

use crate::engines;
use crate::worker::agent;
use anyhow::{Context, Result};
use clap::Args;
use evalfw_engine::serve::serve_stdio;
use std::process::ExitCode;

#[derive(Args)]
pub struct WorkerArgs {
    engine: String,
    /// Start the worker as a child, pass its lines on, and observe it
    #[arg(long)]
    agent: bool,
    /// Threads of the agent's worker
    #[arg(long, requires = "agent", value_name = "N")]
    threads: Option<usize>,
}

pub fn run(args: &WorkerArgs) -> Result<ExitCode> {
    let engine = engines::find(&args.engine)?;
    if args.agent {
        return agent::serve(&args.engine, args.threads);
    }
    die_before_the_harness();
    serve_stdio(Box::new(engine.open)).context("the pipe to the harness broke")?;
    Ok(ExitCode::SUCCESS)
}

/// When memory runs out the kernel shall end the worker and not the harness, and when the harness is
/// killed no worker may stay behind. Both are precautions: where they cannot be had, the run goes on.
#[cfg(target_os = "linux")]
fn die_before_the_harness() {
    let _ = std::fs::write("/proc/self/oom_score_adj", "1000");
    let _ = rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL));
}

#[cfg(not(target_os = "linux"))]
fn die_before_the_harness() {}

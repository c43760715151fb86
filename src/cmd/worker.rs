//! `evalfw worker ENGINE`: this process as the worker of an engine.

use crate::engines::{Engine, EnginesFile, External, Invocation, USERS_OWN};
use crate::worker::agent;
use anyhow::{Context, Result};
use clap::Args;
use evalfw_engine::Error;
use evalfw_engine::serve::serve_stdio;
use std::process::{Command, ExitCode};

#[derive(Args)]
pub struct WorkerArgs {
    engine: String,
    /// Start the worker as a child, pass its lines on, and observe it
    #[arg(long)]
    agent: bool,
    /// Threads of the agent's worker
    #[arg(long, requires = "agent", value_name = "N")]
    threads: Option<usize>,
    #[command(flatten)]
    engines_file: EnginesFile,
}

pub fn run(args: &WorkerArgs) -> Result<ExitCode> {
    let registry = args.engines_file.registry()?;
    let engine = registry.find(&args.engine)?;
    if args.agent {
        return agent::serve(&args.engine, args.threads, registry.file());
    }
    die_before_the_harness();
    match engine {
        Engine::BuiltIn(engine) => {
            serve_stdio(Box::new(engine.open)).context("the pipe to the harness broke")?;
            Ok(ExitCode::SUCCESS)
        }
        Engine::External(engine) => external(engine),
    }
}

/// Becomes the engine. What is missing for that is told in the protocol, as an engine would tell it.
fn external(engine: &External) -> Result<ExitCode> {
    let unavailable = match engine.invocation()? {
        Ok(invocation) => match become_it(&invocation) {
            Ok(code) => return Ok(code),
            Err(error) => Error::Unavailable {
                reason: format!("{} could not be started: {error}", invocation.program.display()),
                advice: format!("is the command of {} in engines.toml right?", engine.name()),
            },
        },
        Err(missing) => Error::Unavailable { reason: missing.reason, advice: missing.advice },
    };
    serve_stdio(Box::new(move || Err(unavailable))).context("the pipe to the harness broke")?;
    Ok(ExitCode::SUCCESS)
}

/// What number libraries read their number of threads from.
const THREAD_VARIABLES: [&str; 4] =
    ["OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"];

fn command(invocation: &Invocation) -> Command {
    let mut command = Command::new(&invocation.program);
    if invocation.is_isolated {
        for variable in USERS_OWN {
            command.env_remove(variable);
        }
        // `python -m` looks for packages in the folder that it is started in before it looks in its environment. This one
        // is the worker's own, and empty.
        command.current_dir(std::env::temp_dir());
    }
    command.args(&invocation.arguments).envs(&invocation.variables);
    // The harness says it in the way of the built-in engines.
    if let Some(threads) = std::env::var_os("RAYON_NUM_THREADS") {
        command.envs(THREAD_VARIABLES.map(|variable| (variable, &threads)));
    }
    command
}

/// The process keeps its number, so that what is seen of it from outside is seen of the engine.
#[cfg(unix)]
fn become_it(invocation: &Invocation) -> std::io::Result<ExitCode> {
    Err(std::os::unix::process::CommandExt::exec(&mut command(invocation)))
}

#[cfg(not(unix))]
fn become_it(invocation: &Invocation) -> std::io::Result<ExitCode> {
    let status = command(invocation).status()?;
    Ok(ExitCode::from(u8::try_from(status.code().unwrap_or(1)).unwrap_or(1)))
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

//! `evalfw engines install` and `remove`.

use crate::engines::{
    Engine, EnginesFile, External, Installer, Registry, install as make, remove as take_away,
};
use crate::output::{note, print};
use crate::{interrupt, render};
use anyhow::{Result, bail};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// Make the environment of an engine: pinned and hashed packages, in a folder of evalfw's own
#[derive(Args)]
#[command(after_help = "\
Needs Python; uv is used where it is, for it is faster. Nothing is installed into a Python of yours.
The folder is ~/.local/share/evalfw/engines, or `engines` in $EVALFW_DATA. What is there already is left alone.

Examples:
  evalfw engines install peft
  evalfw engines install peft mlx-lm --python python3.12

Exit codes: 0 installed, 2 it could not be, 130 interrupted.")]
pub struct InstallArgs {
    /// peft, mlx-lm, axolotl, or one of your own
    #[arg(required = true, value_name = "ENGINE")]
    engines: Vec<String>,
    /// The interpreter [default: the first on PATH that will do]
    #[arg(long, value_name = "PATH")]
    python: Option<PathBuf>,
    /// Make it anew if it is there
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    engines_file: EnginesFile,
}

/// Remove the environment of an engine
#[derive(Args)]
#[command(after_help = "\
Example:
  evalfw engines remove axolotl

Exit codes: 0 it is not there any more, 2 it could not be removed.")]
pub struct RemoveArgs {
    /// peft, mlx-lm, axolotl, or one of your own
    #[arg(required = true, value_name = "ENGINE")]
    engines: Vec<String>,
    #[command(flatten)]
    engines_file: EnginesFile,
}

pub fn install(args: &InstallArgs) -> Result<ExitCode> {
    interrupt::install()?;
    let registry = args.engines_file.registry()?;
    let chosen = external(&registry, &args.engines)?;
    // All of them before the first one downloads gigabytes.
    for external in &chosen {
        external.install()?;
    }
    for external in chosen {
        announce(external);
        let bar = bar();
        let installer = Installer {
            external,
            python: args.python.clone(),
            force: args.force,
            progress: &mut |line| bar.set_message(line.to_owned()),
        };
        let outcome = make(installer);
        bar.finish_and_clear();
        if interrupt::requested() {
            note("interrupted; the same command begins again");
            return Ok(ExitCode::from(interrupt::EXIT_CODE));
        }
        let (installed, anew) = outcome?;
        let size = render::format::gb(installed.bytes as f64);
        let name = external.name();
        let versions = match &installed.versions {
            serde_json::Value::Object(versions) => {
                let known = |(name, version): (&String, &serde_json::Value)| {
                    Some(format!("{name} {}", version.as_str()?))
                };
                versions.iter().filter_map(known).collect::<Vec<_>>().join(", ")
            }
            _ => format!("{} packages", installed.packages),
        };
        print(&match anew {
            true => format!(
                "installed {name}: {versions}; {size} GB in {} packages, {:.0} s with {}\n",
                installed.packages, installed.seconds, installed.installer
            ),
            false => format!("{name} is installed already: {versions}; {size} GB\n"),
        })?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Said before it begins, for some are large.
fn announce(external: &External) {
    let Ok(packages) = external.install().map(|install| install.packages()) else { return };
    let more = packages.note.as_ref().map_or_else(String::new, |note| format!(". {note}"));
    note(&format!(
        "{}: about {:.1} GB to download, {:.1} GB on the disk{more}",
        external.name(),
        packages.download_gb,
        packages.installed_gb
    ));
}

pub fn remove(args: &RemoveArgs) -> Result<ExitCode> {
    let registry = args.engines_file.registry()?;
    for external in external(&registry, &args.engines)? {
        let name = external.name();
        print(&match take_away(external)? {
            Some(bytes) => {
                format!("removed {name}: {} GB are free again\n", render::format::gb(bytes as f64))
            }
            None => format!("{name} is not installed\n"),
        })?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Those of the engines that are named; a built-in one needs no environment.
fn external<'a>(registry: &'a Registry, names: &[String]) -> Result<Vec<&'a External>> {
    let of = |name: &String| match registry.find(name)? {
        Engine::External(external) => Ok(external),
        Engine::BuiltIn(_) => {
            let there = registry.external().map(External::name).collect::<Vec<_>>().join(", ");
            bail!("{name} is part of this program; there are {there} to install")
        }
    };
    names.iter().map(of).collect()
}

fn bar() -> ProgressBar {
    let bar = if std::io::stderr().is_terminal() { ProgressBar::no_length() } else { ProgressBar::hidden() };
    if let Ok(style) = ProgressStyle::with_template("{spinner} {elapsed}  {wide_msg}") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(200));
    bar
}

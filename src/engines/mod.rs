//! The registry of engines: those that are built in, and those that an `engines.toml` declares.

mod built_in;
mod environment;
mod external;
mod install;

pub use built_in::*;
pub use environment::{Environment, Installed, State};
pub use external::{Declaration, External, Install, Invocation, Missing};
pub use install::{Installer, Python, USERS_OWN, install, remove};

use crate::worker::Workers;
use anyhow::{Context, Result, bail};
use clap::Args;
use std::path::{Path, PathBuf};

/// All engines there are.
#[derive(Debug, Clone, Default)]
pub struct Registry {
    external: Vec<External>,
    /// The file that declared some of them.
    file: Option<PathBuf>,
}

/// An engine by its name.
pub enum Engine<'a> {
    BuiltIn(&'static EngineSpec),
    External(&'a External),
}

/// Where engines are declared, beside those that are built in.
#[derive(Debug, Clone, Default, Args)]
pub struct EnginesFile {
    /// Engines of your own: any commands that speak the worker protocol (backends/PROTOCOL.md)
    /// [default: ./engines.toml if it is there]
    #[arg(long = "engines-file", value_name = "FILE", env = "EVALFW_ENGINES_FILE")]
    file: Option<PathBuf>,
}

const FILE_HERE: &str = "engines.toml";

impl EnginesFile {
    pub fn registry(&self) -> Result<Registry> {
        match &self.file {
            Some(file) => Registry::with(Some(file)),
            None => Registry::with(Some(Path::new(FILE_HERE)).filter(|file| file.is_file())),
        }
    }
}

impl Registry {
    /// The built-in engines and those of `file`, which may declare one of the first differently.
    pub fn with(file: Option<&Path>) -> Result<Self> {
        let Some(file) = file else { return Ok(Self { external: external::brought_along()?, file: None }) };
        let file = std::path::absolute(file).with_context(|| file.display().to_string())?;
        let text = std::fs::read_to_string(&file).with_context(|| file.display().to_string())?;
        let folder = file.parent().unwrap_or(Path::new("/"));
        let mut external = external::parse(&text, folder).with_context(|| file.display().to_string())?;
        for brought in external::brought_along()? {
            if !external.iter().any(|own| own.name() == brought.name()) {
                external.push(brought);
            }
        }
        Ok(Self { external, file: Some(file) })
    }

    pub fn file(&self) -> Option<&Path> {
        self.file.as_deref()
    }

    /// How its engines are started on this machine.
    pub fn workers(&self) -> Workers {
        Workers { engines_file: self.file.clone(), ..Workers::default() }
    }

    pub fn external(&self) -> impl Iterator<Item = &External> {
        self.external.iter()
    }

    pub fn find(&self, name: &str) -> Result<Engine<'_>> {
        if let Some(engine) = ENGINES.iter().find(|engine| engine.name == name) {
            return Ok(Engine::BuiltIn(engine));
        }
        match self.external.iter().find(|engine| engine.name() == name) {
            Some(engine) => Ok(Engine::External(engine)),
            None => bail!("no engine {name:?}; there are {}", self.names().join(", ")),
        }
    }

    /// Of all engines.
    pub fn names(&self) -> Vec<&str> {
        ENGINES.iter().map(|engine| engine.name).chain(self.external.iter().map(External::name)).collect()
    }

    /// The engines that `run` takes when none is named: a stock form runs where a suite asks for it.
    pub fn of_runs(&self) -> Vec<&str> {
        tuned().map(|engine| engine.name).chain(self.external.iter().map(External::name)).collect()
    }

    /// The engines that `verify` takes when none is named.
    pub fn of_verification(&self) -> Vec<&str> {
        unasked().map(|engine| engine.name).chain(self.external.iter().map(External::name)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_engine_lists_the_known_ones() {
        let registry = Registry::with(None).unwrap();
        let error = registry.find("candle").err().unwrap().to_string();
        for known in ["candle-cpu", "burn-flex", "peft", "mlx-lm", "axolotl"] {
            assert!(error.contains(known), "{error}");
        }
    }

    #[test]
    fn a_file_adds_engines_and_may_replace_those_that_are_brought_along() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("engines.toml");
        let text = "[[engine]]\nname = \"mine\"\nsummary = \"Mine\"\ncommand = [\"{here}/mine\"]\n\n\
                    [[engine]]\nname = \"peft\"\nsummary = \"Another\"\ncommand = [\"other\"]\n";
        std::fs::write(&file, text).unwrap();
        let registry = Registry::with(Some(&file)).unwrap();
        assert!(matches!(registry.find("mine"), Ok(Engine::External(_))));
        let pefts: Vec<_> = registry.external().filter(|engine| engine.name() == "peft").collect();
        assert_eq!(pefts.len(), 1);
        assert_eq!(pefts[0].declaration.summary, "Another");
        assert!(registry.find("mlx-lm").is_ok());
    }
}

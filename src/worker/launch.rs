//! How workers are started: as children of the harness, or through another command such as srun, ssh or docker run.

use super::process::WorkerCommand;
use serde::{Deserialize, Serialize};
use std::ffi::OsString;
use std::path::PathBuf;

/// The same for all workers of a run.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Workers {
    /// Threads of CPU engines; `None` leaves it to them.
    pub threads: Option<usize>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub launcher: Option<Launcher>,
    /// Where engines are declared that are not built in; an absolute path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engines_file: Option<PathBuf>,
}

/// A command that runs the words after its own on the worker's side, with standard input and output passed through.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Launcher {
    /// As it was given, in the shell's quotes.
    pub text: String,
    /// The same in words; never empty.
    words: Vec<String>,
    /// evalfw on the worker's side; `None`: where it is here.
    program: Option<PathBuf>,
}

#[derive(Debug, thiserror::Error)]
pub enum LauncherError {
    #[error("--launcher {text:?}: {problem}")]
    Quotes { text: String, problem: shell_words::ParseError },
    #[error("--launcher is empty; e.g. `--launcher 'srun -n1 --unbuffered'`")]
    Empty,
}

impl Launcher {
    /// Splits the text as a shell would.
    pub fn parse(text: &str, program: Option<PathBuf>) -> Result<Self, LauncherError> {
        let words = shell_words::split(text)
            .map_err(|problem| LauncherError::Quotes { text: text.to_owned(), problem })?;
        if words.is_empty() {
            return Err(LauncherError::Empty);
        }
        Ok(Self { text: text.to_owned(), words, program })
    }

    /// What a person types to see whether it works.
    pub fn trial(&self) -> String {
        let program = self.program.clone().or_else(|| std::env::current_exe().ok());
        let program = program.map_or_else(|| "evalfw".to_owned(), |program| program.display().to_string());
        format!("{} {} engines", self.text, shell_words::quote(&program))
    }

    /// evalfw with these arguments, on the worker's side.
    pub fn command(&self, arguments: &[&str]) -> std::io::Result<(PathBuf, Vec<OsString>)> {
        let program = match &self.program {
            Some(program) => program.clone(),
            None => std::env::current_exe()?,
        };
        let (launcher, more) = self.words.split_first().map_or(("", &[][..]), |(l, more)| (l.as_str(), more));
        let own = more.iter().map(OsString::from);
        let all = own.chain([program.into_os_string()]).chain(arguments.iter().map(OsString::from));
        Ok((launcher.into(), all.collect()))
    }
}

impl Workers {
    pub fn of_threads(threads: Option<usize>) -> Self {
        Self { threads, ..Self::default() }
    }

    /// This program again, as the worker of an engine or as what becomes it.
    pub fn of_engine(&self, engine: &str) -> std::io::Result<WorkerCommand> {
        let Some(launcher) = &self.launcher else {
            return WorkerCommand::here(engine, self.threads, self.engines_file.as_deref());
        };
        let threads = self.threads.map(|threads| threads.to_string());
        let engines_file = self.engines_file.as_ref().map(|file| file.display().to_string());
        let mut arguments = vec!["worker", engine, "--agent"];
        // Not every launcher hands on the environment.
        arguments.extend(threads.iter().flat_map(|threads| ["--threads", threads]));
        arguments.extend(engines_file.iter().flat_map(|file| ["--engines-file", file]));
        let (program, arguments) = launcher.command(&arguments)?;
        Ok(WorkerCommand { program, arguments, environment: Vec::new(), agent: true })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_launcher_keeps_its_own_words_before_those_of_the_worker() {
        let launcher = Launcher::parse("ssh -o 'User=a b' host", Some("/opt/evalfw".into())).unwrap();
        let workers = Workers { launcher: Some(launcher), ..Workers::of_threads(Some(3)) };
        let command = workers.of_engine("candle-cpu").unwrap();
        assert_eq!(command.program, PathBuf::from("ssh"));
        let expected =
            ["-o", "User=a b", "host", "/opt/evalfw", "worker", "candle-cpu", "--agent", "--threads", "3"];
        assert_eq!(command.arguments, expected.map(OsString::from));
        assert!(command.agent);
        assert!(Launcher::parse("  ", None).is_err());
        assert!(Launcher::parse("srun 'x", None).unwrap_err().to_string().contains("srun 'x"));
    }
}

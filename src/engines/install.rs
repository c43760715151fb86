//! Makes and removes the environments of Python engines. Nothing is installed into a Python of the user's.

use super::environment::{Environment, Installed, State};
use super::external::{External, Install, Packages};
use crate::{interrupt, record};
use anyhow::{Context, Result, bail};
use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::channel;
use std::time::Instant;

/// Lines of a tool's output that stand in an error; the rest is in the log.
const TAIL: usize = 8;

/// An interpreter that is there.
#[derive(Debug, Clone, PartialEq)]
pub struct Python {
    pub program: PathBuf,
    /// (major, minor)
    pub version: (u32, u32),
    pub full_version: String,
}

/// What makes an environment.
pub struct Installer<'a> {
    pub external: &'a External,
    /// The interpreter to take; `None`: the first on PATH that will do.
    pub python: Option<PathBuf>,
    /// Also if it is there already.
    pub force: bool,
    /// Told what is being done.
    pub progress: &'a mut dyn FnMut(&str),
}

/// Returns what is installed now, and whether this call did it.
pub fn install(installer: Installer<'_>) -> Result<(Installed, bool)> {
    let external = installer.external;
    let install = external.install()?;
    let environment =
        external.environment()?.context("an engine with [engine.install] has an environment")?;
    let place = || format!("{}: cannot be written", environment.folder.display());
    let parent = environment.folder.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(parent).with_context(place)?;
    let _lock = lock(&environment)?;
    if let (State::Ready(installed), false) = (environment.state(), installer.force) {
        return Ok((*installed, false));
    }
    let python = find_python(installer.python.as_deref(), install)?;
    let packages = install.packages();
    check_space(parent, &packages)?;
    if environment.folder.exists() {
        (installer.progress)("removing what was there");
        std::fs::remove_dir_all(&environment.folder).with_context(place)?;
    }
    let started = Instant::now();
    let requirements = environment.folder.with_extension("requirements.txt");
    std::fs::write(&requirements, external.requirements(&packages)?).with_context(place)?;
    let tool = Tool::choose();
    let mut steps = Steps {
        folder: None,
        log: log_of(&environment)?,
        log_path: log_path(&environment),
        progress: installer.progress,
    };
    steps.run("making the environment", tool.new_environment(&python, &environment))?;
    steps.run(
        &format!("installing with {}", tool.title()),
        tool.install_packages(&environment, &requirements),
    )?;
    steps.folder = Some(environment.folder.clone());
    let versions = versions(external, &environment, &mut steps)?;
    // It stands in the program, and is written again when it is needed.
    let _ = std::fs::remove_file(&requirements);
    let installed = Installed {
        requirements_sha256: environment.requirements_sha256().to_owned(),
        python: python.full_version,
        installer: tool.title(),
        versions,
        packages: count_packages(&environment),
        bytes: environment.size(),
        seconds: started.elapsed().as_secs_f64(),
        installed_at: record::now(),
    };
    environment.note(&installed)?;
    Ok((installed, true))
}

/// Returns the bytes that were freed.
pub fn remove(external: &External) -> Result<Option<u64>> {
    let Some(environment) = external.environment()? else { return Ok(None) };
    if !environment.folder.exists() {
        return Ok(None);
    }
    let _lock = lock(&environment)?;
    let bytes = environment.size();
    let _ = std::fs::remove_file(environment.folder.with_extension("requirements.txt"));
    std::fs::remove_dir_all(&environment.folder)
        .with_context(|| format!("{}: cannot be removed", environment.folder.display()))?;
    let _ = std::fs::remove_file(log_path(&environment));
    Ok(Some(bytes))
}

/// Two installations of one engine at a time would be in each other's way.
fn lock(environment: &Environment) -> Result<File> {
    let path = environment.folder.with_extension("lock");
    let file = File::create(&path).with_context(|| format!("{}: cannot be written", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => {
            bail!("another evalfw is installing or removing this engine ({} is locked)", path.display())
        }
        Err(std::fs::TryLockError::Error(error)) => Err(error).with_context(|| path.display().to_string()),
    }
}

fn log_path(environment: &Environment) -> PathBuf {
    environment.folder.with_extension("log")
}

fn log_of(environment: &Environment) -> Result<File> {
    let path = log_path(environment);
    File::create(&path).with_context(|| format!("{}: cannot be written", path.display()))
}

/// Names under which an interpreter may be found.
const PYTHONS: [&str; 8] =
    ["python3", "python", "python3.11", "python3.12", "python3.13", "python3.10", "python3.14", "py"];

fn find_python(asked_for: Option<&Path>, install: &Install) -> Result<Python> {
    let [oldest, newest] = install.range()?;
    let wanted = format!("Python {}.{} to {}.{}", oldest.0, oldest.1, newest.0, newest.1);
    if let Some(program) = asked_for {
        return match version_of(program) {
            Some(python) if (oldest..=newest).contains(&python.version) => Ok(python),
            Some(python) => {
                bail!("{} is Python {}; {wanted} is needed", program.display(), python.full_version)
            }
            None => bail!("{} is no Python that can be started; {wanted} is needed", program.display()),
        };
    }
    let found: Vec<Python> = PYTHONS.iter().filter_map(|name| version_of(Path::new(name))).collect();
    if let Some(python) = found.iter().find(|python| (oldest..=newest).contains(&python.version)) {
        return Ok(python.clone());
    }
    let there: Vec<String> = found
        .iter()
        .map(|python| format!("{} ({})", python.program.display(), python.full_version))
        .collect();
    let there = if there.is_empty() {
        "there is none on PATH".to_owned()
    } else {
        format!("found {}", there.join(", "))
    };
    bail!("{wanted} is needed: {there}; install one, or name one with --python")
}

/// `None` where it is no Python, or one that does not start.
fn version_of(program: &Path) -> Option<Python> {
    let code = "import sys, venv; print('%d.%d.%d' % sys.version_info[:3])";
    let output = Command::new(program).args(["-I", "-c", code]).stdin(Stdio::null()).output().ok()?;
    let full_version = String::from_utf8(output.stdout).ok()?.trim().to_owned();
    let mut parts = full_version.split('.').map(|part| part.parse().ok());
    let version = (parts.next()??, parts.next()??);
    output.status.success().then(|| Python { program: program.to_owned(), version, full_version })
}

/// A disk that fills up half-way helps nobody.
#[cfg(unix)]
fn check_space(folder: &Path, packages: &Packages) -> Result<()> {
    let Ok(figures) = rustix::fs::statvfs(folder) else { return Ok(()) };
    let free = (figures.f_bavail * figures.f_frsize) as f64 / 1e9;
    if free < packages.installed_gb {
        bail!(
            "{}: {free:.1} GB are free, and {:.1} GB are needed; EVALFW_DATA names another folder",
            folder.display(),
            packages.installed_gb
        );
    }
    Ok(())
}

#[cfg(not(unix))]
fn check_space(_folder: &Path, _packages: &Packages) -> Result<()> {
    Ok(())
}

/// What makes environments: uv where it is, for it is many times as fast.
enum Tool {
    Uv { version: String },
    Pip,
}

impl Tool {
    fn choose() -> Self {
        let output = Command::new("uv").arg("--version").stdin(Stdio::null()).output();
        match output {
            Ok(output) if output.status.success() => {
                let text = String::from_utf8_lossy(&output.stdout);
                Self::Uv { version: text.split_whitespace().nth(1).unwrap_or("").to_owned() }
            }
            _ => Self::Pip,
        }
    }

    fn title(&self) -> String {
        match self {
            Self::Uv { version } => format!("uv {version}"),
            Self::Pip => "pip".to_owned(),
        }
    }

    fn new_environment(&self, python: &Python, environment: &Environment) -> Command {
        match self {
            Self::Uv { .. } => {
                let mut command = Command::new("uv");
                command
                    .args(["venv", "--no-project", "--python"])
                    .arg(&python.program)
                    .arg(&environment.folder);
                command
            }
            Self::Pip => {
                let mut command = Command::new(&python.program);
                command.args(["-m", "venv"]).arg(&environment.folder);
                command
            }
        }
    }

    /// What the hashes stand for, which is complete, and nothing else.
    fn install_packages(&self, environment: &Environment, requirements: &Path) -> Command {
        match self {
            Self::Uv { .. } => {
                let mut command = Command::new("uv");
                command
                    .args(["pip", "install", "--require-hashes", "--no-deps", "--python"])
                    .arg(environment.python());
                command.arg("-r").arg(requirements);
                command
            }
            Self::Pip => {
                let mut command = Command::new(environment.python());
                command.args(["-m", "pip", "install", "--require-hashes", "--no-deps", "--no-input"]);
                command
                    .args(["--disable-pip-version-check", "--progress-bar", "off", "-r"])
                    .arg(requirements);
                command
            }
        }
    }
}

/// What leads a Python to packages elsewhere.
pub const USERS_OWN: [&str; 3] = ["PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"];

/// The commands of an installation, with their log.
struct Steps<'a> {
    /// Where they start, for `python -m` finds packages there; it holds none.
    folder: Option<PathBuf>,
    log: File,
    log_path: PathBuf,
    progress: &'a mut dyn FnMut(&str),
}

impl Steps<'_> {
    /// Returns the last line of standard output.
    fn run(&mut self, what: &str, mut command: Command) -> Result<String> {
        (self.progress)(what);
        // What a user has set for their own Python does not reach into the environment.
        let own: Vec<OsString> = command.get_envs().map(|(name, _)| name.to_owned()).collect();
        for variable in USERS_OWN.iter().filter(|variable| own.iter().all(|name| name != *variable)) {
            command.env_remove(variable);
        }
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        if let Some(folder) = &self.folder {
            command.current_dir(folder);
        }
        let name = command.get_program().display().to_string();
        let mut child = command.spawn().with_context(|| format!("{name} could not be started"))?;
        let (sender, lines) = channel();
        let readers: Vec<(bool, Option<Box<dyn Read + Send>>)> = vec![
            (true, child.stdout.take().map(|pipe| Box::new(pipe) as _)),
            (false, child.stderr.take().map(|pipe| Box::new(pipe) as _)),
        ];
        for (is_output, pipe) in readers {
            let (Some(pipe), sender) = (pipe, sender.clone()) else { continue };
            std::thread::spawn(move || {
                for line in BufReader::new(pipe).lines().map_while(|line| line.ok()) {
                    if sender.send((is_output, line)).is_err() {
                        return;
                    }
                }
            });
        }
        drop(sender);
        let (mut tail, mut last_output) = (Vec::new(), String::new());
        for (is_output, line) in lines {
            // The log is a help for people; without it the installation goes on.
            let _ = writeln!(self.log, "{line}");
            (self.progress)(&format!("{what}: {}", line.trim()));
            if is_output {
                last_output.clone_from(&line);
            }
            tail.push(line);
            if tail.len() > TAIL {
                tail.remove(0);
            }
        }
        let status = child.wait().with_context(|| name.clone())?;
        if interrupt::requested() {
            bail!("interrupted; the same command begins again");
        }
        if !status.success() {
            bail!(
                "{what} failed ({status}):\n{}\nAll of it is in {}",
                tail.join("\n"),
                self.log_path.display()
            );
        }
        Ok(last_output)
    }
}

/// Asks the engine, so that what is installed has been seen to start.
fn versions(
    external: &External,
    environment: &Environment,
    steps: &mut Steps<'_>,
) -> Result<serde_json::Value> {
    let words = &external.declaration.version;
    if words.is_empty() {
        return Ok(serde_json::Value::Null);
    }
    let invocation = external.invocation_with(words, Some(&environment.python()))?;
    let mut command = Command::new(&invocation.program);
    command.args(&invocation.arguments).envs(&invocation.variables);
    let line = steps.run("asking for its versions", command)?;
    Ok(serde_json::from_str(&line).unwrap_or(serde_json::Value::String(line)))
}

/// Every package leaves a folder with its metadata.
fn count_packages(environment: &Environment) -> usize {
    fn count(folder: &Path, depth: usize) -> usize {
        let Ok(entries) = std::fs::read_dir(folder) else { return 0 };
        let of = |entry: std::fs::DirEntry| {
            let name = entry.file_name();
            match name.to_string_lossy().ends_with(".dist-info") {
                true => 1,
                // On some systems lib64 is a link to lib.
                false if depth > 0 && entry.file_type().is_ok_and(|kind| kind.is_dir()) => {
                    count(&entry.path(), depth - 1)
                }
                false => 0,
            }
        };
        entries.flatten().map(of).sum()
    }
    // lib/python3.11/site-packages, or Lib/site-packages.
    count(&environment.folder, 3)
}

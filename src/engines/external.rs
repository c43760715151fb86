//! Engines outside this program: commands that speak the worker protocol, declared in an `engines.toml`.

use super::environment::{Environment, State};
use crate::folders::data_dir;
use crate::measure::memory::has_nvidia_gpu;
use anyhow::{Context, Result, bail};
use evalfw_engine::protocol::DeviceKind;
use include_dir::{Dir, include_dir};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The Python package with its engines, as it is in the repository.
static PACKAGE: Dir<'_> = include_dir!("$CARGO_MANIFEST_DIR/backends/python/evalfw_engines");
static REQUIREMENTS: Dir<'_> = include_dir!("$CARGO_MANIFEST_DIR/backends/python/requirements");
const BROUGHT_ALONG: &str = include_str!("../../backends/python/engines.toml");

/// An engine as it is declared.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Declaration {
    /// As on the command line.
    pub name: String,
    pub summary: String,
    /// Program and arguments. `{here}` is the folder of the file, `{python}` the interpreter of the environment that
    /// `evalfw engines install` makes.
    pub command: Vec<String>,
    /// Prints the versions, on one line.
    #[serde(default)]
    pub version: Vec<String>,
    /// What it can compute on, e.g. `cpu`, `cuda`, `metal`. For people.
    #[serde(default)]
    pub devices: Vec<String>,
    /// Environment variables of the process.
    #[serde(default)]
    pub variables: BTreeMap<String, String>,
    /// Handicaps on some devices that a reader of the figures has to know.
    #[serde(default)]
    pub handicaps: Vec<Handicap>,
    pub install: Option<Install>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Handicap {
    /// As in `devices`, or `any`.
    pub on: String,
    pub what: String,
}

/// How the environment of a Python engine is made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Install {
    /// The oldest and the newest Python that there are packages for.
    pub python: [String; 2],
    /// As in [`Packages`], which they make.
    requirements: PathBuf,
    download_gb: f64,
    installed_gb: f64,
    note: Option<String>,
    /// In place of these under Linux with an NVIDIA GPU, where a framework has another build for that.
    nvidia: Option<Packages>,
}

/// What is installed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Packages {
    /// A file of pinned and hashed requirements, beside the declaring file.
    pub requirements: PathBuf,
    /// About so much is downloaded, and lies on the disk then.
    pub download_gb: f64,
    pub installed_gb: f64,
    /// Said before it begins.
    pub note: Option<String>,
}

/// A declared engine, and where its files are.
#[derive(Debug, Clone)]
pub struct External {
    pub declaration: Declaration,
    home: Home,
}

#[derive(Debug, Clone)]
enum Home {
    /// In this program, unpacked when they are needed.
    Program,
    Folder(PathBuf),
}

/// A process to become, or to start.
#[derive(Debug, PartialEq)]
pub struct Invocation {
    pub program: PathBuf,
    pub arguments: Vec<String>,
    pub variables: BTreeMap<String, String>,
    /// It has an environment of its own.
    pub is_isolated: bool,
}

/// Why an engine cannot be started, and what to do.
#[derive(Debug, PartialEq)]
pub struct Missing {
    pub reason: String,
    pub advice: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    engine: Vec<Declaration>,
}

/// The engines that the program brings along.
pub fn brought_along() -> Result<Vec<External>> {
    declarations(BROUGHT_ALONG, &Home::Program).context("backends/python/engines.toml (built in)")
}

/// The engines that `text`, a file in `folder`, declares.
pub fn parse(text: &str, folder: &Path) -> Result<Vec<External>> {
    declarations(text, &Home::Folder(folder.to_owned()))
}

fn declarations(text: &str, home: &Home) -> Result<Vec<External>> {
    let file: File = toml::from_str(text)?;
    let mut all: Vec<External> = Vec::new();
    for (index, declaration) in file.engine.into_iter().enumerate() {
        let place = || format!("engine[{index}] ({})", declaration.name);
        declaration.check().with_context(place)?;
        if all.iter().any(|other| other.name() == declaration.name) {
            bail!("{}: declared twice", place());
        }
        all.push(External { declaration, home: home.clone() });
    }
    Ok(all)
}

impl Declaration {
    fn check(&self) -> Result<()> {
        let is_plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-_.".contains(c);
        // Names are parts of file names and of the names of cells.
        if self.name.is_empty() || !self.name.chars().all(is_plain) || self.name.starts_with(['-', '.']) {
            bail!("name: lower-case letters, digits, `-`, `_` and `.` only");
        }
        if super::ENGINES.iter().any(|engine| engine.name == self.name) {
            bail!("name: a built-in engine is called so");
        }
        if self.command.first().is_none_or(|program| program.is_empty()) {
            bail!("command: empty");
        }
        let Some(install) = &self.install else {
            return match self.command.iter().any(|word| word.contains("{python}")) {
                true => bail!(
                    "command: `{{python}}` is the interpreter of an environment, and there is no [engine.install]"
                ),
                false => Ok(()),
            };
        };
        install.range().map(drop)
    }
}

impl Install {
    /// The oldest and the newest Python, as (major, minor).
    pub fn range(&self) -> Result<[(u32, u32); 2]> {
        let parse = |text: &String| -> Option<(u32, u32)> {
            let (major, minor) = text.split_once('.')?;
            Some((major.parse().ok()?, minor.parse().ok()?))
        };
        match self.python.each_ref().map(parse) {
            [Some(oldest), Some(newest)] if oldest <= newest => Ok([oldest, newest]),
            _ => bail!("install.python: two versions such as [\"3.10\", \"3.13\"], the older one first"),
        }
    }

    /// What is installed on this machine.
    pub fn packages(&self) -> Packages {
        self.packages_with(cfg!(target_os = "linux") && has_nvidia_gpu())
    }

    fn packages_with(&self, nvidia: bool) -> Packages {
        let usual = || Packages {
            requirements: self.requirements.clone(),
            download_gb: self.download_gb,
            installed_gb: self.installed_gb,
            note: self.note.clone(),
        };
        self.nvidia.clone().filter(|_| nvidia).unwrap_or_else(usual)
    }
}

impl External {
    pub fn name(&self) -> &str {
        &self.declaration.name
    }

    /// What is declared of it on such a device.
    pub fn handicaps(&self, device: DeviceKind) -> Vec<String> {
        let on_cpu = device == DeviceKind::Cpu;
        let applies = |handicap: &&Handicap| handicap.on == "any" || (handicap.on == "cpu") == on_cpu;
        self.declaration.handicaps.iter().filter(applies).map(|handicap| handicap.what.clone()).collect()
    }

    /// How its environment is made.
    pub fn install(&self) -> Result<&Install> {
        let install = self.declaration.install.as_ref();
        install.with_context(|| {
            format!("{} is declared without [engine.install]: there is nothing to install", self.name())
        })
    }

    /// Where its environment is, if it has one.
    pub fn environment(&self) -> Result<Option<Environment>> {
        let Some(install) = &self.declaration.install else { return Ok(None) };
        Environment::of(self.name(), &self.requirements(&install.packages())?).map(Some)
    }

    /// The text of the pinned requirements.
    pub fn requirements(&self, packages: &Packages) -> Result<String> {
        match &self.home {
            Home::Folder(folder) => {
                let path = folder.join(&packages.requirements);
                std::fs::read_to_string(&path).with_context(|| path.display().to_string())
            }
            Home::Program => {
                let name = packages.requirements.file_name().map(Path::new).unwrap_or(Path::new(""));
                let file = REQUIREMENTS.get_file(name).and_then(|file| file.contents_utf8());
                file.map(str::to_owned).with_context(|| format!("{} is not built in", name.display()))
            }
        }
    }

    /// How it is started; `Err` inside where something is missing for that.
    pub fn invocation(&self) -> Result<Result<Invocation, Missing>> {
        self.becoming(&self.declaration.command)
    }

    /// How it is asked for its versions.
    pub fn version_invocation(&self) -> Result<Option<Result<Invocation, Missing>>> {
        match self.declaration.version.is_empty() {
            true => Ok(None),
            false => self.becoming(&self.declaration.version).map(Some),
        }
    }

    /// `words` with the environment that is there.
    fn becoming(&self, words: &[String]) -> Result<Result<Invocation, Missing>> {
        let python = match self.environment()? {
            None => None,
            Some(environment) => match environment.state() {
                State::Ready(_) => Some(environment.python()),
                state => return Ok(Err(self.missing(&state))),
            },
        };
        self.invocation_with(words, python.as_deref()).map(Ok)
    }

    /// `words` with the interpreter at `python`, be its environment whole or not.
    pub fn invocation_with(&self, words: &[String], python: Option<&Path>) -> Result<Invocation> {
        let here = match &self.home {
            Home::Folder(folder) => folder.clone(),
            Home::Program => unpacked()?,
        };
        let python = python.map(|python| python.display().to_string()).unwrap_or_default();
        let here = here.display().to_string();
        let fill = |word: &String| word.replace("{here}", &here).replace("{python}", &python);
        let mut words = words.iter().map(fill);
        let program = PathBuf::from(words.next().unwrap_or_default());
        let variables = self.declaration.variables.iter().map(|(name, value)| (name.clone(), fill(value)));
        Ok(Invocation {
            program,
            arguments: words.collect(),
            variables: variables.collect(),
            is_isolated: self.declaration.install.is_some(),
        })
    }

    fn missing(&self, state: &State) -> Missing {
        let name = self.name();
        let size = self.declaration.install.as_ref().map_or(0.0, |install| install.packages().installed_gb);
        let (reason, command) = match state {
            State::Missing => (format!("{name} is not installed"), format!("evalfw engines install {name}")),
            State::HalfMade => (
                format!("the installation of {name} did not come to its end"),
                format!("evalfw engines install {name}"),
            ),
            State::Outdated => (
                format!("{name} was installed with other versions than this evalfw asks for"),
                format!("evalfw engines install {name}"),
            ),
            State::Broken(problem) => (
                format!("the environment of {name} does not work: {problem}"),
                format!("evalfw engines install --force {name}"),
            ),
            State::Ready(_) => (format!("{name} is installed"), String::new()),
        };
        Missing { reason, advice: format!("`{command}` makes its environment ({size:.1} GB)") }
    }
}

/// The Python package on disk. Each version of it has a folder of its own, written once.
fn unpacked() -> Result<PathBuf> {
    let root = data_dir()?.join("python");
    let folder = root.join(digest());
    if folder.is_dir() {
        return Ok(folder);
    }
    let place = || format!("{}: cannot be written", root.display());
    std::fs::create_dir_all(&root).with_context(place)?;
    let staging = tempfile::Builder::new().prefix(".unpacking-").tempdir_in(&root).with_context(place)?;
    for (path, contents) in package_files() {
        let target = staging.path().join("evalfw_engines").join(path);
        if let Some(parent) = target.parent() {
            std::fs::create_dir_all(parent).with_context(place)?;
        }
        std::fs::write(&target, contents).with_context(|| target.display().to_string())?;
    }
    match std::fs::rename(staging.path(), &folder) {
        // Another process was faster.
        Err(_) if folder.is_dir() => Ok(folder),
        Err(error) => Err(error).with_context(place),
        Ok(()) => Ok(folder),
    }
}

/// Without what an interpreter leaves beside its sources.
fn package_files() -> Vec<(&'static Path, &'static [u8])> {
    fn collect(dir: &'static Dir<'_>, files: &mut Vec<(&'static Path, &'static [u8])>) {
        let sources = dir.files().filter(|file| file.path().extension().is_some_and(|e| e == "py"));
        files.extend(sources.map(|file| (file.path(), file.contents())));
        dir.dirs().for_each(|dir| collect(dir, files));
    }
    let mut files = Vec::new();
    collect(&PACKAGE, &mut files);
    files.sort();
    files
}

fn digest() -> String {
    let mut hash = Sha256::new();
    for (path, contents) in package_files() {
        hash.update(path.as_os_str().as_encoded_bytes());
        hash.update((contents.len() as u64).to_le_bytes());
        hash.update(contents);
    }
    hash.finalize().iter().take(6).map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(text: &str) -> String {
        format!("{:#}", parse(text, Path::new("/here")).unwrap_err())
    }

    const MINE: &str =
        "[[engine]]\nname = \"mine\"\nsummary = \"Mine\"\ncommand = [\"{here}/mine\", \"--fast\"]\n";

    #[test]
    fn what_is_brought_along_is_sound() {
        let all = brought_along().unwrap();
        assert_eq!(all.iter().map(External::name).collect::<Vec<_>>(), ["peft", "mlx-lm", "axolotl"]);
        for engine in &all {
            let install = engine.declaration.install.as_ref().unwrap();
            for packages in [false, true].map(|nvidia| install.packages_with(nvidia)) {
                let text = engine.requirements(&packages).unwrap();
                assert!(text.contains("--hash=sha256:"), "{}", engine.name());
                assert!(packages.installed_gb > 0.0 && packages.download_gb > 0.0);
                let is_cuda = text.contains("\nmlx-cuda");
                assert_eq!(is_cuda, engine.name() == "mlx-lm" && packages.installed_gb > 1.0);
            }
        }
        assert!(package_files().iter().any(|(path, _)| path.ends_with("protocol.py")));
    }

    #[test]
    fn a_command_knows_where_it_is_declared() {
        let engines = parse(MINE, Path::new("/here")).unwrap();
        let invocation = engines[0].invocation().unwrap().unwrap();
        assert_eq!(invocation.program, Path::new("/here/mine"));
        assert_eq!(invocation.arguments, ["--fast"]);
    }

    #[test]
    fn bad_declarations_name_the_engine_and_the_key() {
        for (from, to, words) in [
            ("name = \"mine\"", "name = \"My Engine\"", ["engine[0]", "name"]),
            ("name = \"mine\"", "name = \"candle-cpu\"", ["engine[0]", "built-in"]),
            ("command = [\"{here}/mine\", \"--fast\"]", "command = []", ["mine", "command"]),
            ("{here}/mine", "{python}", ["mine", "engine.install"]),
            ("summary", "sumary", ["sumary", "summary"]),
        ] {
            let message = error(&MINE.replace(from, to));
            assert!(words.iter().all(|word| message.contains(word)), "{message}");
        }
        assert!(error(&format!("{MINE}{MINE}")).contains("twice"));
        let install = "[engine.install]\npython = [\"3.13\", \"3.10\"]\nrequirements = \"r.txt\"\ndownload_gb = 1\n\
                       installed_gb = 1\n";
        assert!(error(&format!("{MINE}{install}")).contains("install.python"));
    }
}

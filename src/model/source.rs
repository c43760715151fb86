//! From what the user typed after `--model` to a folder with a checkpoint.

use super::hub::{self, HubSettings};
use super::presets::Preset;
use super::synth::{self, Marker, Outcome, SynthOptions};
use super::{Error, Result, bars};
use crate::folders::cache_dir;
use std::fs;
use std::path::{Path, PathBuf};

/// What a `--model` argument means.
#[derive(Debug, Clone, PartialEq)]
pub enum ModelSource {
    /// A local Hugging Face folder.
    Folder(PathBuf),
    /// A model that evalfw writes by itself.
    Preset(Preset),
    /// ORG/NAME on the hub.
    Hub(String),
}

/// What resolving a model needs to know.
pub struct Context<'a> {
    /// evalfw's own cache, where presets are written.
    pub cache: PathBuf,
    /// Of the weights of presets.
    pub seed: u64,
    pub hub: HubSettings,
    /// Told what the user may want to know, a line at a time.
    pub notify: &'a mut dyn FnMut(&str),
}

impl<'a> Context<'a> {
    /// The settings of the environment; [`cache_dir`] and [`HubSettings::from_env`] say which.
    pub fn from_env(notify: &'a mut dyn FnMut(&str)) -> Result<Self> {
        let seed = SynthOptions::default().seed;
        Ok(Self { cache: cache_dir()?, seed, hub: HubSettings::from_env()?, notify })
    }
}

/// A model that is on this disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResolvedModel {
    /// For reports.
    pub name: String,
    /// Absolute, so that a worker finds it from wherever it runs.
    pub dir: PathBuf,
    /// The weights are random: good for speed and memory, not for text.
    pub synthetic: bool,
    pub origin: Origin,
    /// The commit on the hub.
    pub revision: Option<String>,
}

/// Where a model came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    Folder,
    Preset { seed: u64 },
    Hub { endpoint: String },
}

impl ModelSource {
    /// An existing path wins, then a preset's name, then ORG/NAME.
    pub fn parse(spec: &str) -> Result<Self> {
        let path = Path::new(spec);
        if path.is_dir() {
            return Ok(Self::Folder(path.to_owned()));
        }
        if path.exists() {
            return Err(Error::NotAFolder { path: path.to_owned() });
        }
        if let Ok(preset) = Preset::parse(spec) {
            return Ok(Self::Preset(preset));
        }
        if hub::is_id(spec) {
            return Ok(Self::Hub(spec.to_owned()));
        }
        Err(Error::UnknownModel { spec: spec.to_owned(), presets: Preset::names() })
    }

    /// Finds the model that `spec` names; writes or downloads it if need be.
    pub fn resolve(spec: &str, context: &mut Context) -> Result<ResolvedModel> {
        match Self::parse(spec)? {
            Self::Folder(dir) => folder(&dir),
            Self::Preset(preset) => cached(&preset, context),
            Self::Hub(id) => from_hub(id, context),
        }
    }
}

fn folder(dir: &Path) -> Result<ResolvedModel> {
    // Without links and dots, so that `.` has a name too.
    let dir = fs::canonicalize(dir).map_err(Error::io(dir))?;
    let marker = Marker::read(&dir)?;
    let synthetic = marker.is_some();
    let own_name = || dir.file_name().unwrap_or(dir.as_os_str()).to_string_lossy().into_owned();
    let name = marker.map_or_else(own_name, |marker| marker.name);
    Ok(ResolvedModel { name, dir, synthetic, origin: Origin::Folder, revision: None })
}

/// The preset's checkpoint in the cache, written if it is not there.
fn cached(preset: &Preset, context: &mut Context) -> Result<ResolvedModel> {
    let seed = context.seed;
    let dir = context.cache.join("models").join(format!("{}-seed{seed}", preset.name));
    let options = SynthOptions { seed, ..Default::default() };
    let outcome = match write(preset, &dir, &options) {
        // The cache is evalfw's own: what is there is of another version, or was damaged.
        Err(Error::Occupied { .. }) => {
            (context.notify)(&format!("replacing {}, which another version wrote", dir.display()));
            fs::remove_dir_all(&dir).map_err(Error::io(&dir))?;
            write(preset, &dir, &options)?
        }
        other => other?,
    };
    let verb = if outcome == Outcome::AlreadyThere { "reusing" } else { "wrote" };
    (context.notify)(&format!("{verb} {} in {}", preset.name, dir.display()));
    let origin = Origin::Preset { seed };
    Ok(ResolvedModel { name: preset.name.clone(), dir, synthetic: true, origin, revision: None })
}

fn write(preset: &Preset, dir: &Path, options: &SynthOptions) -> Result<Outcome> {
    let bar = bars::bytes(&preset.name, preset.checkpoint_bytes());
    let outcome = synth::write(preset, dir, options, &mut |done, _| bar.set_position(done));
    bar.finish_and_clear();
    outcome
}

fn from_hub(id: String, context: &mut Context) -> Result<ResolvedModel> {
    let snapshot = hub::fetch(&id, &context.hub, context.notify)?;
    let origin = Origin::Hub { endpoint: context.hub.endpoint.clone() };
    let dir = std::path::absolute(&snapshot.dir).map_err(Error::io(&snapshot.dir))?;
    Ok(ResolvedModel { name: id, dir, synthetic: false, origin, revision: Some(snapshot.commit) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn resolve(spec: &str, cache: &Path) -> (Result<ResolvedModel>, Vec<String>) {
        let mut lines = Vec::new();
        let mut notify = |line: &str| lines.push(line.to_owned());
        let hub = HubSettings {
            endpoint: "http://127.0.0.1:9".into(),
            cache: cache.join("hub"),
            token: None,
            attempts: 1,
            pause: Duration::ZERO,
        };
        let mut context = Context { cache: cache.to_owned(), seed: 3, hub, notify: &mut notify };
        let resolved = ModelSource::resolve(spec, &mut context);
        (resolved, lines)
    }

    #[test]
    fn a_spec_is_a_folder_a_preset_or_a_hub_id() {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().to_str().unwrap();
        assert_eq!(ModelSource::parse(folder).unwrap(), ModelSource::Folder(root.path().to_owned()));
        let preset = Preset::parse("0.5b").unwrap();
        assert_eq!(ModelSource::parse("qwen2.5-coder-0.5b").unwrap(), ModelSource::Preset(preset));
        let id = "Qwen/Qwen2.5-Coder-7B-Instruct";
        assert_eq!(ModelSource::parse(id).unwrap(), ModelSource::Hub(id.into()));
        for unknown in ["9b", "./missing", "/missing/model", "a/b/c", ""] {
            let error = ModelSource::parse(unknown).unwrap_err().to_string();
            assert!(error.contains("tiny") && error.contains("qwen2.5-coder-32b"), "{error}");
        }
    }

    #[test]
    fn a_file_is_not_taken_for_a_model() {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("model.safetensors");
        fs::write(&file, "").unwrap();
        let error = ModelSource::parse(file.to_str().unwrap()).unwrap_err().to_string();
        assert!(error.contains("is a file"), "{error}");
    }

    #[test]
    fn a_preset_is_written_once_and_reused() {
        let cache = tempfile::tempdir().unwrap();
        let (first, lines) = resolve("tiny", cache.path());
        assert!(lines.last().unwrap().starts_with("wrote tiny"), "{lines:?}");
        let (second, lines) = resolve("tiny", cache.path());
        assert!(lines.last().unwrap().starts_with("reusing tiny"), "{lines:?}");
        let first = first.unwrap();
        assert_eq!(first, second.unwrap());
        assert!(first.synthetic && first.dir.is_absolute());
        assert_eq!((first.name.as_str(), &first.origin), ("tiny", &Origin::Preset { seed: 3 }));
    }

    #[test]
    fn a_damaged_preset_is_written_anew() {
        let cache = tempfile::tempdir().unwrap();
        let dir = resolve("tiny", cache.path()).0.unwrap().dir;
        fs::remove_file(dir.join("model.safetensors")).unwrap();
        let (again, lines) = resolve("tiny", cache.path());
        assert!(lines[0].starts_with("replacing"), "{lines:?}");
        assert!(again.unwrap().dir.join("model.safetensors").exists());
    }

    #[test]
    fn a_folder_is_synthetic_only_with_the_marker() {
        let cache = tempfile::tempdir().unwrap();
        let written = resolve("tiny", cache.path()).0.unwrap().dir;
        let found = resolve(written.to_str().unwrap(), cache.path()).0.unwrap();
        assert_eq!((found.name.as_str(), found.synthetic, found.origin), ("tiny", true, Origin::Folder));

        let other = cache.path().join("mine");
        fs::create_dir(&other).unwrap();
        let found = resolve(other.to_str().unwrap(), cache.path()).0.unwrap();
        assert_eq!((found.name.as_str(), found.synthetic), ("mine", false));
    }

    #[test]
    fn a_hub_that_is_not_there_is_said_with_the_next_step() {
        let cache = tempfile::tempdir().unwrap();
        let error = resolve("org/name", cache.path()).0.unwrap_err().to_string();
        assert!(error.contains("http://127.0.0.1:9/api/models/org/name"), "{error}");
        assert!(error.contains("HF_ENDPOINT") && error.contains("--model DIR"), "{error}");
    }
}

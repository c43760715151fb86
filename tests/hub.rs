//! `--model ORG/NAME` against a hub on this machine.

#[path = "support/hub_server.rs"]
mod hub_server;

use evalfw::model::synth::{self, SynthOptions};
use evalfw::model::{Context, HubSettings, ModelSource, Origin, Preset, ResolvedModel};
use evalfw_engine::checkpoint::Checkpoint;
use hub_server::{Files, Hub, Request, State};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tempfile::TempDir;

const ID: &str = "org/small-model";
const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
const WEIGHTS: &str = "model.safetensors";

/// A model of some 50 KB with files that are nobody's business.
fn repository(max_shard_bytes: u64) -> Files {
    let mut preset = Preset::parse("tiny").unwrap();
    preset.config.vocab_size = 300;
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("model");
    synth::write(&preset, &dir, &SynthOptions { seed: 1, max_shard_bytes }, &mut |_, _| ()).unwrap();
    let read =
        |entry: fs::DirEntry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap());
    let mut files: Files = fs::read_dir(dir).unwrap().map(|entry| read(entry.unwrap())).collect();
    files.insert("README.md".into(), b"# A model".to_vec());
    files.insert("pytorch_model.bin".into(), vec![0; 1000]);
    files
}

fn hub_with(files: Files) -> Hub {
    let repos = [(ID.to_owned(), files)].into();
    Hub::start(State { repos, commit: COMMIT.into(), ..Default::default() })
}

/// A user's machine: its caches and settings.
struct Machine {
    root: TempDir,
    token: Option<String>,
    attempts: u32,
}

impl Machine {
    fn new() -> Self {
        Self { root: tempfile::tempdir().unwrap(), token: None, attempts: 1 }
    }

    fn resolve(&self, spec: &str, hub: &Hub) -> (Result<ResolvedModel, String>, Vec<String>) {
        self.resolve_at(spec, hub.endpoint())
    }

    fn resolve_at(&self, spec: &str, endpoint: String) -> (Result<ResolvedModel, String>, Vec<String>) {
        let mut lines = Vec::new();
        let mut notify = |line: &str| lines.push(line.to_owned());
        let hub = HubSettings {
            endpoint,
            cache: self.root.path().join("hub"),
            token: self.token.clone(),
            attempts: self.attempts,
            pause: Duration::ZERO,
        };
        let mut context = Context { cache: self.root.path().join("own"), seed: 0, hub, notify: &mut notify };
        let resolved = ModelSource::resolve(spec, &mut context).map_err(|e| e.to_string());
        (resolved, lines)
    }

    fn blobs(&self) -> Vec<PathBuf> {
        let dir = self.root.path().join("hub/models--org--small-model/blobs");
        fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect()
    }

    fn partial(&self) -> Option<PathBuf> {
        self.blobs().into_iter().find(|path| path.extension().is_some_and(|e| e == "part"))
    }
}

/// The requests that moved a file's contents, and not just its first byte.
fn transfers(log: &[Request]) -> Vec<&Request> {
    let contents = |r: &&Request| !r.path.starts_with("/api/") && r.status < 300 && r.sent > 1;
    log.iter().filter(contents).collect()
}

fn assert_same_files(dir: &Path, files: &Files, names: &[&str]) {
    for name in names {
        let found = fs::read(dir.join(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert!(found == files[*name], "{name}");
    }
}

#[test]
fn a_model_arrives_whole_with_its_commit_and_without_the_rest_of_the_repository() {
    let files = repository(u64::MAX);
    let hub = hub_with(files.clone());
    let machine = Machine::new();
    let resolved = machine.resolve(ID, &hub).0.unwrap();
    assert_eq!(resolved.name, ID);
    assert_eq!(resolved.revision.as_deref(), Some(COMMIT));
    assert_eq!(resolved.origin, Origin::Hub { endpoint: hub.endpoint() });
    let expected =
        ["config.json", "generation_config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json"];
    assert_same_files(&resolved.dir, &files, &expected);
    assert_eq!(fs::read_dir(&resolved.dir).unwrap().count(), expected.len());
    Checkpoint::open(&resolved.dir).unwrap();
}

#[test]
fn a_second_resolve_transfers_nothing() {
    let hub = hub_with(repository(u64::MAX));
    let machine = Machine::new();
    let first = machine.resolve(ID, &hub).0.unwrap();
    assert!(!transfers(&hub.take_log()).is_empty());
    let second = machine.resolve(ID, &hub).0.unwrap();
    assert_eq!(first, second);
    let log = hub.take_log();
    assert!(log.iter().all(|r| r.path.starts_with("/api/")), "{log:?}");
}

#[test]
fn the_shards_of_an_index_arrive() {
    let files = repository(20_000);
    let hub = hub_with(files.clone());
    let machine = Machine::new();
    let resolved = machine.resolve(ID, &hub).0.unwrap();
    let shards: Vec<&str> =
        files.keys().map(String::as_str).filter(|name| name.ends_with(".safetensors")).collect();
    assert!(shards.len() > 1);
    assert_same_files(&resolved.dir, &files, &shards);
    Checkpoint::open(&resolved.dir).unwrap();
}

#[test]
fn of_a_single_file_and_an_index_only_the_single_file_arrives() {
    let mut files = repository(20_000);
    let single = repository(u64::MAX)[WEIGHTS].clone();
    files.insert(WEIGHTS.into(), single);
    let hub = hub_with(files.clone());
    let machine = Machine::new();
    let resolved = machine.resolve(ID, &hub).0.unwrap();
    assert_same_files(&resolved.dir, &files, &[WEIGHTS]);
    assert_eq!(Checkpoint::open(&resolved.dir).unwrap().files().len(), 1);
    assert!(
        !fs::read_dir(&resolved.dir)
            .unwrap()
            .any(|e| e.unwrap().file_name() == "model.safetensors.index.json")
    );
}

#[test]
fn files_that_a_model_can_do_without_may_be_missing() {
    let mut files = repository(u64::MAX);
    files.remove("generation_config.json");
    files.remove("tokenizer_config.json");
    let hub = hub_with(files);
    Checkpoint::open(&Machine::new().resolve(ID, &hub).0.unwrap().dir).unwrap();
}

#[test]
fn a_repository_without_what_a_model_needs_is_refused_before_the_download() {
    for file in ["config.json", "tokenizer.json", WEIGHTS] {
        let mut files = repository(u64::MAX);
        files.remove(file);
        let hub = hub_with(files);
        let error = Machine::new().resolve(ID, &hub).0.unwrap_err();
        assert!(error.contains(&format!("has no {file}")), "{error}");
        let log = hub.take_log();
        assert!(transfers(&log).is_empty(), "{file}: {log:?}");
    }
}

#[test]
fn a_transfer_that_was_cut_goes_on_with_the_next_call() {
    let files = repository(u64::MAX);
    let hub = hub_with(files.clone());
    let machine = Machine::new();
    hub.state.lock().unwrap().cut = Some((WEIGHTS.into(), 10_000));
    let error = machine.resolve(ID, &hub).0.unwrap_err();
    assert!(error.contains(WEIGHTS) && error.contains("run again"), "{error}");
    let part = machine.partial().unwrap();
    assert_eq!(fs::metadata(part).unwrap().len(), 10_000);

    hub.take_log();
    let resolved = machine.resolve(ID, &hub).0.unwrap();
    assert_same_files(&resolved.dir, &files, &[WEIGHTS]);
    let log = hub.take_log();
    let moved = transfers(&log);
    assert_eq!(moved.len(), 1, "{log:?}");
    assert_eq!(moved[0].range.as_deref(), Some("bytes=10000-"));
}

#[test]
fn a_transfer_that_was_cut_is_tried_again_within_a_call() {
    let files = repository(u64::MAX);
    let hub = hub_with(files.clone());
    let machine = Machine { attempts: 2, ..Machine::new() };
    hub.state.lock().unwrap().cut = Some((WEIGHTS.into(), 10_000));
    let (resolved, lines) = machine.resolve(ID, &hub);
    assert_same_files(&resolved.unwrap().dir, &files, &[WEIGHTS]);
    assert!(lines.iter().any(|line| line.contains(WEIGHTS) && line.contains("trying again")), "{lines:?}");
}

#[test]
fn a_hub_that_cannot_resume_does_not_spoil_the_file() {
    let files = repository(u64::MAX);
    let hub = hub_with(files.clone());
    let machine = Machine { attempts: 3, ..Machine::new() };
    {
        let mut state = hub.state.lock().unwrap();
        state.cut = Some((WEIGHTS.into(), 10_000));
        state.never_resumes = true;
    }
    let (resolved, lines) = machine.resolve(ID, &hub);
    assert_same_files(&resolved.unwrap().dir, &files, &[WEIGHTS]);
    assert!(lines.iter().any(|line| line.contains("bytes arrived instead of")), "{lines:?}");
}

#[test]
fn a_file_that_was_complete_but_not_yet_in_place_is_not_transferred_again() {
    let files = repository(u64::MAX);
    let hub = hub_with(files.clone());
    let machine = Machine::new();
    let resolved = machine.resolve(ID, &hub).0.unwrap();
    let weights = files[WEIGHTS].len() as u64;
    let blob = machine.blobs().into_iter().find(|path| fs::metadata(path).unwrap().len() == weights).unwrap();
    fs::rename(&blob, blob.with_extension("part")).unwrap();
    fs::remove_file(resolved.dir.join(WEIGHTS)).unwrap();

    hub.take_log();
    machine.resolve(ID, &hub).0.unwrap();
    assert_same_files(&resolved.dir, &files, &[WEIGHTS]);
    assert!(transfers(&hub.take_log()).is_empty());
}

#[test]
fn a_blob_that_was_deleted_from_the_cache_is_transferred_again() {
    let files = repository(u64::MAX);
    let hub = hub_with(files.clone());
    let machine = Machine::new();
    let resolved = machine.resolve(ID, &hub).0.unwrap();
    machine.blobs().into_iter().for_each(|blob| fs::remove_file(blob).unwrap());
    machine.resolve(ID, &hub).0.unwrap();
    assert_same_files(&resolved.dir, &files, &[WEIGHTS, "config.json", "tokenizer.json"]);
}

#[test]
fn a_new_commit_costs_only_what_it_changed() {
    let files = repository(u64::MAX);
    let hub = hub_with(files.clone());
    let machine = Machine::new();
    machine.resolve(ID, &hub).0.unwrap();
    hub.take_log();

    let mut newer = files.clone();
    newer.insert("generation_config.json".into(), b"{\"do_sample\": true}".to_vec());
    let commit = COMMIT.replace('0', "f");
    {
        let mut state = hub.state.lock().unwrap();
        state.repos.insert(ID.into(), newer.clone());
        state.commit = commit.clone();
    }
    let resolved = machine.resolve(ID, &hub).0.unwrap();
    assert_eq!(resolved.revision, Some(commit));
    assert_same_files(&resolved.dir, &newer, &[WEIGHTS, "generation_config.json", "config.json"]);
    let log = hub.take_log();
    assert!(!transfers(&log).iter().any(|r| r.path.contains("safetensors")), "{log:?}");
}

#[test]
fn without_the_hub_an_earlier_download_is_used_and_said_so() {
    let hub = hub_with(repository(u64::MAX));
    let machine = Machine::new();
    let first = machine.resolve(ID, &hub).0.unwrap();
    let nobody = "http://127.0.0.1:9".to_owned();
    let (second, lines) = machine.resolve_at(ID, nobody.clone());
    assert_eq!(second.unwrap().dir, first.dir);
    assert!(lines[0].contains("earlier download"), "{lines:?}");

    fs::remove_file(first.dir.join(WEIGHTS)).unwrap();
    let error = machine.resolve_at(ID, nobody).0.unwrap_err();
    assert!(error.contains("HF_ENDPOINT"), "{error}");
}

#[test]
fn a_private_model_needs_the_token() {
    let hub = hub_with(repository(u64::MAX));
    hub.state.lock().unwrap().token = Some("secret".into());
    let with = |token: Option<&str>| {
        let machine = Machine { token: token.map(str::to_owned), ..Machine::new() };
        machine.resolve(ID, &hub).0
    };
    let error = with(None).unwrap_err();
    assert!(error.contains(ID) && error.contains("401") && error.contains("set HF_TOKEN"), "{error}");
    let error = with(Some("wrong")).unwrap_err();
    assert!(error.contains("check HF_TOKEN") && !error.contains("wrong"), "{error}");
    assert_eq!(with(Some("secret")).unwrap().revision.as_deref(), Some(COMMIT));
}

#[test]
fn a_gated_model_needs_its_licence_accepted() {
    let hub = hub_with(repository(u64::MAX));
    hub.state.lock().unwrap().gated = true;
    let error = Machine { token: Some("t".into()), ..Machine::new() }.resolve(ID, &hub).0.unwrap_err();
    assert!(error.contains("403") && error.contains(&format!("{}/{ID}", hub.endpoint())), "{error}");
    assert!(error.contains("licence") && error.contains("config.json"), "{error}");
}

#[test]
fn a_model_that_is_not_there_is_named_with_the_address_asked() {
    let hub = hub_with(repository(u64::MAX));
    let machine = Machine { token: Some("t".into()), ..Machine::new() };
    let error = machine.resolve("org/another", &hub).0.unwrap_err();
    assert!(error.contains(&format!("{}/api/models/org/another", hub.endpoint())), "{error}");
    assert!(error.contains("no model org/another") && error.contains("check the name"), "{error}");
}

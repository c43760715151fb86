//! Downloads a model from the Hugging Face hub into the cache that Python's `huggingface_hub` uses too.
//!
//! hf-hub transfers the files. Around it, this module fixes the commit that all files come from, takes
//! only the files that a model needs, and makes transfers resumable in the cases that hf-hub 0.5 gets
//! wrong:
//!
//! - Its own retries start over at byte zero, yet append to what is there. So they stay off, and each
//!   attempt is a call of its own, which resumes by the length of the partial file.
//! - A partial file that is already complete can never be finished: the server answers 416 to a range that
//!   begins at the end. A complete file of another snapshot is transferred again. Both are adopted here.
//! - The size of a finished file is not checked.

use super::{Error, Result, bars};
use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo, Metadata};
use hf_hub::api::{Progress, RepoInfo};
use hf_hub::{Cache, CacheRepo, Repo, RepoType};
use indicatif::ProgressBar;
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

const DEFAULT_ENDPOINT: &str = "https://huggingface.co";
const CONFIG: &str = "config.json";
const TOKENIZER: &str = "tokenizer.json";
const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";
const OPTIONAL: [&str; 2] = ["generation_config.json", "tokenizer_config.json"];
const BRANCH: &str = "main";

/// Where the hub is and how to talk to it.
#[derive(Debug, Clone)]
pub struct HubSettings {
    pub endpoint: String,
    /// The folder with `models--ORG--NAME`.
    pub cache: PathBuf,
    pub token: Option<String>,
    /// Transfers of a file that may fail, the last one being an error.
    pub attempts: u32,
    /// Before the second attempt; doubled for each further one.
    pub pause: Duration,
}

impl HubSettings {
    /// From `HF_ENDPOINT`, `HF_HOME` and `HF_TOKEN`, with the defaults of Hugging Face's own tools. Without
    /// `HF_TOKEN`, the token that `hf auth login` has stored is used.
    pub fn from_env() -> Result<Self> {
        let variable = |name| std::env::var(name).ok().filter(|value: &String| !value.trim().is_empty());
        let home = match variable("HF_HOME") {
            Some(home) => PathBuf::from(home),
            None => {
                let home = etcetera::home_dir().map_err(|e| Error::NoHubCache(e.to_string()))?;
                home.join(".cache/huggingface")
            }
        };
        let cache = home.join("hub");
        let endpoint = variable("HF_ENDPOINT").unwrap_or_else(|| DEFAULT_ENDPOINT.to_owned());
        Ok(Self {
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            token: variable("HF_TOKEN").or_else(|| Cache::new(cache.clone()).token()),
            cache,
            attempts: 5,
            pause: Duration::from_secs(1),
        })
    }
}

/// A model's files of one commit, on this disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    pub dir: PathBuf,
    pub commit: String,
}

/// Whether `spec` has the form ORG/NAME.
pub fn is_id(spec: &str) -> bool {
    let part = |part: &str| {
        let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        !part.is_empty() && !part.starts_with('.') && part.chars().all(allowed)
    };
    spec.split_once('/').is_some_and(|(org, name)| part(org) && part(name))
}

/// Downloads what is missing of the model `id` (ORG/NAME). `notify` is told what the user may want to
/// know.
pub fn fetch(id: &str, settings: &HubSettings, notify: &mut dyn FnMut(&str)) -> Result<Snapshot> {
    let cache = Cache::new(settings.cache.clone());
    let api = ApiBuilder::from_cache(cache.clone())
        .with_endpoint(settings.endpoint.clone())
        .with_token(settings.token.clone())
        .with_progress(false)
        .with_retries(0)
        .build()
        .map_err(|e| hub_error(&settings.endpoint, e, CHECK_ENDPOINT))?;
    let branch = Repo::with_revision(id.to_owned(), RepoType::Model, BRANCH.to_owned());
    let local = cache.repo(branch.clone());
    let info = match describe(&api, &branch, id, settings) {
        Ok(info) => info,
        Err(Unavailable::Refused(error)) => return Err(error),
        Err(Unavailable::Unreachable(error)) => {
            let Some(snapshot) = complete_snapshot(&local) else { return Err(error) };
            notify(&format!("{error}; using the copy of {id} from an earlier download"));
            return Ok(snapshot);
        }
    };
    let pinned = Repo::with_revision(id.to_owned(), RepoType::Model, info.sha.clone());
    let download = Download {
        remote: api.repo(pinned.clone()),
        api,
        local: cache.repo(pinned),
        dir: local.pointer_path(&info.sha),
        id,
        settings,
    };
    download.model(&info, notify)?;
    // Only now, so that the branch never points to a snapshot with files missing.
    local.create_ref(&info.sha).map_err(Error::io(&settings.cache))?;
    Ok(Snapshot { dir: download.dir, commit: info.sha })
}

const CHECK_ENDPOINT: &str = "check the connection and HF_ENDPOINT, or give a local folder with --model DIR";

fn hub_error(url: &str, problem: impl std::fmt::Display, advice: &str) -> Error {
    Error::Hub { url: url.to_owned(), problem: problem.to_string(), advice: advice.to_owned() }
}

/// Why the hub did not describe a model.
enum Unavailable {
    /// It said no.
    Refused(Error),
    /// It could not be asked.
    Unreachable(Error),
}

/// Asks the hub for the model's files and the commit of its branch.
fn describe(
    api: &Api,
    repo: &Repo,
    id: &str,
    settings: &HubSettings,
) -> std::result::Result<RepoInfo, Unavailable> {
    let url = format!("{}/api/{}", settings.endpoint, repo.api_url());
    let unreachable =
        |problem: &dyn std::fmt::Display| Unavailable::Unreachable(hub_error(&url, problem, CHECK_ENDPOINT));
    let request = api.repo(repo.clone()).info_request().config().http_status_as_error(false).build();
    let mut response = request.call().map_err(|e| unreachable(&e))?;
    let status = response.status().as_u16();
    if let Some(error) = refusal(status, &url, id, settings) {
        return Err(match status {
            429 | 500.. => Unavailable::Unreachable(error),
            _ => Unavailable::Refused(error),
        });
    }
    let info: RepoInfo = response.body_mut().read_json().map_err(|e| {
        Unavailable::Refused(hub_error(&url, format!("not a hub's answer: {e}"), CHECK_ENDPOINT))
    })?;
    // The commit becomes the name of a folder.
    if info.sha.is_empty() || !info.sha.chars().all(|c| c.is_ascii_alphanumeric()) {
        let problem = format!("sha is {:?}, not a commit", info.sha);
        return Err(Unavailable::Refused(hub_error(&url, problem, CHECK_ENDPOINT)));
    }
    Ok(info)
}

/// The error for a status that is none of success.
fn refusal(status: u16, url: &str, id: &str, settings: &HubSettings) -> Option<Error> {
    let page = format!("{}/{id}", settings.endpoint);
    let (problem, advice) = match (status, &settings.token) {
        (200..=299, _) => return None,
        // The hub does not tell a stranger whether a repository exists.
        (401 | 404, None) => (
            format!("the hub shows {id} to no one without a token"),
            format!(
                "check the name; if it is private or gated, accept its licence at {page} and set HF_TOKEN"
            ),
        ),
        (404, _) => (format!("the hub has no model {id}"), "check the name".to_owned()),
        (401, _) => ("the hub does not accept the token".to_owned(), "check HF_TOKEN".to_owned()),
        (403, _) => (
            format!("the hub does not let this account read {id}"),
            format!("accept its licence at {page}, and set HF_TOKEN"),
        ),
        (429, _) => ("too many requests".to_owned(), "try again later, or set HF_TOKEN".to_owned()),
        _ => ("the hub is out of order".to_owned(), "try again later".to_owned()),
    };
    Some(hub_error(url, format!("{problem} (HTTP status {status})"), &advice))
}

/// The snapshot that the branch pointed to when it was last downloaded, if all its files are there.
fn complete_snapshot(local: &CacheRepo) -> Option<Snapshot> {
    let config = local.get(CONFIG)?;
    let dir = config.parent()?.to_owned();
    let weights: BTreeSet<String> = match dir.join(SINGLE).exists() {
        true => [SINGLE.to_owned()].into(),
        false => shards_of(&dir.join(INDEX)).ok()?,
    };
    let complete = weights.iter().all(|file| dir.join(file).exists()) && dir.join(TOKENIZER).exists();
    let commit = dir.file_name()?.to_str()?.to_owned();
    complete.then_some(Snapshot { dir, commit })
}

/// The files that an index names. They become paths, so only plain names are accepted.
fn shards_of(index: &Path) -> Result<BTreeSet<String>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let text = fs::read_to_string(index).map_err(Error::io(index))?;
    let index_file: Index = serde_json::from_str(&text).map_err(|e| Error::file(index, e))?;
    let files: BTreeSet<String> = index_file.weight_map.into_values().collect();
    match files.iter().find(|file| Path::new(file).file_name() != Some(file.as_ref())) {
        Some(bad) => {
            Err(Error::file(index, format_args!("weight_map names {bad}, which is not a plain file name")))
        }
        None => Ok(files),
    }
}

/// The download of one commit of a model.
struct Download<'a> {
    api: Api,
    remote: ApiRepo,
    local: CacheRepo,
    /// Of the snapshot.
    dir: PathBuf,
    id: &'a str,
    settings: &'a HubSettings,
}

impl Download<'_> {
    fn model(&self, info: &RepoInfo, notify: &mut dyn FnMut(&str)) -> Result<()> {
        let offered: BTreeSet<&str> = info.siblings.iter().map(|file| file.rfilename.as_str()).collect();
        let missing = |file: &str| {
            let problem = format!("the repository has no {file}");
            Err(hub_error(&self.remote.url(file), problem, "choose a model in safetensors format"))
        };
        // As transformers chooses where there are both.
        let sharded = offered.contains(INDEX) && !offered.contains(SINGLE);
        let weights = if sharded { INDEX } else { SINGLE };
        if let Some(file) = [CONFIG, TOKENIZER, weights].into_iter().find(|file| !offered.contains(file)) {
            return missing(file);
        }
        self.check_access()?;
        let optional = OPTIONAL.into_iter().filter(|file| offered.contains(file));
        for file in [CONFIG, TOKENIZER].into_iter().chain(optional) {
            self.file(file, notify)?;
        }
        self.file(weights, notify)?;
        if weights == INDEX {
            for shard in shards_of(&self.dir.join(INDEX))? {
                if !offered.contains(shard.as_str()) {
                    return missing(&shard);
                }
                self.file(&shard, notify)?;
            }
        }
        Ok(())
    }

    /// A gated model's description is public, but its files are not.
    fn check_access(&self) -> Result<()> {
        if self.dir.join(CONFIG).exists() {
            return Ok(());
        }
        let url = self.remote.url(CONFIG);
        let request = self.remote.info_request().uri(&url).header("Range", "bytes=0-0");
        let request = request.config().http_status_as_error(false).build();
        let response = request.call().map_err(|e| hub_error(&url, e, CHECK_ENDPOINT))?;
        match refusal(response.status().as_u16(), &url, self.id, self.settings) {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    /// Makes `file` present in the snapshot.
    fn file(&self, file: &str, notify: &mut dyn FnMut(&str)) -> Result<()> {
        let url = self.remote.url(file);
        let mut pause = self.settings.pause;
        let mut left = self.settings.attempts;
        while let Err(problem) = self.attempt(file, &url) {
            left = left.saturating_sub(1);
            if left == 0 {
                let advice = format!("run again to continue where it stopped; {CHECK_ENDPOINT}");
                return Err(hub_error(&url, problem, &advice));
            }
            notify(&format!("{url}: {problem}; trying again"));
            std::thread::sleep(pause);
            pause *= 2;
        }
        Ok(())
    }

    fn attempt(&self, file: &str, url: &str) -> std::result::Result<(), Failure> {
        let place = self.dir.join(file);
        if place.exists() {
            return Ok(());
        }
        if place.is_symlink() {
            // It leads to a blob that someone has deleted.
            fs::remove_file(&place)?;
        }
        let metadata = self.api.metadata(url)?;
        let blob = self.local.blob_path(metadata.etag());
        if self.adopt(&blob, &place, &metadata)? {
            return Ok(());
        }
        self.remote.download_with_progress(file, Bar::new(file))?;
        let found = fs::metadata(&place)?.len();
        if found != metadata.size() as u64 {
            // Not what the hub has, so not worth resuming from.
            fs::remove_file(&place)?;
            fs::remove_file(&blob)?;
            return Err(Failure::Size { expected: metadata.size() as u64, found });
        }
        Ok(())
    }

    /// Uses what is already here of a file's contents. Returns whether that is all of it.
    fn adopt(&self, blob: &Path, place: &Path, metadata: &Metadata) -> std::io::Result<bool> {
        let size = metadata.size() as u64;
        let length = |path: &Path| fs::metadata(path).ok().map(|m| m.len());
        let part = blob.with_extension("part");
        match length(&part) {
            Some(length) if length == size => fs::rename(&part, blob)?,
            Some(length) if length > size => fs::remove_file(&part)?,
            _ => {}
        }
        if length(blob) != Some(size) {
            return Ok(false);
        }
        fs::create_dir_all(&self.dir)?;
        // A hard link, because a symbolic one is a privilege on Windows.
        fs::hard_link(blob, place)?;
        Ok(true)
    }
}

/// Why an attempt failed.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error(transparent)]
    Api(#[from] ApiError),
    #[error(transparent)]
    Io(#[from] std::io::Error),
    #[error("{found} bytes arrived instead of {expected}")]
    Size { expected: u64, found: u64 },
}

/// A progress bar as hf-hub wants it. It announces each file twice, and what is there already as an
/// update.
struct Bar(ProgressBar);

impl Bar {
    fn new(file: &str) -> Self {
        Self(bars::bytes(file, 0))
    }
}

impl Progress for Bar {
    fn init(&mut self, size: usize, _: &str) {
        self.0.set_length(size as u64);
        self.0.set_position(0);
    }

    fn update(&mut self, size: usize) {
        self.0.inc(size as u64);
    }

    fn finish(&mut self) {
        self.0.finish();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hub_ids_are_two_plain_parts() {
        for id in ["Qwen/Qwen2.5-Coder-7B-Instruct", "a/b", "org_1/x.y"] {
            assert!(is_id(id), "{id}");
        }
        for other in ["tiny", "a/b/c", "/a", "a/", "./a", "../a", "a/..", "a b/c", "~/models", "a/b?c"] {
            assert!(!is_id(other), "{other}");
        }
    }

    #[test]
    fn an_index_may_only_name_its_neighbours() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join(INDEX);
        let write = |file: &str| {
            fs::write(&path, serde_json::json!({"weight_map": {"a": file}}).to_string()).unwrap();
        };
        write("model-00001-of-00002.safetensors");
        assert_eq!(shards_of(&path).unwrap().len(), 1);
        for bad in ["../../.bashrc", "/etc/passwd", "", "a/b"] {
            write(bad);
            assert!(shards_of(&path).unwrap_err().to_string().contains("plain file name"), "{bad}");
        }
    }

    #[test]
    fn every_refusal_names_the_next_step() {
        let settings = |token: Option<&str>| HubSettings {
            endpoint: "http://hub".into(),
            cache: PathBuf::new(),
            token: token.map(str::to_owned),
            attempts: 1,
            pause: Duration::ZERO,
        };
        let text =
            |status, token| refusal(status, "http://hub/x", "o/n", &settings(token)).unwrap().to_string();
        assert!(text(401, None).contains("set HF_TOKEN"));
        assert!(text(401, Some("t")).contains("check HF_TOKEN"));
        assert!(text(403, Some("t")).contains("accept its licence at http://hub/o/n"));
        assert!(text(404, Some("t")).contains("check the name"));
        assert!(text(503, None).contains("try again later"));
        assert!(refusal(206, "http://hub/x", "o/n", &settings(None)).is_none());
    }
}

//! A Hugging Face hub on this machine: its routes, headers and redirects, and its misfortunes.

use serde_json::json;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

/// A repository's files by name.
pub type Files = BTreeMap<String, Vec<u8>>;

/// What the hub holds and how it behaves.
#[derive(Default)]
pub struct State {
    pub repos: BTreeMap<String, Files>,
    pub commit: String,
    /// Without it, everything is answered 401.
    pub token: Option<String>,
    /// Descriptions are public, files are answered 403.
    pub gated: bool,
    /// The next transfer of this file ends after so many bytes.
    pub cut: Option<(String, usize)>,
    /// A range that does not begin at zero is answered with the whole file.
    pub never_resumes: bool,
}

/// One request for a file or a description, as it was answered.
#[derive(Debug, Clone)]
pub struct Request {
    pub path: String,
    pub range: Option<String>,
    pub status: u16,
    /// Of the body.
    pub sent: usize,
}

/// The server; it stops when it is dropped.
pub struct Hub {
    pub state: Arc<Mutex<State>>,
    log: Arc<Mutex<Vec<Request>>>,
    address: SocketAddr,
}

impl Hub {
    pub fn start(state: State) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(Mutex::new(state));
        let log = Arc::new(Mutex::new(Vec::new()));
        let (shared_state, shared_log) = (state.clone(), log.clone());
        thread::spawn(move || {
            for stream in listener.incoming() {
                let stream = stream.unwrap();
                let Some(request) = read_request(&stream) else { return };
                let answer = answer(&request, address, &mut shared_state.lock().unwrap());
                let logged = Request {
                    path: request.path,
                    range: request.headers.get("range").cloned(),
                    status: answer.status,
                    sent: answer.body.len(),
                };
                shared_log.lock().unwrap().push(logged);
                send(stream, &answer);
            }
        });
        Self { state, log, address }
    }

    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The requests since the last call.
    pub fn take_log(&self) -> Vec<Request> {
        std::mem::take(&mut self.log.lock().unwrap())
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        // A connection without a request is the sign to stop.
        drop(TcpStream::connect(self.address));
    }
}

struct Incoming {
    path: String,
    headers: BTreeMap<String, String>,
}

struct Answer {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
    /// The body's length as announced.
    length: usize,
}

fn read_request(stream: &TcpStream) -> Option<Incoming> {
    let mut lines = BufReader::new(stream).lines().map_while(Result::ok);
    let path = lines.next()?.split(' ').nth(1)?.to_owned();
    let headers = lines
        .take_while(|line| !line.is_empty())
        .filter_map(|line| {
            let (name, value) = line.split_once(": ")?;
            Some((name.to_lowercase(), value.to_owned()))
        })
        .collect();
    Some(Incoming { path, headers })
}

fn send(mut stream: TcpStream, answer: &Answer) {
    let mut head = format!("HTTP/1.1 {} -\r\nConnection: close\r\n", answer.status);
    head += &format!("Content-Length: {}\r\n", answer.length);
    for (name, value) in &answer.headers {
        head += &format!("{name}: {value}\r\n");
    }
    // A client that has seen enough may hang up.
    let _ = stream.write_all(format!("{head}\r\n").as_bytes()).and_then(|()| stream.write_all(&answer.body));
}

fn plain(status: u16, headers: Vec<(&'static str, String)>, body: Vec<u8>) -> Answer {
    Answer { status, headers, length: body.len(), body }
}

fn answer(request: &Incoming, address: SocketAddr, state: &mut State) -> Answer {
    let wanted = state.token.as_ref().map(|token| format!("Bearer {token}"));
    let refused = wanted.is_some() && request.headers.get("authorization") != wanted.as_ref();
    let parts: Vec<&str> = request.path.trim_start_matches('/').split('/').collect();
    match parts[..] {
        ["cdn", org, name, file] => content(request, &format!("{org}/{name}"), file, state),
        _ if refused => plain(401, vec![], b"Invalid username or password.".to_vec()),
        ["api", "models", org, name, "revision", "main"] => match state.repos.get(&format!("{org}/{name}")) {
            Some(files) => {
                let siblings: Vec<_> = files.keys().map(|file| json!({"rfilename": file})).collect();
                let body = json!({"id": format!("{org}/{name}"), "sha": state.commit, "siblings": siblings});
                plain(200, vec![("Content-Type", "application/json".into())], body.to_string().into_bytes())
            }
            None => plain(404, vec![], b"Repository not found".to_vec()),
        },
        [_, _, "resolve", _, _] if state.gated => plain(403, vec![], b"Access is restricted".to_vec()),
        [org, name, "resolve", revision, file] if revision == state.commit => {
            let repo = format!("{org}/{name}");
            // Large files are elsewhere, and only this answer knows their etag.
            if file.ends_with(".safetensors") {
                let Some(bytes) = state.repos.get(&repo).and_then(|files| files.get(file)) else {
                    return plain(404, vec![], vec![]);
                };
                let headers = vec![
                    ("Location", format!("http://{address}/cdn/{repo}/{file}")),
                    ("x-linked-etag", etag(bytes)),
                    ("x-repo-commit", state.commit.clone()),
                ];
                return plain(302, headers, vec![]);
            }
            content(request, &repo, file, state)
        }
        _ => plain(404, vec![], b"Entry not found".to_vec()),
    }
}

/// A file's bytes, or the range asked for.
fn content(request: &Incoming, repo: &str, file: &str, state: &mut State) -> Answer {
    let Some(bytes) = state.repos.get(repo).and_then(|files| files.get(file)) else {
        return plain(404, vec![], vec![]);
    };
    let mut headers = vec![
        ("ETag", etag(bytes)),
        ("x-repo-commit", state.commit.clone()),
        ("Accept-Ranges", "bytes".to_owned()),
    ];
    let Some(range) = request.headers.get("range") else {
        return plain(200, headers, bytes.clone());
    };
    let (first, last) = range.strip_prefix("bytes=").unwrap().split_once('-').unwrap();
    let first: usize = first.parse().unwrap();
    let end = last.parse().map_or(bytes.len(), |last: usize| last + 1);
    if first > 0 && state.never_resumes {
        return plain(200, headers, bytes.clone());
    }
    if first >= bytes.len() {
        return plain(416, headers, vec![]);
    }
    headers.push(("Content-Range", format!("bytes {first}-{}/{}", end - 1, bytes.len())));
    let mut body = bytes[first..end].to_vec();
    let length = body.len();
    if let Some((_, at)) = state.cut.take_if(|(name, _)| name == file && length > 1) {
        body.truncate(at);
    }
    Answer { status: 206, headers, body, length }
}

/// Differs between contents, which is all that is asked of it.
fn etag(bytes: &[u8]) -> String {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    format!("\"{:016x}\"", hasher.finish())
}

//! A child process in a process group of its own, with its pipes.

use super::leftovers;
use std::collections::{BTreeMap, VecDeque};
use std::ffi::OsString;
use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Lines of standard error that go into the record.
const STDERR_TAIL: usize = 20;
/// A reply is one line; a longer one is garbage. The largest real reply is a few hundred kB of timings.
const MAX_LINE: u64 = 64 << 20;

/// What names the folder for temporary files, by system.
const TEMPORARY: &[&str] = if cfg!(windows) { &["TMP", "TEMP"] } else { &["TMPDIR"] };

/// How long the reader of standard error may take to come to the end.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// How to start a worker.
#[derive(Debug, Clone)]
pub struct WorkerCommand {
    pub program: PathBuf,
    pub arguments: Vec<OsString>,
    pub environment: Vec<(OsString, OsString)>,
    /// It starts an agent, on another machine as the case may be, which starts the worker.
    pub agent: bool,
}

impl WorkerCommand {
    /// This program again, as the worker of an engine or as what becomes it.
    pub fn here(engine: &str, threads: Option<usize>, engines_file: Option<&Path>) -> std::io::Result<Self> {
        let environment = threads.map(|n| ("RAYON_NUM_THREADS".into(), n.to_string().into()));
        let mut arguments: Vec<OsString> = vec!["worker".into(), engine.into()];
        arguments
            .extend(engines_file.iter().flat_map(|file| ["--engines-file".into(), OsString::from(file)]));
        Ok(Self {
            program: std::env::current_exe()?,
            arguments,
            environment: environment.into_iter().collect(),
            agent: false,
        })
    }
}

/// Where the standard error of a worker goes.
pub enum Stderr<'a> {
    /// The last lines are kept, and all of it is written to the file.
    Kept(Option<&'a Path>),
    /// To this process's own.
    PassedOn,
}

/// A running worker. Dropping it ends its whole process group.
pub struct Process {
    child: Child,
    /// `None` once it is closed.
    stdin: Option<ChildStdin>,
    /// Whether it may have started something that killing it does not end.
    has_far_end: bool,
    lines: Receiver<Line>,
    stderr: Arc<Mutex<VecDeque<String>>>,
    stderr_reader: Option<JoinHandle<()>>,
    ended: Option<ExitStatus>,
    /// What its children are known by.
    mark: String,
    /// Its folder for temporary files, removed with it, however it ends. An agent's worker has one on its machine.
    _scratch: Option<TempDir>,
}

/// What the reader of standard output saw.
pub enum Line {
    Text(String),
    Garbage(String),
}

impl Process {
    pub fn start(command: &WorkerCommand, stderr: Stderr<'_>) -> std::io::Result<Self> {
        let log = match stderr {
            Stderr::Kept(log) => log.map(File::create).transpose()?,
            Stderr::PassedOn => None,
        };
        let mark = leftovers::mark();
        let scratch = match command.agent {
            false => Some(tempfile::Builder::new().prefix("evalfw-worker-").tempdir()?),
            true => None,
        };
        let mut spawn = Command::new(&command.program);
        spawn
            .args(&command.arguments)
            .envs(command.environment.iter().map(|(k, v)| (k, v)))
            .env(leftovers::VARIABLE, &mark)
            .envs(
                scratch.iter().flat_map(|folder| TEMPORARY.iter().map(|variable| (*variable, folder.path()))),
            )
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(match stderr {
                Stderr::Kept(_) => Stdio::piped(),
                Stderr::PassedOn => Stdio::inherit(),
            });
        #[cfg(unix)]
        std::os::unix::process::CommandExt::process_group(&mut spawn, 0);
        let mut child = spawn.spawn()?;
        live().insert(child.id(), scratch.as_ref().map(|folder| folder.path().to_owned()));
        let (Some(stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
            unreachable!("both pipes were asked for")
        };
        let (sender, lines) = channel();
        std::thread::spawn(move || read_lines(stdout, &sender));
        let tail = Arc::new(Mutex::new(VecDeque::new()));
        let shared = Arc::clone(&tail);
        let stderr = child.stderr.take();
        let stderr_reader =
            stderr.map(|stderr| std::thread::spawn(move || copy_stderr(stderr, log, &shared)));
        let has_far_end = command.agent;
        Ok(Self {
            child,
            stdin: Some(stdin),
            has_far_end,
            lines,
            stderr: tail,
            stderr_reader,
            ended: None,
            mark,
            _scratch: scratch,
        })
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Writes one line.
    pub fn send(&mut self, line: &str) -> std::io::Result<()> {
        let Some(stdin) = &mut self.stdin else { return Err(ErrorKind::BrokenPipe.into()) };
        stdin.write_all(line.as_bytes())?;
        stdin.write_all(b"\n")?;
        stdin.flush()
    }

    /// Ends its standard input.
    pub fn close(&mut self) {
        self.stdin = None;
    }

    pub fn lines(&self) -> &Receiver<Line> {
        &self.lines
    }

    /// Hands the lines over; whoever takes them sees the end as well.
    pub fn take_lines(&mut self) -> Receiver<Line> {
        std::mem::replace(&mut self.lines, channel().1)
    }

    /// Waits for the end of the process; `None` if it has not ended in time.
    pub fn wait(&mut self, limit: Duration) -> Option<ExitStatus> {
        let deadline = Instant::now() + limit;
        loop {
            if let Ok(Some(status)) = self.child.try_wait() {
                self.ended = Some(status);
                return self.ended;
            }
            if Instant::now() >= deadline {
                return None;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The last lines of standard error. Of a process that has ended its last words are waited for; something that it
    /// started may hold the pipe open, and is not.
    pub fn stderr_tail(&self) -> Vec<String> {
        let deadline = Instant::now() + LAST_WORDS;
        let is_reading = || self.stderr_reader.as_ref().is_some_and(|reader| !reader.is_finished());
        while self.ended.is_some() && is_reading() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        lock(&self.stderr).iter().cloned().collect()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.has_far_end && self.ended.is_none() {
            // What is killed cannot pass its end on: the far end is told first. A closed pipe ends the agent, and a
            // scheduler's command cancels its job.
            self.stdin = None;
            terminate_group(self.pid());
            self.wait(FAR_END_GRACE);
        }
        // Even if the worker itself has ended, a child of it may live on in its group.
        kill_group(self.pid());
        leftovers::kill(&self.mark);
        // The kill cannot be refused; waiting only clears the entry in the process table.
        let _ = self.child.wait();
        live().remove(&self.pid());
    }
}

fn read_lines(stdout: impl Read, sender: &Sender<Line>) {
    let mut reader = BufReader::new(stdout);
    loop {
        let mut bytes = Vec::new();
        let line = match reader.by_ref().take(MAX_LINE).read_until(b'\n', &mut bytes) {
            Ok(0) => return,
            Ok(_) if bytes.last() != Some(&b'\n') && bytes.len() as u64 == MAX_LINE => {
                Line::Garbage(format!("a line of more than {MAX_LINE} bytes"))
            }
            Ok(_) => match String::from_utf8(bytes) {
                Ok(text) => Line::Text(text),
                Err(error) => Line::Garbage(format!("bytes that are not UTF-8: {error}")),
            },
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(_) => return,
        };
        if sender.send(line).is_err() {
            return;
        }
    }
}

fn copy_stderr(stderr: impl Read, mut log: Option<File>, tail: &Mutex<VecDeque<String>>) {
    let mut reader = BufReader::new(stderr);
    let mut bytes = Vec::new();
    while matches!(reader.by_ref().take(MAX_LINE).read_until(b'\n', &mut bytes), Ok(n) if n > 0) {
        if let Some(file) = &mut log {
            // A full disk must not stop the worker; the tail still reaches the record if that can be written.
            let _ = file.write_all(&bytes);
        }
        let mut tail = lock(tail);
        if tail.len() == STDERR_TAIL {
            tail.pop_front();
        }
        tail.push_back(String::from_utf8_lossy(&bytes).trim_end().to_owned());
        bytes.clear();
    }
}

/// Process groups that are running now with their folders for temporary files, for a second Ctrl-C.
static LIVE: Mutex<BTreeMap<u32, Option<PathBuf>>> = Mutex::new(BTreeMap::new());

/// How long a launcher may take to pass on that it shall end.
const FAR_END_GRACE: Duration = Duration::from_secs(10);
/// The same at a second Ctrl-C, which is meant to end everything at once.
const SHORT_GRACE: Duration = Duration::from_millis(300);

fn live() -> MutexGuard<'static, BTreeMap<u32, Option<PathBuf>>> {
    lock(&LIVE)
}

/// Ends every worker at once.
pub fn kill_all() {
    let workers = live().clone();
    // A launcher passes the first on to the worker's side, and dies of the second.
    workers.keys().for_each(|&pid| terminate_group(pid));
    std::thread::sleep(SHORT_GRACE);
    workers.keys().for_each(|&pid| kill_group(pid));
    for folder in workers.values().flatten() {
        // The system clears what cannot be removed now.
        let _ = std::fs::remove_dir_all(folder);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(unix)]
fn signal_group(pid: u32, signal: rustix::process::Signal) {
    use rustix::process::{Pid, kill_process_group};
    if let Some(group) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        // Fails only where the group has ended already.
        let _ = kill_process_group(group, signal);
    }
}

#[cfg(unix)]
fn kill_group(pid: u32) {
    signal_group(pid, rustix::process::Signal::KILL);
}

#[cfg(unix)]
fn terminate_group(pid: u32) {
    signal_group(pid, rustix::process::Signal::TERM);
}

/// There is no request to end that a program without a window could hear.
#[cfg(not(unix))]
fn terminate_group(_pid: u32) {}

#[cfg(not(unix))]
fn kill_group(pid: u32) {
    // Ends the process and its descendants; fails only where they have ended already.
    let _ = Command::new("taskkill").args(["/T", "/F", "/PID", &pid.to_string()]).output();
}

//! A worker that misbehaves is a typed failure, and nothing of it stays behind.
#![cfg(unix)]

use evalfw::record::Outcome;
use evalfw::worker::{Client, Failure, WorkerCommand};
use std::path::Path;
use std::time::{Duration, Instant};

const HELLO: &str = r#"{"id":1,"result":{"protocol":1,"engine":"fake","engine_version":"0","framework":"fake","framework_version":"0","device":{"kind":"cpu","name":"cpu","driver":null,"software":false,"memory_bytes":null},"compute_dtype":"f32","features":[],"threads":1}}"#;

fn shell(script: &str) -> WorkerCommand {
    WorkerCommand {
        program: "sh".into(),
        arguments: vec!["-c".into(), script.into()],
        environment: Vec::new(),
        agent: false,
    }
}

fn start(script: &str) -> Client {
    Client::start(&shell(script), None, Duration::from_secs(5)).unwrap()
}

fn failure(script: &str) -> Failure {
    start(script).hello().unwrap_err()
}

#[test]
fn a_good_reply_is_understood() {
    let info = start(&format!("read line; echo '{HELLO}'")).hello().unwrap();
    assert_eq!(info.engine, "fake");
}

#[test]
fn garbage_is_a_protocol_failure_that_quotes_it() {
    let failure = failure("echo 'Segmentation fault imminent'; sleep 60");
    assert_eq!(failure.outcome(), Outcome::Failed);
    assert!(failure.to_string().contains("Segmentation fault imminent"), "{failure}");
}

#[test]
fn bytes_that_are_not_text_are_a_protocol_failure() {
    let failure = failure(r"printf '\377\376\n'; sleep 60");
    assert!(failure.to_string().contains("UTF-8"), "{failure}");
}

#[test]
fn a_reply_to_another_call_is_a_protocol_failure() {
    let failure = failure(&format!("echo '{}'; sleep 60", HELLO.replace("\"id\":1", "\"id\":7")));
    assert!(failure.to_string().contains("reply to call 7"), "{failure}");
}

#[test]
fn another_protocol_version_is_refused() {
    let failure = failure(&format!("echo '{}'; sleep 60", HELLO.replace("\"protocol\":1", "\"protocol\":9")));
    assert!(failure.to_string().contains("version 9"), "{failure}");
}

#[test]
fn an_exit_is_a_crash_with_its_code_and_last_words() {
    let mut client = start("read line; echo 'driver exploded' >&2; exit 3");
    let failure = client.hello().unwrap_err();
    assert_eq!(failure.outcome(), Outcome::Crashed);
    assert!(failure.to_string().contains('3'), "{failure}");
    wait_for(|| client.stderr_tail() == ["driver exploded"]);
}

#[test]
fn a_signal_is_a_crash_that_names_it() {
    let failure = failure("kill -SEGV $$");
    assert_eq!(failure.outcome(), Outcome::Crashed);
    assert!(failure.to_string().contains("signal: 11"), "{failure}");
}

#[test]
fn a_kill_from_outside_is_a_crash_and_not_out_of_memory() {
    let failure = failure("kill -KILL $$");
    assert_eq!(failure.outcome(), Outcome::Crashed);
}

#[test]
fn a_death_in_the_middle_of_a_reply_is_a_crash() {
    let failure = failure(r#"read line; printf '{"id":1,"resu'; exit 9"#);
    assert_eq!(failure.outcome(), Outcome::Crashed);
    assert!(failure.to_string().contains('9'), "{failure}");
}

#[test]
fn a_death_in_the_middle_of_a_reply_is_a_crash_beside_an_agent_too() {
    let dir = tempfile::tempdir().unwrap();
    let engines = dir.path().join("engines.toml");
    let script = r#"read line; printf "{\"id\":1,\"resu"; exit 9"#;
    let declared = format!(
        "[[engine]]\nname = \"cut\"\nsummary = \"A test's\"\ncommand = [\"sh\", \"-c\", '{script}']\n"
    );
    std::fs::write(&engines, declared).unwrap();
    let command = WorkerCommand {
        program: assert_cmd::cargo::cargo_bin("evalfw"),
        arguments: ["worker", "cut", "--agent", "--engines-file"]
            .map(Into::into)
            .into_iter()
            .chain([engines.into()])
            .collect(),
        environment: Vec::new(),
        agent: true,
    };
    let failure = Client::start(&command, None, Duration::from_secs(5)).unwrap().hello().unwrap_err();
    assert_eq!(failure.outcome(), Outcome::Crashed, "{failure}");
    assert!(failure.to_string().contains('9'), "{failure}");
}

#[test]
fn silence_is_a_timeout_and_the_whole_process_group_is_ended() {
    let dir = tempfile::tempdir().unwrap();
    let pid_file = dir.path().join("pid");
    let script = format!("sleep 1000 & echo $! > {}; wait", pid_file.display());
    let mut client = Client::start(&shell(&script), None, Duration::from_millis(300)).unwrap();
    let failure = client.hello().unwrap_err();
    assert_eq!(failure.outcome(), Outcome::Timeout);
    let grandchild = std::fs::read_to_string(&pid_file).unwrap().trim().to_owned();
    assert!(runs(&grandchild));
    drop(client);
    wait_for(|| !runs(&grandchild));
}

#[test]
fn a_program_that_is_not_there_is_named() {
    let command = WorkerCommand {
        program: "/nowhere/engine".into(),
        arguments: vec![],
        environment: vec![],
        agent: false,
    };
    let failure = Client::start(&command, None, Duration::from_secs(1)).err().unwrap();
    assert!(failure.to_string().contains("could not be started"), "{failure}");
}

#[test]
fn standard_error_goes_to_the_log() {
    let dir = tempfile::tempdir().unwrap();
    let log = dir.path().join("worker.log");
    let command = shell(&format!("echo shader compiled >&2; read line; echo '{HELLO}'"));
    let mut client = Client::start(&command, Some(&log), Duration::from_secs(5)).unwrap();
    client.hello().unwrap();
    wait_for(|| std::fs::read_to_string(&log).unwrap() == "shader compiled\n");
}

/// Whether the process exists and is no zombie.
fn runs(pid: &str) -> bool {
    let stat = std::fs::read_to_string(Path::new("/proc").join(pid).join("stat"));
    stat.is_ok_and(|s| !s.contains(") Z "))
}

fn wait_for(condition: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !condition() {
        assert!(Instant::now() < deadline, "it did not happen within 10 s");
        std::thread::sleep(Duration::from_millis(10));
    }
}

//! The memory probe against a program whose memory is known.
#![cfg(target_os = "linux")]

use evalfw::measure::memory::{MemoryFigures, MemoryProbe, PhaseMemory};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

const MIB: u64 = 1 << 20;

struct Program {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Program {
    fn start() -> Self {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/known_memory.py");
        let mut command = Command::new("python3");
        command.arg(script).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let (stdin, stdout) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()));
        Self { child, stdin, stdout }
    }

    fn tell(&mut self, command: &str) {
        writeln!(self.stdin, "{command}").unwrap();
        let mut answer = String::new();
        self.stdout.read_line(&mut answer).unwrap();
        assert_eq!(answer, "done\n", "{command}");
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

fn phase<'a>(figures: &'a MemoryFigures, name: &str) -> &'a PhaseMemory {
    figures.phases.iter().find(|phase| phase.name == name).unwrap()
}

/// Within 1 % or 2 MiB of what the program is known to have.
fn assert_near(what: &str, found: u64, known: u64) {
    let tolerance = (known / 100).max(2 * MIB);
    assert!(found.abs_diff(known) <= tolerance, "{what}: {} of {} MiB", found / MIB, known / MIB);
}

#[test]
fn a_known_program_is_measured_phase_by_phase_to_one_percent() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("mapped");
    std::fs::write(&file, vec![7u8; 200 << 20]).unwrap();
    let mut program = Program::start();
    program.tell("nothing");
    let probe = MemoryProbe::start(program.child.id());
    std::thread::sleep(Duration::from_millis(60));
    let steps = [
        ("anonymous", "anonymous 300".to_owned()),
        ("file", format!("file {}", file.display())),
        ("fork", "fork 100".to_owned()),
        ("child spike", "child-spike 250".to_owned()),
        ("after child spike", "nothing".to_owned()),
        ("reaped", "reap".to_owned()),
        ("spike", "spike 400".to_owned()),
        ("after spike", "nothing".to_owned()),
    ];
    for (name, command) in &steps {
        probe.begin_phase(name);
        program.tell(command);
        // The next look, which the program does not wait for.
        std::thread::sleep(Duration::from_millis(60));
    }
    let figures = probe.finish();
    assert_eq!(figures.measure, "tree");
    let base = phase(&figures, "start").peak_bytes;
    let peak = |name: &str| phase(&figures, name).peak_bytes;
    assert_near("anonymous", peak("anonymous"), base + 300 * MIB);
    assert_near("mapped file", peak("file"), base + 500 * MIB);
    // What parent and child share counts once, what the child wrote to counts for each.
    assert_near("forked child", peak("fork"), base + 600 * MIB);
    assert_near("spike of the child", peak("child spike"), base + 850 * MIB);
    assert_near("after it", peak("after child spike"), base + 600 * MIB);
    assert_near("spike", peak("spike"), base + 900 * MIB);
    assert_near("after it", peak("after spike"), base + 500 * MIB);
    let parts = |name: &str| {
        let phase = phase(&figures, name);
        (phase.anonymous_bytes.unwrap(), phase.file_bytes.unwrap())
    };
    let (anonymous, file) = parts("start");
    assert_near("anonymous part", parts("file").0, anonymous + 300 * MIB);
    assert_near("file part", parts("file").1, file + 200 * MIB);
    // The bound counts shared pages for each process.
    assert!(phase(&figures, "fork").high_water_bytes.unwrap() > base + 790 * MIB);
    let highest = figures.timeline.iter().map(|point| point.resident_bytes).max().unwrap();
    assert!(highest >= base + 840 * MIB, "{}", highest / MIB);
}

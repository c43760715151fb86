//! `evalfw compare`, through the binary, on records whose figures are made to differ by a known amount.

#[path = "report/records.rs"]
#[allow(dead_code, reason = "made for the tests of reports")]
mod records;

use assert_cmd::assert::Assert;
use evalfw::record::{CellRecord, Outcome, Samples};
use predicates::prelude::PredicateBooleanExt;
use predicates::str::contains;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use records::{Engine, ended, infer, train, write};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// Noise between processes and within one, as on a quiet machine.
const NOISE: f64 = 0.015;

/// A side's record: train and infer, some repetitions of each, all times stretched, with noise.
fn side(repetitions: u32, stretch: f64, seed: u64) -> Vec<CellRecord> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut noise = move || 1.0 + NOISE * (rng.random::<f64>() + rng.random::<f64>() - 1.0);
    let mut cells = Vec::new();
    for repetition in 0..repetitions {
        for scenario in [train(256), infer()] {
            let engine = Engine::new("candle-cpu", 1.2, 2.0);
            let mut cell = engine.cell(&scenario, repetition);
            // The fixture drifts from step to step and from one repetition to the next: noise of another kind.
            cell.samples.train.iter_mut().for_each(|step| step.seconds = 2.0);
            cell.samples.phases = engine.cell(&scenario, 0).samples.phases;
            let process = stretch * noise();
            stretch_times(&mut cell.samples, || process * noise());
            cells.push(cell);
        }
    }
    cells
}

fn stretch_times(samples: &mut Samples, mut factor: impl FnMut() -> f64) {
    samples.train.iter_mut().for_each(|step| step.seconds *= factor());
    samples.prefill.iter_mut().for_each(|round| round.seconds *= factor());
    for round in &mut samples.decode {
        let factor = factor();
        round.seconds.iter_mut().for_each(|seconds| *seconds *= factor);
    }
}

struct Folder(TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn record(&self, name: &str, cells: &[CellRecord]) -> PathBuf {
        let path = self.0.path().join(name);
        std::fs::create_dir(&path).unwrap();
        write(&path, cells);
        path
    }
}

fn compare(base: &Path, head: &Path, options: &[&str]) -> Assert {
    let mut command = assert_cmd::Command::cargo_bin("evalfw").unwrap();
    command.arg("compare").arg(base).arg(head).args(options).assert()
}

fn compared(base: &[CellRecord], head: &[CellRecord], options: &[&str]) -> Assert {
    let folder = Folder::new();
    let a_day_later = |cell: &CellRecord| {
        let started_at = cell.started_at.replace("2025-06-01", "2025-06-02");
        CellRecord { started_at, ..cell.clone() }
    };
    let head: Vec<CellRecord> = head.iter().map(a_day_later).collect();
    compare(&folder.record("base", base), &folder.record("head", &head), options)
}

fn json(assert: &Assert) -> serde_json::Value {
    serde_json::from_slice(&assert.get_output().stdout).unwrap()
}

fn verdict(comparison: &serde_json::Value, metric: &str) -> String {
    let rows = comparison["rows"].as_array().unwrap();
    let row = rows.iter().find(|row| row["metric"] == metric).unwrap();
    row["verdict"].as_str().unwrap().to_owned()
}

#[test]
fn the_same_twenty_times_raises_no_alarm() {
    for seed in 0..20 {
        let run = compared(&side(4, 1.0, seed), &side(4, 1.0, seed + 1000), &["--json"]).code(0);
        assert_eq!(json(&run)["verdict"], "same", "seed {seed}");
    }
}

#[test]
fn ten_percent_slower_is_found_in_every_format() {
    for seed in 0..5 {
        let (base, head) = (side(4, 1.0, seed), side(4, 1.1, seed + 1000));
        let run = compared(&base, &head, &["--json"]).code(1);
        let comparison = json(&run);
        for metric in
            ["training_tokens_per_second", "prompt_tokens_per_second", "generated_tokens_per_second"]
        {
            assert_eq!(verdict(&comparison, metric), "worse", "seed {seed}: {metric}");
        }
        assert_eq!(verdict(&comparison, "peak_memory_bytes"), "same");
    }
    let (base, head) = (side(4, 1.0, 1), side(4, 1.1, 2));
    let table = contains("regression (3 worse, 2 same; 95 % intervals)");
    compared(&base, &head, &[]).code(1).stdout(table);
    compared(&base, &head, &["--format", "markdown"]).code(1).stdout(contains("| **worse** |"));
    let junit = contains("failures=\"1\"").and(contains("name=\"training_tokens_per_second\""));
    compared(&base, &head, &["--format", "junit"]).code(1).stdout(junit);
    let run = compared(&base, &head, &["--format", "bencher"]).code(1);
    let rate = &json(&run)["candle-cpu/qwen2.5-coder-0.5b/train-s256-b1"]["training-tokens-per-second"];
    // 240 tokens that are no padding, in 2.2 s.
    assert!((rate["value"].as_f64().unwrap() / (240.0 / 2.2) - 1.0).abs() < 0.02, "{rate}");
}

#[test]
fn faster_is_better_and_no_regression() {
    let run = compared(&side(4, 1.1, 1), &side(4, 1.0, 2), &["--json"]).code(0);
    assert_eq!(verdict(&json(&run), "training_tokens_per_second"), "better");
}

#[test]
fn a_target_that_the_head_misses_is_a_regression() {
    let runs = |seconds: f64| -> Vec<CellRecord> {
        let cell = |i| Engine::new("candle-cpu", 1.2, seconds).cell(&records::quality(3.0), i);
        (0..4).map(cell).collect()
    };
    let mut missed = runs(2.0);
    missed[1].samples.evaluations.truncate(2);
    let reason = contains("1 of the head's processes do not have it");
    compared(&runs(2.0), &missed, &[]).code(1).stdout(reason);
    compared(&missed, &runs(2.0), &[]).code(3);
}

#[test]
fn few_processes_or_much_noise_decide_nothing() {
    let few = contains("inconclusive: 2 of at least 3 processes on a side");
    compared(&side(2, 1.0, 1), &side(2, 1.3, 2), &[]).code(3).stdout(few);
    let mut noisy = side(4, 1.0, 1);
    for (i, cell) in noisy.iter_mut().enumerate() {
        stretch_times(&mut cell.samples, || if i % 4 < 2 { 1.0 } else { 1.5 });
    }
    compared(&side(4, 1.0, 2), &noisy, &[]).code(3).stdout(contains("the interval is too wide"));
}

#[test]
fn several_records_of_a_side_count_together_but_none_twice() {
    let folder = Folder::new();
    let [a, b, c, d] = [1, 2, 3, 4].map(|i| folder.record(&i.to_string(), &side(2, 1.0, i)));
    let joined = |a: &Path, b: &Path| PathBuf::from(format!("{},{}", a.display(), b.display()));
    compare(&joined(&a, &b), &joined(&c, &d), &[]).code(0);
    compare(&joined(&a, &a), &joined(&c, &d), &[]).code(2).stderr(contains("is there twice"));
    // Of three folders, as of a shell's pattern, none may slip to the other side.
    compare(&a, &c, &[d.to_str().unwrap()]).code(2).stderr(contains("unexpected argument"));
}

#[test]
fn other_hardware_is_refused_unless_told_and_then_every_line_says_so() {
    let base = side(4, 1.0, 1);
    let mut head = side(4, 1.0, 2);
    for cell in &mut head {
        cell.environment.cpu = "Another CPU".into();
    }
    let refusal = contains("CPU: Fixture CPU and Another CPU").and(contains("--allow-different"));
    compared(&base, &head, &[]).code(2).stderr(refusal);
    let run = compared(&base, &head, &["--allow-different"]).code(0);
    let text = String::from_utf8(run.get_output().stdout.clone()).unwrap();
    for line in text.lines().filter(|line| line.contains("candle-cpu/")) {
        assert!(line.contains("(different machines or work)"), "{line}");
    }
    let mut longer = side(4, 1.0, 2);
    for cell in &mut longer {
        cell.seed = 7;
    }
    compared(&base, &longer, &[]).code(2).stderr(contains("the seed is 42 and 7"));
    let mut narrower = side(4, 1.0, 2);
    for cell in &mut narrower {
        cell.engine_features = vec!["avx2".into()];
    }
    let mut wider = base;
    for cell in &mut wider {
        cell.engine_features = vec!["avx512".into()];
    }
    compared(&wider, &narrower, &[]).code(2).stderr(contains("the instructions are avx512 and avx2"));
}

#[test]
fn a_crash_is_a_regression_and_what_was_not_run_is_inconclusive() {
    let (base, head) = (side(4, 1.0, 1), side(4, 1.0, 2));
    let mut crashed = head.clone();
    crashed[2] = ended(crashed[2].clone(), Outcome::Crashed, "the worker died");
    let words = contains("crashed 1 of 4").and(contains("the worker died"));
    compared(&base, &crashed, &[]).code(1).stdout(words);
    compared(&crashed, &head, &[]).code(0);
    let all_crashed: Vec<_> =
        head.iter().map(|cell| ended(cell.clone(), Outcome::Crashed, "the worker died")).collect();
    compared(&base, &all_crashed, &[]).code(1);
    compared(&all_crashed, &all_crashed, &[]).code(3);
    let only = |kind: &str, cells: &[CellRecord]| -> Vec<CellRecord> {
        cells.iter().filter(|cell| cell.parameters.kind() == kind).cloned().collect()
    };
    compared(&base, &only("train", &head), &[]).code(3).stdout(contains("the head did not run it"));
    compared(&only("train", &base), &head, &[]).code(0).stdout(contains("Only the head ran"));
    let nothing = contains("no job in common");
    compared(&only("train", &base), &only("infer", &head), &[]).code(2).stderr(nothing);
}

#[test]
fn a_damaged_record_is_refused_by_name_and_a_cut_line_left_out() {
    let folder = Folder::new();
    let base = folder.record("base", &side(4, 1.0, 1));
    let head = folder.record("head", &side(4, 1.0, 2));
    let cells = head.join("cells.jsonl");
    let whole = std::fs::read_to_string(&cells).unwrap();
    std::fs::write(&cells, whole.clone() + &whole[..200]).unwrap();
    compare(&base, &head, &[]).code(0);
    // Whole, but without the end of its line: an editor's work.
    std::fs::write(&cells, whole.trim_end()).unwrap();
    compare(&base, &head, &["--json"])
        .code(0)
        .stdout(contains("\"processes\": 4").and(contains("\"processes\": 3").not()));
    std::fs::write(&cells, whole.replace("\"schema\":2", "\"schema\":99")).unwrap();
    compare(&base, &head, &[]).code(2).stderr(contains("line 1: schema 99").and(contains("newer")));
    std::fs::write(&cells, whole.replace("\"schema\":2", "\"schema\":0")).unwrap();
    compare(&base, &head, &[]).code(2).stderr(contains("schema 0"));
    // An older definition of memory is another work.
    std::fs::write(&cells, whole.replace("\"schema\":2", "\"schema\":1")).unwrap();
    compare(&base, &head, &[]).code(2).stderr(contains("schema 2 and 1"));
    std::fs::write(&cells, whole.replacen("\"loss\":", "\"loss\":NaN,\"was\":", 1)).unwrap();
    compare(&base, &head, &[]).code(2).stderr(contains("line 1").and(contains("samples.train[0].loss")));
    // Of a cell that is there twice, as after a repetition, the last row counts.
    let first = whole.lines().next().unwrap();
    std::fs::write(&cells, zero_step(&whole) + first + "\n").unwrap();
    compare(&base, &head, &[]).code(2).stderr(contains("above 0"));
    std::fs::write(&cells, whole.clone() + first + "\n").unwrap();
    compare(&base, &head, &[]).code(0);
    std::fs::write(&cells, "").unwrap();
    compare(&base, &head, &[]).code(2).stderr(contains("no finished cell"));
    compare(&base, &base, &[]).code(2).stderr(contains("with itself"));
    std::fs::write(&cells, zero_step(&whole)).unwrap();
    compare(&base, &head, &[]).code(2).stderr(contains("above 0"));
    compare(&base, Path::new("/nowhere"), &[]).code(2).stderr(contains("the head").and(contains("/nowhere")));
}

#[test]
fn a_copy_of_a_record_is_no_other_side() {
    let folder = Folder::new();
    let base = folder.record("base", &side(4, 1.0, 1));
    let copy = folder.record("copy", &side(4, 1.0, 1));
    compare(&base, &copy, &[]).code(2).stderr(contains("a copy of it"));
    let head = folder.record("head", &side(4, 1.0, 2));
    let twice = ["--write", "markdown=a.md", "--write", "json=a.md"];
    compare(&base, &head, &twice).code(2).stderr(contains("a.md is named twice"));
}

#[test]
fn what_no_run_writes_is_refused_with_its_field() {
    let refused = |spoil: fn(&mut CellRecord), expected: &str| {
        let (base, mut head) = (side(4, 1.0, 1), side(4, 1.0, 2));
        spoil(&mut head[1]);
        compared(&base, &head, &[]).code(2).stderr(contains("line 2").and(contains(expected)));
    };
    refused(|cell| cell.started_at = "yesterday".into(), "started_at is \"yesterday\"");
    refused(|cell| cell.wall_seconds = -5.0, "wall_seconds is -5");
    refused(|cell| cell.peak_memory_bytes = Some(u64::MAX), "more than any machine has");
    refused(|cell| cell.samples.phases[0].peak_bytes = u64::MAX, "more than any machine has");
    let with_error = |cell: &mut CellRecord| {
        *cell = ended(cell.clone(), Outcome::Crashed, "killed");
        cell.outcome = Outcome::Ok;
    };
    refused(with_error, "outcome is ok beside the error");
    // The name of the row before, with another scenario.
    refused(|cell| cell.cell = "candle-cpu/qwen2.5-coder-0.5b/train-s256-b1/nf4/0".into(), "of a row before");
}

/// With the time of a training step set to 0.
fn zero_step(record: &str) -> String {
    let (first, rest) = record.split_once('\n').unwrap();
    let mut cell: CellRecord = serde_json::from_str(first).unwrap();
    cell.samples.train[1].seconds = 0.0;
    format!("{}\n{rest}", serde_json::to_string(&cell).unwrap())
}

#[test]
fn thresholds_come_from_a_file() {
    let folder = Folder::new();
    let base = folder.record("base", &side(4, 1.0, 1));
    let head = folder.record("head", &side(4, 1.1, 2));
    let file = folder.0.path().join("thresholds.toml");
    let text = include_str!("../reports/thresholds.toml").replace("= 5.0", "= 20.0");
    std::fs::write(&file, &text).unwrap();
    let options = ["--thresholds", file.to_str().unwrap()];
    compare(&base, &head, &options).code(0);
    std::fs::write(&file, text.replace("confidence", "confidenze")).unwrap();
    compare(&base, &head, &options).code(2).stderr(contains("thresholds.toml").and(contains("confidenze")));
}

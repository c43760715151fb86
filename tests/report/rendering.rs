//! The report as text: complete, safe, and always the same.

use crate::records::{Engine, ended, infer, learner, load, quality, tiny, train, unavailable, write};
use evalfw::cmd::report::{ReportArgs, run};
use evalfw::decide::criteria::Criteria;
use evalfw::record::{CellRecord, Outcome};
use evalfw::render::report::{Report, render};
use evalfw::render::terminal;
use evalfw_engine::protocol::{DeviceKind, DeviceMemory, Quantization};
use std::path::{Path, PathBuf};

/// What a run on a machine with two CPU engines, a software adapter and no GPU records.
pub fn typical_run() -> Vec<CellRecord> {
    let candle = Engine::new("candle-cpu", 2.31, 3.5);
    let burn = Engine { loss_offset: 0.0004, ..Engine::new("burn-flex", 3.08, 12.25) };
    let wgpu = Engine { software: true, model: tiny(), ..Engine::new("burn-wgpu", 0.31, 0.9) };
    let mut cells: Vec<CellRecord> = [candle, burn.clone(), wgpu].iter().flat_map(Engine::cells).collect();
    cells.extend(unavailable(
        "candle-cuda",
        "no CUDA device",
        "install the driver, then build with --features cuda",
    ));
    let crashed = ended(burn.cell(&infer(), 1), Outcome::Crashed, "the worker was killed by signal 9");
    let place = cells.iter().position(|c| c.cell == crashed.cell).unwrap();
    cells[place] = crashed;
    cells
}

fn report(cells: &[CellRecord]) -> Report {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), cells);
    render(dir.path(), "", &Criteria::built_in().unwrap()).unwrap()
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/typical").join(name)
}

/// Compares with a committed file; EVALFW_UPDATE_GOLDEN=1 writes it anew.
fn assert_golden(name: &str, actual: &str) {
    let path = fixture(name);
    if std::env::var_os("EVALFW_UPDATE_GOLDEN").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, actual).unwrap();
    }
    let expected = std::fs::read_to_string(&path).unwrap();
    assert!(expected == actual, "{} is out of date; see it with EVALFW_UPDATE_GOLDEN=1", path.display());
}

#[test]
fn the_committed_record_renders_as_committed() {
    if std::env::var_os("EVALFW_UPDATE_GOLDEN").is_some() {
        let folder = fixture("");
        let _ = std::fs::remove_file(folder.join("cells.jsonl"));
        std::fs::create_dir_all(&folder).unwrap();
        write(&folder, &typical_run());
    }
    let report = render(&fixture("cells.jsonl"), "", &Criteria::built_in().unwrap()).unwrap();
    assert_golden("report.md", &report.markdown);
    let names: Vec<&str> = report.charts.iter().map(|c| c.file.as_str()).collect();
    let expected = [
        "charts/memory-qwen2.5-coder-0.5b.svg",
        "charts/loss-qwen2.5-coder-0.5b.svg",
        "charts/memory-tiny.svg",
        "charts/loss-tiny.svg",
        "charts/stacked-qwen2.5-coder-0.5b.svg",
        "charts/acceptability-qwen2.5-coder-0.5b.svg",
        "charts/predicted-all.svg",
    ];
    assert_eq!(names, expected);
    for chart in &report.charts {
        assert_golden(&chart.file, &chart.svg);
    }
    let cells = evalfw::record::read(&fixture("cells.jsonl")).unwrap();
    assert_golden("summary.txt", &terminal::summary(&cells));
}

/// The runs of all five frameworks: the one that the README shows, and one on a CPU without AVX-512.
#[test]
fn the_committed_runs_render_as_committed() {
    for name in ["20261129-021509-frameworks", "20261128-191456-frameworks"] {
        let run = Path::new(env!("CARGO_MANIFEST_DIR")).join("results").join(name);
        let report = render(&run, "", &Criteria::built_in().unwrap()).unwrap();
        let committed = |name: &str| std::fs::read_to_string(run.join(name)).unwrap();
        let hint = format!("render it again: evalfw report results/{name}");
        assert!(committed("report.md") == report.markdown, "{hint}");
        assert!(committed("report.html") == report.page("").unwrap(), "{hint}");
        for chart in &report.charts {
            assert!(committed(&chart.file) == chart.svg, "{}: {hint}", chart.file);
        }
    }
}

#[test]
fn rendering_twice_gives_the_same_bytes() {
    let (a, b) = (report(&typical_run()), report(&typical_run()));
    assert_eq!(a.markdown, b.markdown);
    assert_eq!(a.charts, b.charts);
}

#[test]
fn every_line_of_a_table_has_as_many_cells_as_its_header() {
    let mut cells = typical_run();
    let hostile = "a|b `c` ``` \n| d | <script> [x](y) *e*";
    cells[3] = ended(cells[3].clone(), Outcome::Failed, hostile);
    cells[3].error.as_mut().unwrap().stderr_tail = vec!["```".into(), "| not | a table".into()];
    for cell in &mut cells {
        cell.model.origin = hostile.into();
        cell.environment.cpu = hostile.into();
    }
    let text = report(&cells).markdown;
    assert_tables_are_whole(&text);
    assert!(text.contains("\n````text\n```\n| not | a table\n````\n"), "{text}");
    assert!(!text.contains("<script>"));
}

/// Every run of lines that begin with `|` outside code blocks has one width, and a rule below its header.
fn assert_tables_are_whole(text: &str) {
    let columns = |line: &str| line.replace("\\|", "").matches('|').count();
    let mut in_code: Option<&str> = None;
    let mut table: Vec<&str> = Vec::new();
    for line in text.lines().chain([""]) {
        let fence = &line[..line.len() - line.trim_start_matches('`').len()];
        match in_code {
            Some(open) if line == open => in_code = None,
            Some(_) => {}
            None if fence.len() >= 3 => in_code = Some(fence),
            None if line.starts_with('|') => table.push(line),
            None => {
                if let Some(header) = table.first() {
                    assert!(table.len() > 2, "a table without rows: {header}");
                    assert!(table[1].starts_with("|-"), "no rule below {header}");
                    for row in &table {
                        assert_eq!(columns(row), columns(header), "{row}\nin the table of\n{header}");
                    }
                }
                table.clear();
            }
        }
    }
    assert_eq!(in_code, None, "a code block is left open");
}

#[test]
fn figures_point_to_the_line_of_their_cell() {
    let cells = typical_run();
    let text = report(&cells).markdown;
    let trained =
        cells.iter().position(|c| c.cell.starts_with("candle-cpu/") && c.scenario.starts_with("train"));
    let line = trained.unwrap() + 1;
    let row = text.lines().find(|l| l.starts_with("| candle-cpu | NF4 | **fits**")).unwrap();
    assert!(row.contains(&format!("[{line}](cells.jsonl#L{line})")) && row.contains("2.31"), "{row}");
}

/// The row of the one engine in the table of the verdict.
fn verdict_row(cells: &[CellRecord]) -> String {
    let text = report(cells).markdown;
    let table = text.split("GB verdict").nth(1).unwrap();
    table.lines().find(|l| l.starts_with("| candle-cpu | NF4 |")).unwrap().to_owned()
}

#[test]
fn only_training_that_ended_ok_says_that_an_engine_fits() {
    let engine = Engine::new("candle-cpu", 2.0, 1.0);
    let loads = [engine.cell(&load(), 0)];
    let row = verdict_row(&loads);
    assert!(row.contains("| not measured (training was not run) | at least 1.20 | – | load |"), "{row}");

    let with_train = |outcome| {
        let train = ended(engine.cell(&train(256), 0), outcome, "it ended");
        verdict_row(&[loads[0].clone(), train])
    };
    for (outcome, verdict) in [
        (Outcome::Oom, "**does not fit**: out of memory in train-s256-b1"),
        (Outcome::Crashed, "not shown: train-s256-b1 crashed"),
        (Outcome::Timeout, "not shown: train-s256-b1 timed out"),
        (Outcome::Wrong, "not shown: train-s256-b1 gave a wrong answer"),
    ] {
        let row = with_train(outcome);
        assert!(row.contains(&format!("| {verdict} | at least 1.20 | – | load |")), "{row}");
    }

    // The small job does not stand for the large one that engines are compared on.
    let large = ended(engine.cell(&train(2048), 0), Outcome::Crashed, "killed");
    let row = verdict_row(&[engine.cell(&train(256), 0), large]);
    assert!(row.contains("not shown: train-s2048-b1 crashed | at least 2.00 | – | train-s256-b1"), "{row}");
}

#[test]
fn training_over_the_target_has_no_headroom() {
    let row = verdict_row(&Engine::new("candle-cpu", 17.0, 1.0).cells());
    assert!(row.contains("| **does not fit** | 17.00 | – | train-s256-b1 |"), "{row}");
}

#[test]
fn a_resumed_cell_is_traced_to_its_last_line() {
    let engine = Engine::new("candle-cpu", 2.0, 1.0);
    let cell = engine.cell(&train(256), 0);
    let failed = ended(cell.clone(), Outcome::Failed, "first try");
    let text = report(&[failed, engine.cell(&load(), 0), cell]).markdown;
    assert!(
        text.contains("| [3](cells.jsonl#L3) | candle-cpu/qwen2.5-coder-0.5b/train-s256-b1/nf4/0 | ok |"),
        "{text}"
    );
    assert!(!text.contains("first try"));
}

#[test]
fn failures_are_told_with_their_error_and_advice() {
    let text = report(&typical_run()).markdown;
    for expected in [
        "candle-cuda: unavailable",
        "no CUDA device",
        "install the driver, then build with --features cuda",
        "burn-flex: crashed",
        "during train step 3",
        "ok 1 of 2, crashed 1 of 2",
        "software adapter, not comparable",
    ] {
        assert!(text.contains(expected), "{expected} is missing in\n{text}");
    }
}

#[test]
fn a_record_without_a_single_ok_cell_says_so() {
    let engine = Engine::new("candle-cpu", 2.0, 1.0);
    let cells: Vec<CellRecord> =
        engine.cells().into_iter().map(|c| ended(c, Outcome::Oom, "out of memory")).collect();
    let report = report(&cells);
    assert!(report.markdown.contains("**No decision on qwen2.5-coder-0.5b.** No engine passed"));
    assert!(report.markdown.contains("nothing was measured"));
    assert!(report.charts.is_empty());
    assert_tables_are_whole(&report.markdown);
    assert!(terminal::summary(&cells).contains("oom 2 of 2"));
}

#[test]
fn a_record_of_unavailable_engines_or_software_adapters_alone_is_a_report_too() {
    let text = report(&unavailable("candle-cuda", "no CUDA device", "get one")).markdown;
    assert!(text.contains("candle-cuda (does not run here)"));
    assert_tables_are_whole(&text);
    let wgpu = Engine { software: true, model: tiny(), ..Engine::new("burn-wgpu", 0.3, 0.9) };
    let text = report(&wgpu.cells()).markdown;
    assert!(text.contains("**No decision.** Every engine of this run is a software adapter"));
    assert_tables_are_whole(&text);
}

#[test]
fn a_single_engine_wins_no_comparison() {
    let text = report(&Engine::new("candle-cpu", 2.0, 1.0).cells()).markdown;
    assert!(text.contains("**Only candle-cpu is left to choose on qwen2.5-coder-0.5b.**"), "{text}");
    assert!(!text.contains("times as fast"));
    assert_tables_are_whole(&text);
}

#[test]
fn advice_to_choose_needs_six_timed_steps_of_each_engine() {
    let engines = [Engine::new("a", 2.0, 1.0), Engine::new("b", 2.0, 5.0)];
    let all: Vec<CellRecord> = engines.iter().flat_map(Engine::cells).collect();
    let text = report(&all).markdown;
    assert!(text.contains("If you must choose now, take a"), "{text}");
    let dominated = "b is dominated by a: it is nowhere better in the measured criteria and in training and \
                     inference speed, and worse in training speed.";
    assert!(text.contains(dominated), "{text}");
    let once: Vec<CellRecord> = all.into_iter().filter(|c| c.repetition == 0).collect();
    let text = report(&once).markdown;
    assert!(!text.contains("If you must choose now"), "{text}");
    assert!(text.contains("too few training steps were timed: 3 of one engine"), "{text}");
}

#[test]
fn a_partial_record_of_loads_alone_renders() {
    let cells: Vec<CellRecord> =
        ["a", "b"].iter().map(|name| Engine::new(name, 2.0, 1.0).cell(&load(), 0)).collect();
    let report = report(&cells);
    assert!(report.markdown.contains("the run holds no train scenario with an NF4 base"));
    // Nothing over time: only what the decision is made of.
    let names: Vec<&str> = report.charts.iter().map(|c| c.file.as_str()).collect();
    let decision = ["charts/stacked-qwen2.5-coder-0.5b.svg", "charts/acceptability-qwen2.5-coder-0.5b.svg"];
    assert_eq!(names, decision);
    assert_tables_are_whole(&report.markdown);
}

fn arguments(run: &Path) -> ReportArgs {
    ReportArgs { run: run.to_owned(), output: None, format: None, criteria: None, json: false }
}

#[test]
fn the_command_writes_report_and_charts_and_links_them_from_elsewhere() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("my run");
    std::fs::create_dir(&folder).unwrap();
    write(&folder, &typical_run());
    run(&arguments(&folder)).unwrap();
    let here = std::fs::read_to_string(folder.join("report.md")).unwrap();
    assert!(here.contains("](charts/memory-qwen2.5-coder-0.5b.svg)"));
    assert!(folder.join("charts/loss-qwen2.5-coder-0.5b.svg").is_file());

    let output = Some(dir.path().join("REPORT.md"));
    run(&ReportArgs { output, ..arguments(&folder.join("cells.jsonl")) }).unwrap();
    let above = std::fs::read_to_string(dir.path().join("REPORT.md")).unwrap();
    assert_eq!(above.replace("(my%20run/", "("), here);
}

#[test]
fn other_criteria_are_used_and_bad_ones_are_named() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &typical_run());
    let criteria = dir.path().join("criteria.toml");
    let built_in =
        std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("reports/criteria.toml"));
    let text = built_in.unwrap().replace("memory_target_gb = 16.0", "memory_target_gb = 3.0");
    std::fs::write(&criteria, text).unwrap();
    let with_criteria = ReportArgs { criteria: Some(criteria.clone()), ..arguments(dir.path()) };
    run(&with_criteria).unwrap();
    let report = std::fs::read_to_string(dir.path().join("report.md")).unwrap();
    assert!(
        report
            .contains("burn-flex** over the memory target: 3.08 GB in train-s256-b1, with a target of 3 GB"),
        "{report}"
    );

    std::fs::write(&criteria, "memory_target_gb = 16.0\ncriteria = []\nwieghts = 1\n").unwrap();
    let message = format!("{:#}", run(&with_criteria).unwrap_err());
    assert!(message.contains("criteria.toml") && message.contains("wieghts"), "{message}");
}

#[test]
fn a_folder_without_a_record_is_an_error_that_names_it() {
    let dir = tempfile::tempdir().unwrap();
    let message = format!("{:#}", run(&arguments(dir.path())).unwrap_err());
    assert!(message.contains("cells.jsonl"), "{message}");
}

#[test]
fn blank_lines_in_a_record_are_skipped_and_keep_their_numbers() {
    let dir = tempfile::tempdir().unwrap();
    let engine = Engine::new("candle-cpu", 2.0, 1.0);
    write(dir.path(), &[engine.cell(&load(), 0), engine.cell(&train(256), 0)]);
    let path = dir.path().join("cells.jsonl");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, format!("\n{}\n \n", text.replace('\n', "\n\n"))).unwrap();
    assert_eq!(evalfw::record::read(&path).unwrap().len(), 2);
    let report = render(dir.path(), "", &Criteria::built_in().unwrap()).unwrap();
    assert!(report.markdown.contains("[4](cells.jsonl#L4)"), "{}", report.markdown);
}

#[test]
fn times_that_no_clock_gives_are_refused_by_line_and_field() {
    let engine = Engine::new("candle-cpu", 2.0, 1.0);
    let refusal = |scenario: &evalfw::scenario::Scenario, spoil: fn(&mut CellRecord)| {
        let dir = tempfile::tempdir().unwrap();
        let mut cell = engine.cell(scenario, 0);
        spoil(&mut cell);
        write(dir.path(), &[engine.cell(&load(), 1), cell]);
        evalfw::record::read(dir.path()).map_err(|e| format!("{e:#}"))
    };
    let cases: [(_, fn(&mut CellRecord), _); 4] = [
        (train(256), |c| c.samples.train[2].seconds = 0.0, "samples.train[2].seconds is 0"),
        (infer(), |c| c.samples.prefill[1].seconds = -1.0, "samples.prefill[1].seconds is -1"),
        (infer(), |c| c.samples.decode[0].seconds[3] = -0.5, "samples.decode[0].seconds[3] is -0.5"),
        (
            load(),
            |c| c.samples.load.as_mut().unwrap().times.read_seconds = -2.0,
            "samples.load.read_seconds is -2",
        ),
    ];
    for (scenario, spoil, expected) in cases {
        let message = refusal(&scenario, spoil).unwrap_err();
        assert!(message.contains("line 2") && message.contains(expected), "{message}");
    }
    // What a cell that failed left behind is in no figure.
    let of_failed = |c: &mut CellRecord| {
        c.outcome = Outcome::Failed;
        c.samples.train[2].seconds = 0.0;
    };
    assert!(refusal(&train(256), of_failed).is_ok());
}

#[test]
fn commands_in_an_advice_stay_code() {
    let advice = "build with the cargo feature `cuda_*`, not <b>";
    let text = report(&unavailable("candle-cuda", "no CUDA device", advice)).markdown;
    let expected = "What to do: build with the cargo feature `cuda_*`, not \\<b\\>\n";
    assert!(text.contains(expected), "{text}");
}

#[test]
fn losses_that_are_all_but_equal_are_not_called_equal() {
    let engines = |offset| {
        let other = Engine { loss_offset: offset, ..Engine::new("b", 2.0, 1.0) };
        let cells: Vec<CellRecord> =
            [Engine::new("a", 2.0, 1.0), other].iter().flat_map(Engine::cells).collect();
        report(&cells).markdown
    };
    assert!(engines(3e-9).contains("lie less than 0.000001 nats apart"));
    assert!(engines(0.25).contains("lie at most 0.250 nats apart"));
    assert!(engines(0.0).contains("lie at most 0 nats apart"));
}

#[test]
fn the_axis_of_steps_has_whole_numbers_only() {
    let report = report(&typical_run());
    let loss = report.charts.iter().find(|c| c.file.contains("loss-qwen")).unwrap();
    // The fixture trains four steps: 0 to 3.
    let whole: Vec<&str> =
        loss.svg.lines().map(str::trim).filter(|l| ["0", "1", "2", "3"].contains(l)).collect();
    assert_eq!(whole, ["0", "1", "2", "3"], "{}", loss.svg);
    assert!(!loss.svg.lines().any(|l| l.trim() == "0.5" || l.trim().is_empty()), "{}", loss.svg);
}

#[test]
fn the_findings_are_json_with_the_decision_and_the_figures() {
    let findings = serde_json::to_value(report(&typical_run()).findings).unwrap();
    let ranking = &findings["decision"]["rankings"][0];
    assert_eq!(ranking["verdict"]["kind"], "no_clear_winner");
    assert_eq!(findings["models"][0]["train"][0]["engine"], "burn-flex");
    assert_eq!(findings["models"][0]["train"][0]["figures"]["seconds_per_step"]["n"], 6);
}

fn quality_cells(target: f64) -> Vec<CellRecord> {
    let fast = Engine { model: learner(), ..Engine::new("candle-cpu", 0.5, 0.5) };
    let slow = Engine { model: learner(), ..Engine::new("burn-flex", 0.5, 2.0) };
    let wgpu = Engine { software: true, model: learner(), ..Engine::new("burn-wgpu", 0.5, 9.0) };
    [fast, slow, wgpu].iter().map(|e| e.cell(&quality(target), 0)).collect()
}

#[test]
fn time_to_quality_stands_in_a_table_of_its_own_and_in_no_other() {
    let mut cells = typical_run();
    cells.extend(quality_cells(3.0));
    let report = report(&cells);
    let section = report.markdown.split("## Time to quality").nth(1).unwrap();
    let row = |engine: &str| {
        section.lines().find(|l| l.starts_with(&format!("| {engine}"))).unwrap_or_else(|| panic!("{engine}"))
    };
    // Six steps of 0.5 s, each 2 % longer than the one before, and three evaluations of a second.
    assert!(row("candle-cpu").contains("on learner | 3 | 6 | 6.15 | 6.0000 → 1.0000 |"), "{section}");
    assert!(row("burn-flex").contains("| 3 | 6 | 15.6 |"), "{section}");
    assert!(row("burn-wgpu").contains("software adapter, not comparable"), "{section}");
    assert!(report.markdown.contains("learner: 1.10 million parameters"));
    assert!(!report.markdown.contains("### learner"), "learner is in a table of speed or memory");
    let chart = report.charts.iter().find(|c| c.file.starts_with("charts/quality-")).unwrap();
    assert!(report.markdown.contains(&format!("({})", chart.file)));
    assert!(chart.svg.contains("target: 3") && !chart.svg.contains("burn-wgpu"));
    assert_tables_are_whole(&report.markdown);
}

#[test]
fn a_target_that_was_not_met_has_no_time() {
    let cells = quality_cells(0.5);
    let text = report(&cells).markdown;
    let row = text.lines().find(|l| l.starts_with("| candle-cpu | quality-")).unwrap();
    assert!(row.contains("| 0.5 | not reached in 10 | – | 6.0000 → 1.0000 |"), "{row}");
}

/// An engine beside its stock form, on a GPU that tells its peak, and with two forms of the base.
fn stock_beside_tuned() -> Vec<CellRecord> {
    let tuned = Engine::new("candle-cuda", 2.0, 1.0);
    let stock = Engine::new("candle-cuda-stock", 3.0, 4.0);
    let other = Engine::new("other-stock", 3.0, 4.0);
    let mut cells: Vec<CellRecord> = [tuned, stock, other].iter().map(|e| e.cell(&train(256), 0)).collect();
    for quantization in [Quantization::None, Quantization::Native] {
        let mut cell = cells[0].clone();
        cell.cell = cell.cell.replace("/nf4/", &format!("/{quantization:?}/").to_lowercase());
        cell.quantization = quantization;
        cells.push(cell);
    }
    for cell in &mut cells {
        cell.device.as_mut().unwrap().kind = DeviceKind::DiscreteGpu;
        let bytes = cell.peak_memory_bytes;
        cell.samples.device_memory = Some(DeviceMemory { peak_bytes: bytes, ..DeviceMemory::default() });
    }
    cells
}

#[test]
fn a_stock_form_stands_beside_its_tuned_form_and_is_not_ranked() {
    let report = report(&stock_beside_tuned());
    let rows = &report.findings.models[0].stock;
    let figures: Vec<_> =
        rows.iter().map(|r| (r.engine.as_str(), r.stock_engine.as_str(), r.figure)).collect();
    let pair = |figure| ("candle-cuda", "candle-cuda-stock", figure);
    assert_eq!(figures, [pair("slot tokens/s"), pair("peak GB")]);
    assert!(
        report.markdown.contains("Not ranked beside its tuned form: candle-cuda-stock."),
        "{}",
        report.markdown
    );
    assert!(!report.markdown.contains("cannot be compared"), "{}", report.markdown);
}

#[test]
fn lower_bounds_of_memory_are_not_set_beside_each_other() {
    let mut cells = stock_beside_tuned();
    let memory = cells[1].samples.device_memory.as_mut().unwrap();
    memory.reserved_bytes = memory.peak_bytes.take();
    let rows = &report(&cells).findings.models[0].stock;
    assert_eq!(rows.iter().map(|r| r.figure).collect::<Vec<_>>(), ["slot tokens/s"]);
}

#[test]
fn the_base_that_the_target_is_for_comes_first() {
    let report = report(&stock_beside_tuned());
    let of_engine = report.findings.models[0].verdicts.iter().filter(|r| r.engine == "candle-cuda");
    let order: Vec<Quantization> = of_engine.map(|r| r.quantization).collect();
    assert_eq!(order, [Quantization::Nf4, Quantization::Native, Quantization::None]);
}

//! What is told of devices: the choice of kernels, and memory pools.

use crate::records::{Engine, infer, train, write};
use evalfw::decide::criteria::Criteria;
use evalfw::record::CellRecord;
use evalfw::render::report::{Report, render};
use evalfw_engine::protocol::{DeviceKind, DeviceMemory, Tuning};

/// A GPU of its own memory, on which two repetitions chose kernels.
fn on_gpu() -> Vec<CellRecord> {
    let engine = Engine::new("burn-wgpu", 2.0, 1.0);
    let measured = Tuning { measured: 41, cached: 0, late: 3, seconds: 12.5 };
    let known = Tuning { measured: 0, cached: 41, late: 0, seconds: 0.0 };
    let mut cells = vec![engine.cell(&train(256), 0), engine.cell(&train(256), 1), engine.cell(&infer(), 0)];
    for (cell, tuning) in cells.iter_mut().zip([measured, known, known]) {
        cell.device.as_mut().unwrap().kind = DeviceKind::DiscreteGpu;
        cell.samples.tuning = Some(tuning);
        cell.samples.device_memory = Some(DeviceMemory {
            in_use_bytes: Some(1_500_000_000),
            reserved_bytes: Some(2_000_000_000),
            peak_bytes: Some(3_000_000_000 + u64::from(cell.repetition)),
        });
    }
    cells
}

fn report(cells: &[CellRecord]) -> Report {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), cells);
    render(dir.path(), "", &Criteria::built_in().unwrap()).unwrap()
}

#[test]
fn what_the_choice_of_kernels_took_is_a_figure_of_its_own() {
    let report = report(&on_gpu());
    let rows: Vec<_> =
        report.findings.tuning.iter().map(|r| (r.measured, r.cached, r.late, r.seconds)).collect();
    assert_eq!(rows, [(41, 41, 3, 12.5), (0, 41, 0, 0.0)]);
    for row in ["| 41 | 12.5 | 41 | 3 | [1](", "| none: cached | – | 41 | 0 | [3]("] {
        assert!(report.markdown.contains(row), "{row} in {}", report.markdown);
    }
    let mut without = on_gpu();
    without.iter_mut().for_each(|cell| cell.samples.tuning = None);
    assert!(!self::report(&without).markdown.contains("Choosing kernels"));
}

#[test]
fn the_verdict_on_a_gpu_rests_on_the_peak_of_its_pools() {
    let report = report(&on_gpu());
    let model = &report.findings.models[0];
    let verdict = &model.verdicts[0];
    assert_eq!((verdict.bytes, verdict.at_least), (Some(3_000_000_001), false));
    let line = report.markdown.lines().find(|l| l.contains("| 1500 | 2000 | 3000 |")).unwrap();
    // Of the repetition that took the most, beside the process.
    assert!(line.contains("[2]("), "{line}");
    assert_eq!(model.pools.len(), 2);
}

//! The memory probe against known allocations. The only test of its file, so that it has a process of its
//! own: what other tests allocate would be measured too.
#![cfg(target_os = "linux")]

use evalfw::measure::memory::MemoryProbe;
use std::time::Duration;

const MIB: u64 = 1 << 20;

#[test]
fn a_spike_shorter_than_the_interval_is_in_its_phase_and_in_no_other() {
    let probe = MemoryProbe::start(std::process::id());
    probe.begin_phase("spike");
    // Without the black box the compiler leaves the allocation out.
    drop(std::hint::black_box(vec![1u8; 200 << 20]));
    probe.begin_phase("after");
    std::thread::sleep(Duration::from_millis(60));
    let figures = probe.finish();
    let (phases, timeline) = (figures.phases, figures.timeline);
    let peak = |name: &str| phases.iter().find(|p| p.name == name).unwrap().peak_bytes;
    let spike = peak("spike") - peak("after");
    assert!((198 * MIB..=202 * MIB).contains(&spike), "{phases:?}");
    assert!(phases.iter().all(|p| p.anonymous_bytes.is_some()));
    assert!(!timeline.is_empty());
}

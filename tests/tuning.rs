//! Choosing kernels by measuring: never on the clock, once for an adapter, and on a software adapter only when told to.

use assert_cmd::cargo::cargo_bin;
use evalfw::worker::{Client, Failure, WorkerCommand};
use evalfw_engine::protocol::{
    Decode, EngineInfo, Generate, Load, Memory, Prefill, Quantization, Tune, Tuning,
};
use std::path::Path;
use std::time::Duration;

/// A worker with a model of the reference. `None` where this machine has no adapter.
fn loaded(cache: &Path, autotune: &str) -> Option<(Client, EngineInfo)> {
    let command = WorkerCommand {
        program: cargo_bin("evalfw"),
        arguments: vec!["worker".into(), "burn-wgpu".into()],
        environment: vec![("EVALFW_CACHE".into(), cache.into()), ("EVALFW_AUTOTUNE".into(), autotune.into())],
        agent: false,
    };
    let mut client = Client::start(&command, None, Duration::from_secs(300)).unwrap();
    let info = match client.hello() {
        Err(Failure::Engine(evalfw_engine::Error::Unavailable { reason, .. })) => {
            eprintln!("not run: {reason}");
            return None;
        }
        answer => answer.unwrap(),
    };
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference/golden/untied-6q3kv/model");
    client.call(Load { model, quantization: Quantization::Nf4 }).unwrap();
    Some((client, info))
}

fn one_token() -> Tune {
    Tune { generate: Some(Generate { prompt: vec![5], steps: 0 }), ..Tune::default() }
}

#[test]
fn kernels_are_measured_before_the_clock_starts_and_once_for_an_adapter() {
    let cache = tempfile::tempdir().unwrap();
    let Some((mut client, info)) = loaded(cache.path(), "on") else { return };
    assert!(info.tunes && info.features.contains(&"autotune".to_owned()), "{info:?}");
    let measured = client.call(one_token()).unwrap();
    assert!(measured.measured > 0 && measured.seconds > 0.0, "{measured:?}");
    assert_eq!((measured.cached, measured.late), (0, 0));

    let first = client.call(Prefill { tokens: vec![5] }).unwrap().next;
    assert_eq!(client.call(Tune::default()).unwrap(), measured);
    // Scores of two positions, and what is mixed by them, are other products than of one: not measured on the clock.
    client.call(Decode { first, steps: 1 }).unwrap();
    assert_eq!(client.call(Tune::default()).unwrap(), Tuning { late: 2, ..measured });
    client.finish().unwrap();

    let (mut next, _) = loaded(cache.path(), "on").unwrap();
    assert_eq!(next.call(one_token()).unwrap(), Tuning { cached: measured.measured, ..Tuning::default() });
    assert_eq!(next.call(Prefill { tokens: vec![5] }).unwrap().next, first);
    let memory = next.call(Memory {}).unwrap();
    assert!(memory.in_use_bytes > Some(0) && memory.reserved_bytes >= memory.in_use_bytes, "{memory:?}");
    assert!(memory.peak_bytes >= memory.reserved_bytes, "{memory:?}");
}

#[test]
fn a_software_adapter_is_left_alone_and_so_is_any_where_it_is_off() {
    let cache = tempfile::tempdir().unwrap();
    for autotune in ["", "off"] {
        let Some((mut client, info)) = loaded(cache.path(), autotune) else { return };
        if info.device.software || autotune == "off" {
            assert!(!info.tunes && info.features.is_empty(), "{info:?}");
            assert_eq!(client.call(one_token()).unwrap(), Tuning::default());
            assert!(!cache.path().join("autotune").exists());
        }
    }
}

#[test]
fn another_wish_is_refused() {
    let command = WorkerCommand {
        program: cargo_bin("evalfw"),
        arguments: vec!["worker".into(), "burn-wgpu".into()],
        environment: vec![("EVALFW_AUTOTUNE".into(), "perhaps".into())],
        agent: false,
    };
    let mut client = Client::start(&command, None, Duration::from_secs(60)).unwrap();
    let problem = client.hello().unwrap_err().to_string();
    assert!(problem.contains("EVALFW_AUTOTUNE") && problem.contains("perhaps"), "{problem}");
}

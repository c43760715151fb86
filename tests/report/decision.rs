//! The decision moves as the record does.

use crate::records::{Engine, ended, infer, load, tiny, train, unavailable};
use evalfw::decide::criteria::Criteria;
use evalfw::decide::figures::Footprint;
use evalfw::decide::knockout::Rule;
use evalfw::decide::ranking::{Ranking, Verdict, Winner};
use evalfw::decide::score::Score;
use evalfw::decide::{Decision, decide};
use evalfw::measure::limits::Limits;
use evalfw::record::{CellRecord, Outcome};
use evalfw_engine::protocol::{DeviceKind, DeviceMemory, Quantization};
use std::io::Write;

fn decision(cells: &[CellRecord]) -> Decision {
    decide(cells, &Criteria::built_in().unwrap())
}

fn headline(cells: &[CellRecord]) -> Ranking {
    decision(cells).headline().unwrap().clone()
}

fn cells(engines: &[Engine]) -> Vec<CellRecord> {
    engines.iter().flat_map(Engine::cells).collect()
}

fn lean() -> Engine {
    Engine::new("lean", 2.0, 1.0)
}

fn fat() -> Engine {
    Engine::new("fat", 11.0, 4.0)
}

const ON_MEMORY: &str = r#"
    [[criteria]]
    id = "memory"
    title = "Memory"
    question = "How much?"
    metric = "peak_training_memory_gb"
    anchors = [
        { value = 16.0, score = 0.0, reason = "full", source = "the target" },
        { value = 6.0, score = 10.0, reason = "roomy", source = "the target" },
    ]
"#;

/// Against the machine's limit.
const ON_SPEED: &str = r#"
    [[criteria]]
    id = "speed"
    title = "Speed"
    question = "How near to the limit?"
    metric = "training_share_percent"
    anchors = [
        { value = 0.0, score = 0.0, reason = "nothing", source = "the limit" },
        { value = 100.0, score = 10.0, reason = "all", source = "the limit" },
    ]
"#;

/// Of these, all of one weight.
fn criteria_of(criteria: &[&str]) -> Criteria {
    let weighted = criteria.iter().map(|text| format!("{text}    weight = {}\n", 100 / criteria.len()));
    let text = "memory_target_gb = 16.0\n".to_owned() + &weighted.collect::<String>();
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(text.as_bytes()).unwrap();
    Criteria::read(file.path()).unwrap()
}

/// Criteria that are all measured: memory alone.
fn memory_only() -> Criteria {
    criteria_of(&[ON_MEMORY])
}

fn score(ranking: &Ranking, engine: &str, criterion: usize) -> Score {
    ranking.candidates.iter().find(|c| c.engine == engine).unwrap().scores[criterion].clone()
}

const MEMORY: usize = 1;
const QLORA: usize = 3;

#[test]
fn with_criteria_missing_the_better_engine_leads_but_does_not_win() {
    let ranking = headline(&cells(&[lean(), fat()]));
    assert_eq!(score(&ranking, "lean", MEMORY).value(), Some(10.0));
    assert_eq!(score(&ranking, "fat", MEMORY).value(), Some(5.0));
    let Verdict::NoClearWinner { lead: Some(lead), missing, .. } = &ranking.verdict else {
        panic!("{:?}", ranking.verdict)
    };
    assert_eq!((lead.engine.as_str(), lead.runner_up.as_str()), ("lean", "fat"));
    assert!((lead.points - 1.25).abs() < 1e-9, "25 % of 5 points");
    // Two criteria of 45 %, one of the eight items of 20 % and four of the seven items of another 10 % are unknown.
    let unknown = 45.0 + 20.0 / 8.0 + 10.0 * 4.0 / 7.0;
    assert!((lead.unknown_weight - unknown).abs() < 1e-9, "{lead:?}");
    assert!((lead.to_overturn - 125.0 / unknown).abs() < 1e-9, "{lead:?}");
    let missing: Vec<(&str, f64)> = missing.iter().map(|m| (m.title.as_str(), m.weight)).collect();
    let expected = [
        ("Hardware optimisation", 25.0),
        ("Ease of use", 20.0),
        ("QLoRA support", 2.5),
        ("Model compatibility", 10.0 * 4.0 / 7.0),
    ];
    for ((title, weight), (expected_title, expected)) in missing.iter().zip(expected) {
        assert!(*title == expected_title && (weight - expected).abs() < 1e-9, "{missing:?}");
    }
    assert_eq!(missing.len(), expected.len());
}

#[test]
fn with_everything_measured_the_better_engine_wins_by_its_points() {
    let decision = decide(&cells(&[lean(), fat()]), &memory_only());
    let Verdict::Winner { engine, runner_up, acceptability, ahead } = &decision.rankings[0].verdict else {
        panic!("{:?}", decision.rankings[0].verdict)
    };
    assert_eq!((engine.as_str(), runner_up.as_str()), ("lean", "fat"));
    assert_eq!(*acceptability, 1.0);
    assert!((ahead - 5.0).abs() < 1e-9);
}

#[test]
fn an_irrelevant_engine_changes_no_score_and_no_verdict() {
    let before = headline(&cells(&[lean(), fat()]));
    let worst = Engine::new("worst", 15.5, 9.0);
    let after = headline(&cells(&[lean(), fat(), worst]));
    for engine in ["lean", "fat"] {
        let total = |r: &Ranking| r.candidates.iter().find(|c| c.engine == engine).unwrap().total;
        assert_eq!(total(&before), total(&after));
    }
    let lead = |ranking: &Ranking| match &ranking.verdict {
        Verdict::NoClearWinner { lead: Some(lead), .. } => lead.clone(),
        other => panic!("{other:?}"),
    };
    assert_eq!(lead(&before), lead(&after));
    assert!(after.dominated.iter().any(|d| d.engine == "worst"));
}

#[test]
fn removing_the_leader_leaves_the_other_one_without_comparison() {
    let ranking = headline(&cells(&[fat()]));
    assert_eq!(ranking.verdict, Verdict::OnlyOne { engine: "fat".into() });
    assert_eq!(ranking.winners[MEMORY], Winner::NoComparison);
}

#[test]
fn over_the_memory_target_is_out_whatever_else_it_does() {
    let blown = Engine { peak_gb: 16.1, ..lean() };
    let ranking = headline(&cells(&[blown, fat()]));
    assert_eq!(ranking.verdict, Verdict::OnlyOne { engine: "fat".into() });
    assert_eq!(ranking.knocked_out[0].engine, "lean");
    assert_eq!(ranking.knocked_out[0].reasons[0].rule, Rule::OverMemoryTarget);
}

#[test]
fn a_wrong_answer_on_any_model_is_out() {
    let mut all = cells(&[lean(), fat()]);
    let on_tiny = Engine { model: tiny(), ..lean() };
    all.push(ended(on_tiny.cell(&load(), 0), Outcome::Wrong, "the logits differ by 3.2"));
    let ranking = headline(&all);
    assert_eq!(ranking.model, "qwen2.5-coder-0.5b");
    let out = &ranking.knocked_out[0];
    assert_eq!((out.engine.as_str(), out.reasons[0].rule), ("lean", Rule::WrongNumerics));
    assert!(out.reasons[0].detail.contains("differ by 3.2"));
}

#[test]
fn what_does_not_run_or_never_trains_is_out() {
    let mut all = cells(&[lean()]);
    all.extend(unavailable("absent", "no adapter", "install one"));
    let idle = Engine::new("idle", 1.0, 1.0);
    all.push(idle.cell(&load(), 0));
    all.push(ended(idle.cell(&train(256), 0), Outcome::Oom, "out of memory"));
    let ranking = headline(&all);
    let rule =
        |engine: &str| ranking.knocked_out.iter().find(|k| k.engine == engine).unwrap().reasons[0].rule;
    assert_eq!(rule("absent"), Rule::DoesNotRunHere);
    assert_eq!(rule("idle"), Rule::DoesNotTrain);
}

#[test]
fn one_lost_repetition_is_no_knock_out() {
    let mut all = cells(&[lean(), fat()]);
    let lost = all.iter_mut().find(|c| c.engine == "lean" && c.scenario.starts_with("train")).unwrap();
    *lost = ended(lost.clone(), Outcome::Crashed, "killed");
    assert_eq!(headline(&all).candidates.len(), 2);
}

#[test]
fn a_job_that_only_one_engine_finished_is_not_measured_of_the_other() {
    let mut all = cells(&[lean(), fat()]);
    all.push(ended(lean().cell(&train(2048), 0), Outcome::Timeout, "too slow"));
    all.push(fat().cell(&train(2048), 0));
    let ranking = headline(&all);
    let Score::NotMeasured { reason } = score(&ranking, "lean", MEMORY) else {
        panic!("the small job must not stand for the large one")
    };
    assert!(reason.contains("train-s2048-b1") && reason.contains("timeout"), "{reason}");
    assert_eq!(ranking.winners[MEMORY], Winner::NotDecided);
    assert!(matches!(&ranking.verdict, Verdict::NoClearWinner { lead: None, .. }), "{:?}", ranking.verdict);
    assert!(ranking.dominated.is_empty());
}

#[test]
fn a_failed_probe_costs_its_share() {
    let partial = Engine { failing_probes: vec!["lora_dropout"], ..lean() };
    let ranking = headline(&cells(&[partial, fat()]));
    let value = score(&ranking, "lean", QLORA).value().unwrap();
    assert!((value - 60.0 / 7.0).abs() < 1e-9, "{value}");
    assert_eq!(ranking.winners[QLORA], Winner::Engine { engine: "fat".into() });
}

#[test]
fn a_probe_that_fails_in_one_cell_of_many_failed() {
    let mut all = cells(&[lean(), fat()]);
    let probe = all[0].samples.probes.iter_mut().find(|p| p.name == "load_nf4").unwrap();
    probe.passed = false;
    let value = score(&headline(&all), "lean", QLORA).value().unwrap();
    assert!((value - 60.0 / 7.0).abs() < 1e-9, "{value}");
}

#[test]
fn what_no_cell_exercised_is_not_measured() {
    let mut all = cells(&[lean(), fat()]);
    for cell in all.iter_mut().filter(|c| c.engine == "lean") {
        cell.samples.probes.clear();
    }
    let ranking = headline(&all);
    assert!(matches!(score(&ranking, "lean", QLORA), Score::NotMeasured { .. }));
    assert_eq!(ranking.winners[QLORA], Winner::NotDecided);
}

#[test]
fn engines_that_do_alike_tie() {
    let ranking = headline(&cells(&[lean(), Engine::new("twin", 2.1, 1.0)]));
    assert_eq!(ranking.winners[MEMORY], Winner::Tie);
    assert!(ranking.dominated.is_empty());
    assert!(matches!(&ranking.verdict, Verdict::NoClearWinner { lead: None, .. }));
}

#[test]
fn training_speed_dominates_only_beyond_the_spread() {
    let slow = Engine::new("slow", 2.0, 3.0);
    let ranking = headline(&cells(&[lean(), slow]));
    assert_eq!(ranking.dominated[0].engine, "slow");
    assert_eq!(ranking.dominated[0].worse_in, ["training speed"]);
    let barely = Engine::new("barely", 2.0, 1.01);
    assert!(headline(&cells(&[lean(), barely])).dominated.is_empty());
    // Halving the speed of the leaner engine makes it no longer dominate.
    let halved = Engine { seconds_per_step: 9.0, ..lean() };
    assert!(headline(&cells(&[halved, fat()])).dominated.is_empty());
}

#[test]
fn a_faster_inference_is_not_dominated() {
    let with_speed = |spoil: fn(&mut CellRecord)| {
        let mut all = cells(&[lean(), fat()]);
        all.iter_mut().filter(|c| c.engine == "fat" && c.scenario.starts_with("infer")).for_each(spoil);
        headline(&all).dominated
    };
    let same = with_speed(|_| {});
    assert_eq!(same[0].engine, "fat");
    assert_eq!(same[0].speeds, ["training", "inference"]);
    let faster_prefill = with_speed(|c| c.samples.prefill.iter_mut().for_each(|s| s.seconds = 0.1));
    assert!(faster_prefill.is_empty());
    let faster_decode = with_speed(|c| c.samples.decode.iter_mut().for_each(|s| s.seconds.fill(0.01)));
    assert!(faster_decode.is_empty());
    let slower_decode = with_speed(|c| c.samples.decode.iter_mut().for_each(|s| s.seconds.fill(1.0)));
    assert!(slower_decode[0].worse_in.contains(&"decoding speed".to_owned()), "{slower_decode:?}");
    let not_measured = with_speed(|c| *c = ended(c.clone(), Outcome::Crashed, "killed"));
    assert!(not_measured.is_empty());
}

#[test]
fn speed_stands_beside_the_score_as_a_ratio() {
    let ranking = headline(&cells(&[lean(), fat()]));
    let speed = ranking.speed.unwrap();
    assert_eq!(speed.engines[0].engine, "lean");
    assert!((speed.engines[0].times_the_slowest - 4.0).abs() < 1e-9);
    assert_eq!(speed.engines[1].times_the_slowest, 1.0);
    assert_eq!(speed.engines[0].real_tokens.n, 6, "three counted steps, twice");
}

#[test]
fn a_software_adapter_is_ranked_with_nobody() {
    let software = Engine { software: true, ..Engine::new("burn-wgpu", 1.0, 0.1) };
    let decision = decision(&cells(&[lean(), fat(), software.clone()]));
    assert_eq!(decision.software_adapters, ["burn-wgpu"]);
    let ranking = decision.headline().unwrap();
    assert_eq!(*ranking, headline(&cells(&[lean(), fat()])));
    assert!(decide(&cells(&[software]), &Criteria::built_in().unwrap()).rankings.is_empty());
}

/// An engine and its stock form, which took fewer steps.
fn beside_stock() -> Vec<CellRecord> {
    let stock = Engine::new("candle-cuda-stock", 1.5, 9.0);
    let mut fewer = train(256);
    if let evalfw::scenario::Scenario::Train(s) = &mut fewer {
        (s.warmup_steps, s.steps) = (0, 1);
    }
    let mut all = cells(&[Engine::new("candle-cuda", 2.0, 1.0), Engine::new("burn-flex", 11.0, 4.0)]);
    all.extend([stock.cell(&fewer, 0), stock.cell(&infer(), 0)]);
    all
}

#[test]
fn a_stock_form_is_not_ranked_beside_its_tuned_form() {
    let all = beside_stock();
    let decision = decision(&all);
    assert_eq!(decision.stock_forms, ["candle-cuda-stock"]);
    let without: Vec<CellRecord> = all.iter().filter(|c| c.engine != "candle-cuda-stock").cloned().collect();
    assert_eq!(*decision.headline().unwrap(), headline(&without));
    assert!(decision.headline().unwrap().speed.is_some());
}

#[test]
fn a_stock_form_is_ranked_where_its_tuned_form_did_not_run() {
    let mut all = cells(&[Engine::new("candle-cuda-stock", 2.0, 1.0), fat()]);
    all.extend(unavailable("candle-cuda-bf16", "no bf16", "take another GPU"));
    let decision = decision(&all);
    assert!(decision.stock_forms.is_empty());
    let candidates = &decision.headline().unwrap().candidates;
    assert!(candidates.iter().any(|c| c.engine == "candle-cuda-stock"), "{candidates:?}");
}

#[test]
fn engines_on_different_models_are_in_different_rankings() {
    let small = Engine { model: tiny(), ..fat() };
    let decision = decision(&cells(&[lean(), small]));
    let models: Vec<&str> = decision.rankings.iter().map(|r| r.model.as_str()).collect();
    assert_eq!(models, ["qwen2.5-coder-0.5b", "tiny"]);
    assert!(decision.rankings.iter().all(|r| r.candidates.len() == 1));
}

#[test]
fn cells_of_different_machines_are_not_compared() {
    let mut all = cells(&[lean(), fat()]);
    for cell in all.iter_mut().filter(|c| c.engine == "fat") {
        cell.environment.cpu = "another CPU".into();
    }
    let decision = decide(&all, &memory_only());
    let Verdict::NoClearWinner { obstacle: Some(obstacle), .. } = &decision.rankings[0].verdict else {
        panic!("{:?}", decision.rankings[0].verdict)
    };
    assert!(obstacle.contains("different machines"));
}

#[test]
fn cells_of_other_builds_or_other_models_of_one_name_are_not_compared() {
    let obstacle_of = |spoil: fn(&mut CellRecord)| {
        let mut all = cells(&[lean(), fat()]);
        all.iter_mut().filter(|c| c.engine == "fat").for_each(spoil);
        let ranking = decide(&all, &memory_only()).rankings[0].clone();
        assert!(ranking.speed.is_none() && ranking.winners == [Winner::NotDecided], "{ranking:?}");
        match ranking.verdict {
            Verdict::NoClearWinner { obstacle: Some(obstacle), lead: None, .. } => obstacle,
            other => panic!("{other:?}"),
        }
    };
    let cases: [(fn(&mut CellRecord), _); 7] = [
        (|c| c.samples.memory_measure = Some("pss".into()), "in different ways (memory: pss, resident)"),
        (|c| c.environment.evalfw_version = "0.2.0".into(), "builds of evalfw (version: 0.2.0, 0.1.0)"),
        (|c| c.environment.commit = Some("fedc".into()), "builds of evalfw (commit: fedc, 0123456789ab)"),
        (|c| c.environment.features.truncate(1), "(features: candle, candle and burn)"),
        (|c| c.model.parameters += 1, "models of one name (parameters: 494032769, 494032768)"),
        (|c| c.model.checkpoint_bytes = 7, "(bytes of the checkpoint: 7, 988065536)"),
        (|c| c.model.origin = "a hub".into(), "(origin: a hub, preset qwen2.5-coder-0.5b, seed 42)"),
    ];
    for (spoil, expected) in cases {
        let obstacle = obstacle_of(spoil);
        assert!(obstacle.contains(expected), "{obstacle}");
    }
}

#[test]
fn jobs_of_one_name_with_other_parameters_are_not_compared() {
    let mut all = cells(&[lean()]);
    let mut scenario = train(256);
    if let evalfw::scenario::Scenario::Train(s) = &mut scenario {
        s.lora_dropout = 0.0;
    }
    all.extend([fat().cell(&load(), 0), fat().cell(&scenario, 0), fat().cell(&infer(), 0)]);
    let Verdict::NoClearWinner { obstacle: Some(obstacle), .. } = headline(&all).verdict else {
        panic!("{:?}", headline(&all).verdict)
    };
    assert!(obstacle.contains("train-s256-b1 with different parameters"), "{obstacle}");
}

#[test]
fn the_memory_of_a_gpu_is_a_lower_bound() {
    let on_gpu = |reserved: u64| {
        let mut all = cells(&[fat()]);
        let mut gpu = cells(&[lean()]);
        for cell in &mut gpu {
            cell.device.as_mut().unwrap().kind = DeviceKind::DiscreteGpu;
            cell.samples.device_memory =
                Some(DeviceMemory { reserved_bytes: Some(reserved), ..DeviceMemory::default() });
        }
        all.extend(gpu);
        headline(&all)
    };
    assert!(matches!(score(&on_gpu(8_000_000_000), "lean", MEMORY), Score::NotMeasured { .. }));
    assert_eq!(on_gpu(17_000_000_000).knocked_out[0].reasons[0].rule, Rule::OverMemoryTarget);
}

#[test]
fn the_memory_of_a_unified_gpu_is_the_larger_of_both_and_a_lower_bound() {
    let on_gpu = |reserved: Option<u64>| {
        let mut gpu = cells(&[lean()]);
        for cell in &mut gpu {
            cell.device.as_mut().unwrap().kind = DeviceKind::UnifiedGpu;
            let memory = DeviceMemory { reserved_bytes: reserved, ..DeviceMemory::default() };
            cell.samples.device_memory = Some(memory);
        }
        gpu.into_iter().find(|c| c.scenario.starts_with("train")).unwrap()
    };
    let footprint = |reserved: Option<u64>| Footprint::of_cell(&on_gpu(reserved));
    assert_eq!(footprint(Some(8_000_000_000)), Footprint::AtLeast { bytes: 8_000_000_000 });
    // The resident peak of the fixture is 2 GB.
    assert_eq!(footprint(Some(1_000_000_000)), Footprint::AtLeast { bytes: 2_000_000_000 });
    assert_eq!(footprint(None), Footprint::Peak { bytes: 2_000_000_000 });
    let mut over = cells(&[fat()]);
    over.push(on_gpu(Some(17_000_000_000)));
    assert_eq!(headline(&over).knocked_out[0].reasons[0].rule, Rule::OverMemoryTarget);
}

fn speed_and_memory() -> Criteria {
    criteria_of(&[ON_SPEED, ON_MEMORY])
}

/// On a machine of 1 TFLOP/s, where the reference step of 0.5 × 10^12 operations takes half a second at best.
fn with_limits(engines: &[Engine]) -> Vec<CellRecord> {
    let host = serde_json::json!({ "host": { "threads": 2, "f32_flops": 1e12 }, "device": null });
    let limits: Limits = serde_json::from_value(host).unwrap();
    let mut all = cells(engines);
    all.iter_mut().for_each(|cell| cell.limits = Some(limits));
    all
}

fn winner(cells: &[CellRecord]) -> Option<String> {
    match decide(cells, &speed_and_memory()).rankings[0].verdict.clone() {
        Verdict::Winner { engine, .. } => Some(engine),
        _ => None,
    }
}

#[test]
fn the_decision_moves_as_speed_and_memory_do() {
    let (quick, slow) = (Engine::new("quick", 7.0, 0.6), Engine::new("slow", 7.0, 2.4));
    assert_eq!(winner(&with_limits(&[quick.clone(), slow.clone()])).as_deref(), Some("quick"));
    // Slowed down, and the other one sped up.
    let (slowed, sped) =
        (Engine { seconds_per_step: 2.4, ..quick.clone() }, Engine { seconds_per_step: 0.6, ..slow.clone() });
    assert_eq!(winner(&with_limits(&[slowed, sped])).as_deref(), Some("slow"));
    // Alike: nobody wins.
    let twin = Engine { name: "twin", ..quick.clone() };
    assert_eq!(winner(&with_limits(&[quick.clone(), twin])), None);
    // Close to the target the memory outweighs the speed, and above it the engine is out.
    let heavy = Engine { peak_gb: 15.5, ..quick.clone() };
    let light = Engine::new("light", 6.0, 0.9);
    assert_eq!(winner(&with_limits(&[heavy, light])).as_deref(), Some("light"));
    let blown = Engine { peak_gb: 16.5, ..quick.clone() };
    let ranking = decide(&with_limits(&[blown, slow.clone()]), &speed_and_memory()).rankings[0].clone();
    assert_eq!(ranking.verdict, Verdict::OnlyOne { engine: "slow".into() });
    // One that is worse in all changes nothing of the others.
    let worst = Engine::new("worst", 15.9, 9.0);
    assert_eq!(winner(&with_limits(&[quick, slow, worst])).as_deref(), Some("quick"));
}

#[test]
fn a_framework_is_represented_by_the_best_of_its_engines() {
    let best = Engine::new("candle-cpu-bf16", 7.0, 0.6);
    let sibling = Engine::new("candle-cpu", 7.5, 1.2);
    let other = Engine::new("burn-flex", 8.0, 1.0);
    let ranking = decide(&with_limits(&[best, sibling, other]), &speed_and_memory()).rankings[0].clone();
    assert_eq!(ranking.finalists, ["burn-flex", "candle-cpu-bf16"]);
    assert_eq!(ranking.candidates.len(), 3);
    let drawn = ranking.acceptability.unwrap();
    assert_eq!(drawn.engines.len(), 2);
}

#[test]
fn other_hardware_has_a_verdict_of_its_own() {
    let mut all = with_limits(&[Engine::new("candle-cpu", 2.0, 1.0), Engine::new("burn-flex", 3.0, 2.0)]);
    all.extend(unavailable("candle-metal", "candle was built without metal", "build with metal"));
    let targets = decision(&all).targets;
    let of = |title: &str| targets.iter().find(|t| t.title.contains(title)).unwrap();
    assert_eq!(of("Linux").best.as_deref(), Some("candle-cpu"));
    let apple = of("Apple");
    assert_eq!((apple.is_measured, apple.best.as_deref()), (false, None));
    let missing = |name: &str| apple.engines.iter().find(|e| e.engine == name).unwrap().missing.as_deref();
    assert_eq!(missing("candle-metal"), Some("candle was built without metal"));
    assert_eq!(missing("mlx-lm"), Some("it was not run"));
    assert!(apple.command.contains("--engine mlx-lm,candle-metal"), "{}", apple.command);
}

#[test]
fn a_framework_without_nf4_is_compared_by_its_own_format_and_one_with_it_is_not() {
    let native = |cell: &mut CellRecord| {
        cell.cell = cell.cell.replace("/nf4/", "/native/");
        cell.parameters = cell.parameters.quantized(Quantization::Native);
        cell.quantization = Quantization::Native;
    };
    let mut all = cells(&[lean(), fat()]);
    all.iter_mut().filter(|cell| cell.engine == "fat").for_each(native);
    let ranking = headline(&all);
    assert_eq!(score(&ranking, "lean", MEMORY).value(), Some(10.0));
    assert_eq!(score(&ranking, "fat", MEMORY).value(), Some(5.0));

    // With one load in NF4 it has that format, and its other cells are not what is compared.
    let mut all = cells(&[lean(), fat()]);
    all.iter_mut().filter(|cell| cell.engine == "fat" && cell.scenario != "load").for_each(native);
    assert_eq!(score(&headline(&all), "fat", MEMORY).value(), None);
}

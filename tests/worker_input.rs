//! What a worker refuses to compute: a mean of nothing, an optimizer that cannot be.

use assert_cmd::cargo::cargo_bin;
use evalfw::worker::{Client, WorkerCommand};
use evalfw_engine::batch::{Batch, IGNORE_INDEX, write_batches};
use evalfw_engine::protocol::{
    AttachAdapter, BatchRef, Evaluate, Gradients, Load, Quantization, TrainStep, TrainingConfig,
};
use std::path::{Path, PathBuf};
use std::time::Duration;

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference/golden/untied-6q3kv")
}

/// A worker with a model of the reference.
fn loaded() -> Client {
    let arguments = vec!["worker".into(), "candle-cpu".into()];
    let command =
        WorkerCommand { program: cargo_bin("evalfw"), arguments, environment: Vec::new(), agent: false };
    let mut client = Client::start(&command, None, Duration::from_secs(60)).unwrap();
    client.hello().unwrap();
    client.call(Load { model: golden().join("model"), quantization: Quantization::None }).unwrap();
    client
}

fn attach(client: &mut Client, training: TrainingConfig) -> Result<(), String> {
    let call = AttachAdapter { adapter: golden().join("adapter"), training };
    client.call(call).map(drop).map_err(|e| e.to_string())
}

#[test]
fn there_is_no_loss_of_lines_without_a_supervised_position() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("batches.jsonl");
    let ids = vec![vec![1, 2, 3]];
    let batch = |label| Batch {
        input_ids: ids.clone(),
        // A label on the first token has nothing to predict it.
        labels: vec![vec![1, IGNORE_INDEX, label]],
        lengths: vec![3],
    };
    write_batches(&file, &[batch(IGNORE_INDEX), batch(3)]).unwrap();
    let mut client = loaded();
    attach(&mut client, TrainingConfig::default()).unwrap();
    let of = |lines: &[usize]| BatchRef { file: file.clone(), lines: lines.to_vec() };
    let (step, dropout_seed, output) = (0, 0, folder.path().join("gradients"));
    for lines in [&[][..], &[0], &[0, 0]] {
        let problems = [
            client.call(Evaluate { batches: of(lines) }).unwrap_err(),
            client.call(TrainStep { step, dropout_seed, batches: of(lines) }).unwrap_err(),
            client
                .call(Gradients { step, dropout_seed, batches: of(lines), output: output.clone() })
                .unwrap_err(),
        ];
        for problem in problems {
            let message = problem.to_string();
            let words = ["batches.jsonl", "has a loss", &format!("{lines:?}")];
            assert!(words.iter().all(|word| message.contains(word)), "{message}");
        }
    }
    // One micro-batch without an answer adds nothing, and does no harm.
    let alone = client.call(Evaluate { batches: of(&[1]) }).unwrap();
    let both = client.call(Evaluate { batches: of(&[0, 1]) }).unwrap();
    assert_eq!((alone.loss, alone.tokens), (both.loss, both.tokens));
    assert!(client.call(TrainStep { step, dropout_seed, batches: of(&[0, 1]) }).unwrap().loss > 0.0);
}

#[test]
fn training_values_that_cannot_be_are_refused_by_field() {
    let mut client = loaded();
    let training = TrainingConfig { learning_rate: -1.0, ..TrainingConfig::default() };
    let problem = attach(&mut client, training).unwrap_err();
    assert!(problem.contains("learning_rate is -1"), "{problem}");
    attach(&mut client, TrainingConfig::default()).unwrap();
}

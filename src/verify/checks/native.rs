//! A framework's own quantized format, which no reference has.
//!
//! Where an engine tells what its format made of the weights, two things are held apart. How far those are from the
//! checkpoint's is the quantization error, and is measured in that of NF4, another format of 4 bits. And with those
//! weights, whatever they are, the engine must compute what its unquantized form computes, which is held against the
//! reference; there is no room for the quantization error in that.

use super::Bench;
use crate::verify::Verdict;
use crate::verify::compare::{Deviation, relative_norm};
use crate::verify::reference::{AdapterLosses, Expectations, GreedyToken, Prompt};
use crate::verify::session::{Broken, Session};
use crate::verify::tolerance::{NATIVE_LOGITS, NATIVE_LOSSES, NATIVE_WEIGHTS_OF_NF4};
use anyhow::{Context, Result};
use evalfw_engine::checkpoint::Checkpoint;
use evalfw_engine::nf4::Nf4Tensor;
use evalfw_engine::protocol::{Decode, DecodedWeights, Prefill, Quantization, TrainingConfig};
use evalfw_engine::tensor_file::{self, read_projections};
use evalfw_engine::weights::{ProjectionWeights, projection_name};
use std::collections::BTreeMap;
use std::path::Path;

impl Bench<'_> {
    pub fn native_checks(mut self) -> Result<(), Broken> {
        let Some(decoded) = self.decoded_weights()? else { return self.near_the_unquantized() };
        let distance = self.session.harness("weights", distance_of_weights(&self.model.model, &decoded))?;
        self.report(
            "weights from the checkpoint's, over the distance of NF4's",
            distance,
            NATIVE_WEIGHTS_OF_NF4,
        );

        let folder = self.scratch.path().join("decoded");
        self.session.harness("weights", write_checkpoint(&self.model.model, &decoded, &folder))?;
        let expected = self.expectations(&folder)?;
        let model = self.model.expecting(expected);
        let mut same_weights = Bench { model: &model, ..self };
        same_weights.logits(same_weights.tolerances.logits)?;
        same_weights.decoding()?;
        same_weights.losses([same_weights.tolerances.losses; 3])?;
        same_weights.gradients()
    }

    /// `None` where the engine does not tell.
    fn decoded_weights(&mut self) -> Result<Option<ProjectionWeights>, Broken> {
        let output = self.scratch.path().join("decoded.safetensors");
        match self.session.call("decoded weights", DecodedWeights { output: output.clone() }) {
            Err(broken) if broken.refused => Ok(None),
            Err(broken) => Err(broken),
            Ok(_) => self
                .session
                .harness("decoded weights", read_projections(&output, &self.model.config))
                .map(Some),
        }
    }

    /// Held against what the format stands for, the unquantized model, as far as one of 8 bits can be near it.
    fn near_the_unquantized(&mut self) -> Result<(), Broken> {
        self.logits(NATIVE_LOGITS)?;
        self.losses([NATIVE_LOSSES; 3])?;
        self.gradients_without_reference().map(drop)
    }

    /// What the engine's unquantized form computes with the checkpoint in `folder`.
    fn expectations(&self, folder: &Path) -> Result<Expectations, Broken> {
        let (session, _) = Session::open(self.command, folder, Quantization::None)?;
        let scratch = session.harness("scratch", tempfile::tempdir())?;
        let mut unquantized = Bench {
            command: self.command,
            session,
            scratch,
            model: self.model,
            quantization: Quantization::None,
            tolerances: self.tolerances,
            verdict: &mut Verdict::new(&self.verdict.engine),
        };
        let prompts =
            self.model.prompts.iter().map(|prompt| unquantized.prompt(prompt)).collect::<Result<_, _>>()?;
        let base = unquantized.all_losses()?;
        unquantized.attach(&self.model.trained_adapter, TrainingConfig::default())?;
        let trained_adapter = unquantized.all_losses()?;
        unquantized.attach(&self.model.adapter, TrainingConfig::default())?;
        let adapter = unquantized.all_losses()?;
        let gradients = unquantized.gradients_of(&self.model.adapter, &[0], 0, true)?;
        Ok(Expectations { prompts, losses: AdapterLosses { base, adapter, trained_adapter }, gradients })
    }

    /// The prompt with other logits and another continuation, of as many tokens.
    fn prompt(&mut self, prompt: &Prompt) -> Result<Prompt, Broken> {
        let tokens = prompt.tokens.clone();
        let count = prompt.continuation.len();
        let first = self.session.call("prefill", Prefill { tokens: tokens.clone() })?.next;
        let decoded = self.session.call("decode", Decode { first, steps: count - 1 })?.tokens;
        let continuation: Vec<u32> = std::iter::once(first).chain(decoded).collect();

        let sequence = [&tokens[..], &continuation[..count - 1]].concat();
        let logits = self.logits_of(&sequence)?;
        let vocab_size = self.model.config.vocab_size;
        let after_prompt = logits.chunks_exact(vocab_size).skip(tokens.len() - 1);
        let continuation =
            continuation.into_iter().zip(after_prompt).map(|(token, logits)| GreedyToken::new(token, logits));
        let continuation = continuation.collect();
        Ok(Prompt { logits: logits[..tokens.len() * vocab_size].to_vec(), tokens, continuation })
    }

    fn all_losses(&mut self) -> Result<Vec<f64>, Broken> {
        (0..self.model.batch_count()).map(|line| self.evaluate(line)).collect()
    }
}

/// The largest distance of a projection from the checkpoint's, over that of the same one in NF4.
fn distance_of_weights(model: &Path, decoded: &ProjectionWeights) -> Result<Deviation> {
    let checkpoint = Checkpoint::open(model)?;
    let mut all = Vec::new();
    for ((layer, target), decoded) in decoded {
        let original = values(&checkpoint, &projection_name(*layer, *target))?;
        let nf4 = Nf4Tensor::quantize(checkpoint.config.projection_shape(*target), &original).dequantize();
        let [distance, of_nf4] = [decoded, &nf4].map(|values| relative_norm(values, &original));
        let place = format!("{} of layer {layer}: {distance:.3}, NF4 {of_nf4:.3}", target.module());
        all.push(Deviation::new(distance / of_nf4.max(f64::MIN_POSITIVE), place));
    }
    Ok(Deviation::largest(all))
}

/// The model in f32, with other projections.
fn write_checkpoint(model: &Path, projections: &ProjectionWeights, folder: &Path) -> Result<()> {
    let checkpoint = Checkpoint::open(model)?;
    let replaced: BTreeMap<String, &Vec<f32>> = projections
        .iter()
        .map(|((layer, target), values)| (projection_name(*layer, *target), values))
        .collect();
    let mut tensors = Vec::new();
    for (name, shape) in checkpoint.config.tensors() {
        let values = match replaced.get(&name) {
            Some(values) => (*values).clone(),
            None => values(&checkpoint, &name)?,
        };
        tensors.push((name, shape, values));
    }
    std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    let config = model.join("config.json");
    std::fs::copy(&config, folder.join("config.json")).with_context(|| config.display().to_string())?;
    let named = tensors.iter().map(|(name, shape, values)| (name.clone(), shape.clone(), values.as_slice()));
    Ok(tensor_file::write(&folder.join("model.safetensors"), named)?)
}

fn values(checkpoint: &Checkpoint, name: &str) -> Result<Vec<f32>> {
    let mut reader = checkpoint.reader(name)?;
    let mut values = vec![0.0; reader.elements()];
    reader.read_f32(&mut values)?;
    Ok(values)
}

//! Logits, greedy decoding, evaluation losses.

use super::Bench;
use crate::verify::compare::{Deviation, relative_to_largest};
use crate::verify::reference::{Prompt, read_f32};
use crate::verify::session::Broken;
use evalfw_engine::protocol::{Decode, Logits, Prefill, TrainingConfig};

impl Bench<'_> {
    pub fn logits(&mut self) -> Result<(), Broken> {
        let output = self.scratch.path().join("logits.safetensors");
        let mut all = Vec::new();
        for prompt in &self.model.prompts {
            let call = Logits { tokens: prompt.tokens.clone(), output: output.clone() };
            self.session.call("logits", call)?;
            let got = self.session.harness("logits", read_f32(&output, "logits"))?;
            let place = format!("prompt of {} tokens", prompt.tokens.len());
            all.push(Deviation::new(relative_to_largest(&got, &prompt.logits), place));
        }
        self.report("logits", Deviation::largest(all), self.tolerances.logits);
        Ok(())
    }

    pub fn decoding(&mut self) -> Result<(), Broken> {
        let mut all = Vec::new();
        for prompt in &self.model.prompts {
            all.push(self.continuation(prompt)?);
        }
        self.report("greedy tokens through the KV cache", Deviation::largest(all), 0.0);
        Ok(())
    }

    /// Counts wrong tokens. The cache is filled with the reference's tokens, so that each token is judged
    /// by itself. One is excused where the reference's two best logits are closer than the tolerance.
    fn continuation(&mut self, prompt: &Prompt) -> Result<Deviation, Broken> {
        let largest = prompt.logits.iter().fold(0f64, |largest, l| largest.max(f64::from(l.abs())));
        let excused_below = self.tolerances.logits * largest;
        let (mut wrong, mut excused) = (0, 0);
        let mut got = self.session.call("prefill", Prefill { tokens: prompt.tokens.clone() })?.next;
        for (index, expected) in prompt.continuation.iter().enumerate() {
            if index > 0 {
                let first = prompt.continuation[index - 1].token;
                let decoded = self.session.call("decode", Decode { first, steps: 1 })?.tokens;
                let one = decoded.first().copied().ok_or("decode gave no token");
                got = self.session.harness("decode", one)?;
            }
            if got != expected.token {
                let tie = expected.gap < excused_below;
                *if tie { &mut excused } else { &mut wrong } += 1;
            }
        }
        let count = prompt.continuation.len();
        let mut place = format!(
            "after a prompt of {}: {} of {count} agree",
            prompt.tokens.len(),
            count - wrong - excused
        );
        if excused > 0 {
            place += &format!(", {excused} between logits closer than {excused_below:.1e}");
        }
        Ok(Deviation::new(f64::from(u32::try_from(wrong).unwrap_or(u32::MAX)), place))
    }

    pub fn losses(&mut self) -> Result<(), Broken> {
        let model = self.model;
        let expected = model.losses.of(self.quantization);
        let tolerance = self.tolerances.losses;
        self.batch_losses("losses without adapter", &expected.base, tolerance)?;
        self.attach(&model.adapter, TrainingConfig::default())?;
        self.batch_losses("losses with adapter", &expected.adapter, tolerance)?;
        self.attach(&model.trained_adapter, TrainingConfig::default())?;
        self.batch_losses("losses with an adapter trained by PEFT", &expected.trained_adapter, tolerance)
    }
}

//! Logits, greedy decoding, evaluation losses.

use super::Bench;
use crate::verify::compare::{Deviation, relative_to_largest};
use crate::verify::reference::{GreedyToken, Prompt, read_f32};
use crate::verify::session::Broken;
use evalfw_engine::protocol::{Decode, Logits, Prefill, TrainingConfig};

/// Longer ones take minutes where something is computed in software, and logits of gigabytes.
const LONGEST_CONTEXT: usize = 1024;

/// As the check is called, unquantized.
pub const LOGITS: &str = "logits";
/// The same.
pub const FULL_CONTEXT: &str = "the whole context as a prompt";
/// The same.
pub const TRAINED_ADAPTER: &str = "losses with a trained adapter";

impl Bench<'_> {
    pub fn logits(&mut self, tolerance: f64) -> Result<(), Broken> {
        let mut all = Vec::new();
        for prompt in &self.model.prompts {
            let got = self.logits_of(&prompt.tokens)?;
            let place = format!("prompt of {} tokens", prompt.tokens.len());
            all.push(Deviation::new(relative_to_largest(&got, &prompt.logits), place));
        }
        self.report(LOGITS, Deviation::largest(all), tolerance);
        Ok(())
    }

    /// `[tokens, vocab_size]`
    pub fn logits_of(&mut self, tokens: &[u32]) -> Result<Vec<f32>, Broken> {
        let output = self.scratch.path().join("logits.safetensors");
        self.session.call("logits", Logits { tokens: tokens.to_vec(), output: output.clone() })?;
        self.session.harness("logits", read_f32(&output, "logits"))
    }

    /// A prompt as long as the model's context. The reference has none so long: the token that is chosen has to have the
    /// largest logit of the engine's own.
    pub fn full_context(&mut self) -> Result<(), Broken> {
        let config = &self.model.config;
        let length = config.max_position_embeddings;
        if length > LONGEST_CONTEXT {
            return Ok(());
        }
        let tokens: Vec<u32> = (0..length).map(|i| (i * 7 % config.vocab_size) as u32).collect();
        let next = self.session.call("prefill", Prefill { tokens: tokens.clone() })?.next;
        let logits = self.logits_of(&tokens)?;
        let last = &logits[logits.len().saturating_sub(config.vocab_size)..];
        let largest = last.iter().fold(f32::NEG_INFINITY, |largest, logit| largest.max(*logit));
        let chosen = last.get(next as usize).copied().unwrap_or(f32::NEG_INFINITY);
        let deviation = f64::from(largest - chosen) / f64::from(largest.abs().max(f32::MIN_POSITIVE));
        let place = format!("a prompt of {length} tokens");
        self.report(FULL_CONTEXT, Deviation::new(deviation, place), self.tolerances.logits);
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
    /// by itself.
    fn continuation(&mut self, prompt: &Prompt) -> Result<Deviation, Broken> {
        let largest = prompt.logits.iter().fold(0f64, |largest, l| largest.max(f64::from(l.abs())));
        let excused_below = self.tolerances.logits * largest;
        let first = self.session.call("prefill", Prefill { tokens: prompt.tokens.clone() })?.next;
        let mut got = vec![first];
        for previous in prompt.continuation.iter().take(prompt.continuation.len() - 1) {
            let call = Decode { first: previous.token, steps: 1 };
            let decoded = self.session.call("decode", call)?.tokens;
            let one = decoded.first().copied().ok_or("decode gave no token");
            got.push(self.session.harness("decode", one)?);
        }
        let Judged { wrong, excused } = judge(&got, &prompt.continuation, excused_below);
        let count = got.len();
        let agreed = count - wrong - excused;
        let mut place = format!("after a prompt of {}: {agreed} of {count} agree", prompt.tokens.len());
        if excused > 0 {
            place += &format!(", {excused} between logits closer than {excused_below:.1e}");
        }
        Ok(Deviation::new(wrong as f64, place))
    }

    /// Without adapter, with one, and with one that PEFT trained, each with its tolerance.
    pub fn losses(&mut self, [base, adapter, trained]: [f64; 3]) -> Result<(), Broken> {
        let model = self.model;
        let expected = model.losses.of(self.quantization);
        self.batch_losses("losses without adapter", &expected.base, base)?;
        self.attach(&model.adapter, TrainingConfig::default())?;
        self.batch_losses("losses with adapter", &expected.adapter, adapter)?;
        self.attach(&model.trained_adapter, TrainingConfig::default())?;
        self.batch_losses(TRAINED_ADAPTER, &expected.trained_adapter, trained)
    }
}

struct Judged {
    wrong: usize,
    excused: usize,
}

/// A token that differs is excused where the reference's two best logits are closer than the tolerance, as
/// long as another token of the prompt agrees: gaps that excuse all of them would judge nothing.
fn judge(got: &[u32], expected: &[GreedyToken], excused_below: f64) -> Judged {
    let mut judged = Judged { wrong: 0, excused: 0 };
    for (got, expected) in got.iter().zip(expected) {
        if *got != expected.token {
            // A gap of 0 is no near tie: the reference would not have chosen.
            let near_tie = expected.gap > 0.0 && expected.gap < excused_below;
            *if near_tie { &mut judged.excused } else { &mut judged.wrong } += 1;
        }
    }
    match judged.excused == expected.len() {
        true => Judged { wrong: expected.len(), excused: 0 },
        false => judged,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// (wrong, excused) for the tokens 1, 2, 3 with these gaps, and a tolerance of 0.1.
    fn judged(got: [u32; 3], gaps: [f64; 3]) -> (usize, usize) {
        let expected: Vec<GreedyToken> =
            [1, 2, 3].into_iter().zip(gaps).map(|(token, gap)| GreedyToken { token, gap }).collect();
        let Judged { wrong, excused } = judge(&got, &expected, 0.1);
        (wrong, excused)
    }

    #[test]
    fn a_near_tie_excuses_its_token_only() {
        assert_eq!(judged([1, 2, 3], [1.0, 1.0, 1.0]), (0, 0));
        assert_eq!(judged([1, 9, 3], [1.0, 0.05, 1.0]), (0, 1));
        assert_eq!(judged([9, 9, 3], [1.0, 0.05, 1.0]), (1, 1));
        assert_eq!(judged([1, 9, 3], [1.0, 0.0, 1.0]), (1, 0));
    }

    #[test]
    fn gaps_do_not_excuse_every_token_of_a_prompt() {
        assert_eq!(judged([9, 9, 9], [0.05; 3]), (3, 0));
        assert_eq!(judged([1, 9, 9], [0.05; 3]), (0, 2));
    }
}

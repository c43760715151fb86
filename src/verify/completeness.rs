//! A reference that says too little lets every engine pass. What a model's golden files must hold.

use super::reference::{Curve, Losses, Prompt, ReferenceModel};
use anyhow::{Result, bail};
use evalfw_engine::batch::{Batch, read_batches};
use evalfw_engine::protocol::Quantization;

/// The curves of `tests/reference`, by the form of the base that they train on.
const CURVES: [(&str, Quantization); 4] = [
    ("accumulation", Quantization::None),
    ("adamw", Quantization::None),
    ("clipping", Quantization::None),
    ("nf4", Quantization::Nf4),
];
const CURVE_STEPS: usize = 20;
/// Of the largest logit: the full forward pass of the reference from its own decoding through the cache.
const ROUNDING: f64 = 1e-4;

/// The message names the file in the model's folder.
pub fn check(model: &ReferenceModel) -> Result<()> {
    let batches = read_batches(&model.batches)?;
    if batches.is_empty() {
        bail!("batches.jsonl: no batches");
    }
    for (line, batch) in batches.iter().enumerate() {
        if let Err(problem) = batch.validate(model.config.vocab_size) {
            bail!("batches.jsonl: line {}: {problem}", line + 1);
        }
    }
    check_losses(&model.losses, batches.len())?;
    if model.prompts.is_empty() {
        bail!("prompts.json: no prompts");
    }
    for (number, prompt) in model.prompts.iter().enumerate() {
        check_prompt(prompt, number, model.config.vocab_size)?;
    }
    for (name, quantization) in CURVES {
        let Some(curve) = model.curves.get(name) else { bail!("curves.json: no curve {name}") };
        if curve.settings.quantization() != quantization {
            bail!("curves.json: {name} is of another quantization than {quantization:?}");
        }
        if curve.steps.len() < CURVE_STEPS {
            bail!("curves.json: {name} has {} steps of {CURVE_STEPS}", curve.steps.len());
        }
    }
    for (name, curve) in &model.curves {
        check_curve(&format!("curves.json: {name}"), curve, &batches)?;
    }
    if model.curves["accumulation"].steps.iter().any(|step| step.lines.len() < 2) {
        bail!("curves.json: accumulation has a step of less than two micro-batches");
    }
    if !clips(&model.curves["clipping"]) {
        bail!("curves.json: clipping has no gradient norm above its max_grad_norm");
    }
    check_curve("dropout.json", &model.dropout, &batches)?;
    if model.dropout.settings.lora_dropout <= 0.0 {
        bail!("dropout.json: lora_dropout is {}", model.dropout.settings.lora_dropout);
    }
    Ok(())
}

fn check_losses(losses: &Losses, batches: usize) -> Result<()> {
    for quantization in [Quantization::None, Quantization::Nf4] {
        let of = losses.of(quantization);
        for (name, losses) in
            [("base", &of.base), ("adapter", &of.adapter), ("trained_adapter", &of.trained_adapter)]
        {
            if losses.len() != batches {
                bail!("losses.json: {quantization:?}, {name}: {} losses of {batches} batches", losses.len());
            }
        }
    }
    Ok(())
}

fn check_prompt(prompt: &Prompt, number: usize, vocab_size: usize) -> Result<()> {
    if prompt.tokens.is_empty() {
        bail!("prompts.json: prompt {number} is empty");
    }
    let (values, expected) = (prompt.logits.len(), prompt.tokens.len() * vocab_size);
    if values != expected {
        bail!("logits.safetensors: prompt_{number} has {values} values, expected {expected}");
    }
    if let Some(index) = prompt.logits.iter().position(|l| !l.is_finite()) {
        bail!("logits.safetensors: prompt_{number} is {} at element {index}", prompt.logits[index]);
    }
    let Some(first) = prompt.continuation.first() else {
        bail!("greedy.json: no continuation of prompt {number}")
    };
    for (index, greedy) in prompt.continuation.iter().enumerate() {
        if greedy.token as usize >= vocab_size {
            bail!("greedy.json: prompt {number}: token {} is not below {vocab_size}", greedy.token);
        }
        if !(greedy.gap.is_finite() && greedy.gap >= 0.0) {
            bail!("greedy.json: prompt {number}: gap {index} is {}", greedy.gap);
        }
    }
    // The logits after the prompt say what the first token and its gap are.
    let mut last: Vec<f64> = prompt.logits[values - vocab_size..].iter().map(|l| f64::from(*l)).collect();
    let largest = last.iter().fold(0f64, |largest, l| largest.max(l.abs()));
    let chosen = last[first.token as usize];
    last.remove(first.token as usize);
    let next = last.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    if next.is_finite() && (chosen - next - first.gap).abs() > ROUNDING * largest {
        bail!(
            "greedy.json: prompt {number}: token {} with gap {} is not what logits.safetensors says, {}",
            first.token,
            first.gap,
            chosen - next
        );
    }
    Ok(())
}

fn check_curve(place: &str, curve: &Curve, batches: &[Batch]) -> Result<()> {
    if curve.steps.is_empty() {
        bail!("{place}: no steps");
    }
    for (index, step) in curve.steps.iter().enumerate() {
        if step.lines.is_empty() {
            bail!("{place}: step {index} has no lines");
        }
        if let Some(line) = step.lines.iter().find(|&&line| line >= batches.len()) {
            bail!("{place}: step {index} asks for line {line} of {} batches", batches.len());
        }
    }
    Ok(())
}

fn clips(curve: &Curve) -> bool {
    let limit = curve.settings.training().max_grad_norm;
    limit.is_some_and(|limit| curve.steps.iter().any(|step| step.grad_norm > limit))
}

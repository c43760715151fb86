//! Loss and gradients by Burn's cross-entropy and autodiff.

use super::adapter::attached;
use super::network::{Pass, Qwen2, tokens};
use crate::guard::read;
use burn::module::Param;
use burn::nn::loss::CrossEntropyLossConfig;
use burn::optim::{GradientsAccumulator, GradientsParams};
use burn::tensor::{Device, Int, Tensor, TensorData};
use evalfw_engine::batch::Batch;
use evalfw_engine::config::ModelConfig;
use evalfw_engine::{Error, Evaluation, Result, StepInput, StepResult};

/// The gradients of all micro-batches together, before clipping. `device` is that of the parameters.
pub fn gradients(
    network: &Qwen2,
    config: &ModelConfig,
    device: &Device,
    input: &StepInput<'_>,
) -> Result<(StepResult, GradientsParams)> {
    let divisor = input.trained_tokens() as f64;
    let mut accumulator = GradientsAccumulator::new();
    let mut loss = 0.0;
    for batch in input.micro_batches {
        let Some((mean, count)) = mean_loss(network, config, batch, device)? else { continue };
        let share = mean * (count as f64 / divisor);
        loss += scalar(share.clone().inner())?;
        accumulator.accumulate(network, GradientsParams::from_grads(share.backward(), network));
    }
    let mut gradients = accumulator.grads();
    if gradients.is_empty() {
        for (_, _, adapter) in attached(network)? {
            for factor in [&adapter.a, &adapter.b] {
                gradients.register(factor.id, factor.val().inner().zeros_like());
            }
        }
    }
    let grad_norm = norm(network, &gradients)?;
    Ok((StepResult { loss, grad_norm }, gradients))
}

/// The loss without gradients, of a network on a `device` without autodiff.
pub fn evaluate(
    network: &Qwen2,
    config: &ModelConfig,
    device: &Device,
    batches: &[Batch],
) -> Result<Evaluation> {
    let mut evaluation = Evaluation::default();
    for batch in batches {
        let Some((mean, count)) = mean_loss(network, config, batch, device)? else { continue };
        evaluation.loss_sum += scalar(mean)? * count as f64;
        evaluation.tokens += count;
    }
    Ok(evaluation)
}

/// The mean over the positions with a loss, and their number; `None` where there are none.
///
/// Burn's cross-entropy has no index to ignore: its mask for padding takes a token, and any token of the
/// vocabulary can be a target. The rows of the logits, which are computed for all positions, are chosen instead.
fn mean_loss(
    network: &Qwen2,
    config: &ModelConfig,
    batch: &Batch,
    device: &Device,
) -> Result<Option<(Tensor<1>, usize)>> {
    let (rows, targets): (Vec<i32>, Vec<i32>) =
        batch.targets().into_iter().map(|(row, target)| (row as i32, target as i32)).unzip();
    let count = rows.len();
    if count == 0 {
        return Ok(None);
    }
    let indices = |values: Vec<i32>| Tensor::<1, Int>::from_data(TensorData::new(values, [count]), device);
    let pass = Pass::new(config, 0, batch.sequence_length(), device);
    let hidden = network.hidden(tokens(&batch.flat_ids(), batch.examples(), device), &pass, None);
    let logits = network.logits(hidden).select(0, indices(rows));
    let loss = CrossEntropyLossConfig::new().init(device).forward(logits, indices(targets));
    Ok(Some((loss, count)))
}

/// The gradient of a factor.
pub fn gradient(gradients: &GradientsParams, factor: &Param<Tensor<2>>) -> Result<Tensor<2>> {
    let missing = || Error::framework("Burn left no gradient for a factor of the adapter");
    gradients.get(factor.id).ok_or_else(missing)
}

/// L2 norm over all factors together.
fn norm(network: &Qwen2, gradients: &GradientsParams) -> Result<f64> {
    let mut squares = Vec::new();
    for (_, _, adapter) in attached(network)? {
        for factor in [&adapter.a, &adapter.b] {
            squares.push(gradient(gradients, factor)?.square().sum());
        }
    }
    Ok(read(Tensor::cat(squares, 0))?.into_iter().map(f64::from).sum::<f64>().sqrt())
}

/// As `torch.nn.utils.clip_grad_norm_`, over all factors together; Burn's own clips each tensor by itself.
pub fn clip(network: &Qwen2, gradients: &mut GradientsParams, norm: f64, max_norm: f64) -> Result<()> {
    let factor = max_norm / (norm + 1e-6);
    if factor < 1.0 {
        for (_, _, adapter) in attached(network)? {
            for parameter in [&adapter.a, &adapter.b] {
                let scaled = gradient(gradients, parameter)? * factor;
                gradients.register(parameter.id, scaled);
            }
        }
    }
    Ok(())
}

fn scalar(tensor: Tensor<1>) -> Result<f64> {
    Ok(read(tensor)?.into_iter().map(f64::from).sum())
}

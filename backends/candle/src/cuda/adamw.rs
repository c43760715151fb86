//! AdamW in one launch for each tensor. candle's own takes some fifteen, and an adapter has hundreds of tensors.

use super::launch::{Kernel, Values};
use candle_core::{Result, Tensor, Var};
use evalfw_engine::protocol::TrainingConfig;

/// The running means of a tensor's gradient and of its square.
pub struct Moments {
    first: Tensor,
    second: Tensor,
}

impl Moments {
    pub fn zeros(like: &Tensor) -> Result<Self> {
        Ok(Self { first: like.zeros_like()?, second: like.zeros_like()? })
    }
}

/// Step `step`, counted from 1.
pub fn adamw(var: &Var, moments: &Moments, grad: &Tensor, step: i32, config: &TrainingConfig) -> Result<()> {
    let grad = grad.contiguous()?;
    let (theta, first) = (Values::new(var)?, Values::new(&moments.first)?);
    let (second, grad) = (Values::new(&moments.second)?, Values::new(&grad)?);
    let rate = config.learning_rate / (1.0 - config.beta1.powi(step));
    let second_correction = 1.0 / (1.0 - config.beta2.powi(step));
    let kernel = Kernel::new(theta.device(), "adamw")?;
    // The kernel writes the first three where they are: nobody reads them meanwhile, as the stream keeps the order.
    let launch = kernel.launch().values::<f32>(&theta)?.values::<f32>(&first)?.values::<f32>(&second)?;
    let launch = launch.values::<f32>(&grad)?.count(var.elem_count());
    let launch = launch.float((1.0 - config.learning_rate * config.weight_decay) as f32);
    let launch = launch.float(rate as f32).float(second_correction as f32);
    let launch = launch.float(config.beta1 as f32).float(config.beta2 as f32).float(config.epsilon as f32);
    launch.run_for(var.elem_count())
}

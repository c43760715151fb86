//! AdamW on the factors of an adapter.

use crate::linear::Lora;
use crate::network::Network;
use crate::training::Gradients;
use candle_core::{Result, Var};
use candle_nn::{AdamW, Optimizer as _, ParamsAdamW};
use evalfw_engine::protocol::TrainingConfig;

pub enum Optimizer {
    /// candle's, which is that of PyTorch: decoupled weight decay, bias correction of both moments, epsilon outside
    /// the root.
    Candle(AdamW),
    #[cfg(feature = "cuda")]
    Cuda(cuda::Optimizer),
}

impl Optimizer {
    pub fn new(network: &Network, config: &TrainingConfig) -> Result<Self> {
        #[cfg(feature = "cuda")]
        if network.device.is_cuda() && network.form == crate::ops::Form::Device {
            return Ok(Self::Cuda(cuda::Optimizer::new(network, config)?));
        }
        let params = ParamsAdamW {
            lr: config.learning_rate,
            beta1: config.beta1,
            beta2: config.beta2,
            eps: config.epsilon,
            weight_decay: config.weight_decay,
        };
        Ok(Self::Candle(AdamW::new(vars(network), params)?))
    }

    pub fn step(&mut self, network: &Network, gradients: Gradients) -> Result<()> {
        match self {
            Self::Candle(adamw) => adamw.step(&gradients.into_store(network)?),
            #[cfg(feature = "cuda")]
            Self::Cuda(adamw) => adamw.step(network, gradients),
        }
    }
}

fn vars(network: &Network) -> Vec<Var> {
    let factors = network.projections().filter_map(|projection| projection.lora.as_ref());
    factors.flat_map(|Lora { a, b, .. }| [a.clone(), b.clone()]).collect()
}

#[cfg(feature = "cuda")]
mod cuda {
    use super::vars;
    use crate::cuda::{Moments, adamw};
    use crate::network::Network;
    use crate::training::Gradients;
    use candle_core::{Result, Var, bail};
    use evalfw_engine::protocol::TrainingConfig;

    /// The same with our kernel.
    pub struct Optimizer {
        config: TrainingConfig,
        vars: Vec<(Var, Moments)>,
        step: i32,
    }

    impl Optimizer {
        pub fn new(network: &Network, config: &TrainingConfig) -> Result<Self> {
            let vars = vars(network).into_iter().map(|var| {
                let moments = Moments::zeros(&var)?;
                Ok((var, moments))
            });
            Ok(Self { config: config.clone(), vars: vars.collect::<Result<_>>()?, step: 0 })
        }

        pub fn step(&mut self, network: &Network, gradients: Gradients) -> Result<()> {
            self.step += 1;
            let store = gradients.into_store(network)?;
            for (var, moments) in &self.vars {
                let Some(gradient) = store.get(var) else { bail!("no gradient for a factor of the adapter") };
                adamw(var, moments, gradient, self.step, &self.config)?;
            }
            Ok(())
        }
    }
}

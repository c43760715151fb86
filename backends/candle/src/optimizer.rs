//! AdamW on the factors of an adapter.

use crate::linear::Lora;
use crate::network::Network;
use crate::ops::Form;
use crate::training::Gradients;
use candle_core::backprop::GradStore;
use candle_core::{Result, Tensor, Var, bail};
use candle_nn::{AdamW, Optimizer as _, ParamsAdamW};
use evalfw_engine::protocol::TrainingConfig;

pub enum Optimizer {
    /// candle's, which is that of PyTorch: decoupled weight decay, bias correction of both moments, epsilon outside
    /// the root.
    Candle(AdamW),
    /// The same in one loop for each tensor, on the CPU.
    Host(host::Optimizer),
    #[cfg(feature = "cuda")]
    Cuda(cuda::Optimizer),
}

impl Optimizer {
    pub fn new(network: &Network, config: &TrainingConfig) -> Result<Self> {
        #[cfg(feature = "cuda")]
        if network.device.is_cuda() && network.form == Form::Device {
            return Ok(Self::Cuda(cuda::Optimizer::new(network, config)?));
        }
        if network.form == Form::Host {
            return Ok(Self::Host(host::Optimizer::new(network, config)));
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
        let store = gradients.into_store(network)?;
        match self {
            Self::Candle(adamw) => adamw.step(&store),
            Self::Host(adamw) => adamw.step(&store),
            #[cfg(feature = "cuda")]
            Self::Cuda(adamw) => adamw.step(&store),
        }
    }
}

fn gradient<'a>(store: &'a GradStore, var: &Var) -> Result<&'a Tensor> {
    match store.get(var) {
        Some(gradient) => Ok(gradient),
        None => bail!("no gradient for a factor of the adapter"),
    }
}

fn vars(network: &Network) -> Vec<Var> {
    let factors = network.projections().filter_map(|projection| projection.lora.as_ref());
    factors.flat_map(|Lora { a, b, .. }| [a.clone(), b.clone()]).collect()
}

mod host {
    use super::{gradient, vars};
    use crate::network::Network;
    use crate::values::CpuValues;
    use candle_core::backprop::GradStore;
    use candle_core::{CpuStorage, InplaceOp1, Layout, Result, Var, bail};
    use evalfw_engine::protocol::TrainingConfig;
    use evalfw_kernels::elementwise::{self, AdamW, Moments};
    use evalfw_kernels::filled::PIECE;
    use rayon::prelude::*;
    use std::sync::Mutex;

    pub struct Optimizer {
        config: TrainingConfig,
        vars: Vec<(Var, State)>,
        step: i32,
    }

    /// Of one tensor: the running means of its gradient and of the square.
    struct State(Mutex<(Vec<f32>, Vec<f32>)>);

    /// The update of one tensor where it is.
    struct Update<'a> {
        state: &'a State,
        gradient: &'a [f32],
        step: AdamW,
    }

    impl Optimizer {
        pub fn new(network: &Network, config: &TrainingConfig) -> Self {
            let state = |len| State(Mutex::new((vec![0.0; len], vec![0.0; len])));
            let vars = vars(network).into_iter().map(|var| {
                let len = var.elem_count();
                (var, state(len))
            });
            Self { config: config.clone(), vars: vars.collect(), step: 0 }
        }

        pub fn step(&mut self, store: &GradStore) -> Result<()> {
            self.step += 1;
            let config = &self.config;
            let step = AdamW {
                keep: (1.0 - config.learning_rate * config.weight_decay) as f32,
                rate: (config.learning_rate / (1.0 - config.beta1.powi(self.step))) as f32,
                second_correction: (1.0 / (1.0 - config.beta2.powi(self.step))) as f32,
                beta1: config.beta1 as f32,
                beta2: config.beta2 as f32,
                epsilon: config.epsilon as f32,
            };
            for (var, state) in &self.vars {
                let gradient = gradient(store, var)?.contiguous()?;
                let values = CpuValues::new(&gradient)?;
                var.inplace_op1(&Update { state, gradient: values.slice()?, step })?;
            }
            Ok(())
        }
    }

    impl InplaceOp1 for Update<'_> {
        fn name(&self) -> &'static str {
            "adamw"
        }

        fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
            let (CpuStorage::F32(theta), Some((start, end))) = (storage, layout.contiguous_offsets()) else {
                bail!("a factor of the adapter is not a contiguous f32 tensor")
            };
            let Ok(mut state) = self.state.0.lock() else { bail!("an earlier step failed halfway") };
            let (first, second) = &mut *state;
            let values = theta[start..end].par_chunks_mut(PIECE).zip(self.gradient.par_chunks(PIECE));
            let moments = first.par_chunks_mut(PIECE).zip(second.par_chunks_mut(PIECE));
            values.zip(moments).for_each(|((theta, gradient), (first, second))| {
                elementwise::adamw(theta, Moments { first, second }, gradient, self.step);
            });
            Ok(())
        }
    }
}

#[cfg(feature = "cuda")]
mod cuda {
    use super::{gradient, vars};
    use crate::cuda::{Moments, adamw};
    use crate::network::Network;
    use candle_core::backprop::GradStore;
    use candle_core::{Result, Var};
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

        pub fn step(&mut self, store: &GradStore) -> Result<()> {
            self.step += 1;
            for (var, moments) in &self.vars {
                adamw(var, moments, gradient(store, var)?, self.step, &self.config)?;
            }
            Ok(())
        }
    }
}

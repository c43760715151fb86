//! Qwen2 as a whole: embedding, blocks, final norm. The head is applied by whoever wants logits, as
//! they need not exist for all positions.

use crate::block::{Block, BlockCache};
use crate::kept::Kept;
use crate::linear::Linear;
use crate::matrix::FrozenMatrix;
use crate::ops::{Causal, Form, Graph, RopeTables, Tape, rms_norm};
use candle_core::{Device, Result, Tensor};
use evalfw_engine::config::ModelConfig;
use evalfw_engine::dropout::MaskKey;
use evalfw_engine::lora::Target;
use evalfw_kernels::Products;
use std::sync::Arc;

pub struct Network {
    pub config: ModelConfig,
    pub device: Device,
    pub form: Form,
    pub products: Products,
    /// `[vocab_size, hidden_size]`
    pub embedding: Arc<FrozenMatrix>,
    pub blocks: Vec<Block>,
    /// `[hidden_size]`
    pub final_norm: Tensor,
    /// `[vocab_size, hidden_size]`; the embedding itself where it is tied.
    pub head: Arc<FrozenMatrix>,
}

/// What all blocks share in one forward pass.
pub struct Pass<'a> {
    pub config: &'a ModelConfig,
    pub examples: usize,
    /// Positions of each example, padding included.
    pub slots: usize,
    pub rope: RopeTables,
    pub causal: Causal,
    pub form: Form,
    pub tape: Option<&'a Tape>,
    /// Whether the adapter's factors take part in autograd.
    pub trace: bool,
    /// Whether gradients are wanted in the end, be it after computing a block again.
    pub training: bool,
    pub dropout: Option<Dropout>,
    pub kept: Kept<'a>,
}

/// Which dropout masks a training pass uses.
#[derive(Debug, Clone, Copy)]
pub struct Dropout {
    pub rate: f32,
    pub seed: u64,
    pub step: u64,
    pub micro_batch: usize,
}

impl Dropout {
    pub fn key(&self, layer: usize, target: Target) -> MaskKey {
        MaskKey { seed: self.seed, step: self.step, micro_batch: self.micro_batch, layer, target }
    }
}

impl Pass<'_> {
    /// Rows of the flattened hidden states.
    pub fn rows(&self) -> usize {
        self.examples * self.slots
    }

    pub fn graph(&self) -> Graph<'_> {
        Graph { form: self.form, tape: self.tape }
    }

    /// The same pass with a graph: on the tape, or else candle's own.
    pub fn traced<'t>(&self, tape: Option<&'t Tape>) -> Pass<'t>
    where
        Self: 't,
    {
        Pass { rope: self.rope.clone(), causal: self.causal.clone(), tape, trace: true, ..*self }
    }

    /// The same pass over a block whose results are `kept`.
    pub fn keeping<'k>(&self, kept: Kept<'k>) -> Pass<'k>
    where
        Self: 'k,
    {
        Pass { rope: self.rope.clone(), causal: self.causal.clone(), kept, ..*self }
    }
}

impl Network {
    /// A pass over `examples` sequences whose positions begin at `start`, without graph or dropout.
    pub fn pass(&self, examples: usize, slots: usize, start: usize) -> Result<Pass<'_>> {
        let config = &self.config;
        let (device, form) = (&self.device, self.form);
        let rope = RopeTables::new(config.rope_theta, config.head_dim, start, slots, device)?;
        let causal = Causal::new(form, [examples, config.num_attention_heads], start, slots, device)?;
        let (tape, trace, training, dropout, kept) = (None, false, false, None, Kept::No);
        Ok(Pass { config, examples, slots, rope, causal, form, tape, trace, training, dropout, kept })
    }

    /// The hidden states `[tokens, hidden_size]` after the last block. With `caches`, one for each
    /// block, the tokens continue the cached sequence.
    pub fn forward(
        &self,
        tokens: &[u32],
        pass: &Pass<'_>,
        caches: Option<&mut [BlockCache]>,
    ) -> Result<Tensor> {
        let mut x = self.embedding.rows(tokens)?;
        match caches {
            Some(caches) => {
                for (block, cache) in self.blocks.iter().zip(caches) {
                    x = block.forward(&x, pass, Some(cache))?;
                }
            }
            None => {
                for block in &self.blocks {
                    x = block.forward(&x, pass, None)?;
                }
            }
        }
        Ok(x)
    }

    pub fn norm(&self, x: &Tensor) -> Result<Tensor> {
        rms_norm(self.form.into(), x, &self.final_norm, self.config.rms_norm_eps)
    }

    pub fn projections(&self) -> impl Iterator<Item = &Linear> {
        self.blocks.iter().flat_map(|block| &block.projections)
    }

    pub fn projections_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        self.blocks.iter_mut().flat_map(|block| &mut block.projections)
    }
}

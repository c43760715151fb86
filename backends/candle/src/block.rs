//! One transformer block of Qwen2.

use crate::kept::Part;
use crate::linear::Linear;
use crate::network::Pass;
use crate::ops::{add, attention, rms_norm, rope, swiglu};
use candle_core::{Result, Tensor};
use candle_nn::kv_cache::Cache;
use evalfw_engine::lora::Target;

/// Positions by which a cache grows.
const CACHE_STEP: usize = 256;

pub struct Block {
    /// All seven, in the order of [`Target::ALL`].
    pub projections: Vec<Linear>,
    /// `[hidden_size]`
    pub input_norm: Tensor,
    pub post_attention_norm: Tensor,
}

/// Rotated keys and values of the past positions of one block, `[positions, kv_heads, dim]`.
pub struct BlockCache {
    keys: Cache,
    values: Cache,
}

impl BlockCache {
    pub fn new() -> Self {
        Self { keys: Cache::new(0, CACHE_STEP), values: Cache::new(0, CACHE_STEP) }
    }

    /// Appends the new positions `[1, positions, kv_heads, dim]` and returns all.
    fn append(&mut self, keys: &Tensor, values: &Tensor) -> Result<(Tensor, Tensor)> {
        let append = |cache: &mut Cache, new: &Tensor| {
            let new = new.squeeze(0)?.contiguous()?;
            cache.append(&new)?;
            cache.current_data()?.unwrap_or(new).unsqueeze(0)
        };
        Ok((append(&mut self.keys, keys)?, append(&mut self.values, values)?))
    }
}

impl Block {
    /// `x` and the result are `[examples * slots, hidden_size]`. With a cache there is one example, and
    /// its slots come after the cached ones.
    pub fn forward(&self, x: &Tensor, pass: &Pass<'_>, cache: Option<&mut BlockCache>) -> Result<Tensor> {
        let (config, graph) = (pass.config, pass.graph());
        let normed = rms_norm(graph, x, &self.input_norm, config.rms_norm_eps)?;
        let [q, k, v] = self.project_all([Target::Q, Target::K, Target::V], &normed, pass)?;
        let heads = |x: &Tensor, heads| graph.reshape(x, (pass.examples, pass.slots, heads, config.head_dim));
        let q = rope(graph, &heads(&q, config.num_attention_heads)?, &pass.rope)?;
        let k = rope(graph, &heads(&k, config.num_key_value_heads)?, &pass.rope)?;
        let v = heads(&v, config.num_key_value_heads)?;
        let (k, v) = match cache {
            Some(cache) => cache.append(&k, &v)?,
            None => (k, v),
        };
        let attended = attention(graph, [&q, &k, &v], &pass.causal, pass.kept.known(Part::Attention))?;
        pass.kept.keep(Part::Attention, &attended)?;
        let attended =
            graph.reshape(&attended, (pass.rows(), config.num_attention_heads * config.head_dim))?;
        let x = add(graph, x, &self.project(Target::O, &attended, pass)?)?;

        let normed = rms_norm(graph, &x, &self.post_attention_norm, config.rms_norm_eps)?;
        let [gate, up] = self.project_all([Target::Gate, Target::Up], &normed, pass)?;
        add(graph, &x, &self.project(Target::Down, &swiglu(graph, &gate, &up)?, pass)?)
    }

    fn project_all<const N: usize>(
        &self,
        targets: [Target; N],
        x: &Tensor,
        pass: &Pass<'_>,
    ) -> Result<[Tensor; N]> {
        Linear::forward_all(targets.map(|target| &self.projections[target as usize]), x, pass)
    }

    fn project(&self, target: Target, x: &Tensor, pass: &Pass<'_>) -> Result<Tensor> {
        self.projections[target as usize].forward(x, pass)
    }
}

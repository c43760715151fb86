//! Qwen2 of Burn's own modules. Rotary positions are composed, because Burn's are interleaved; so is the KV cache,
//! because Burn's cannot be filled from outside.

use crate::attention::Heads;
use crate::rope::Rotation;
use burn::module::Module;
use burn::nn::{Embedding, Linear, RmsNorm, SwiGlu};
use burn::tensor::module::attention;
use burn::tensor::ops::AttentionModuleOptions;
use burn::tensor::{Device, Int, Tensor, TensorData};
use evalfw_engine::config::ModelConfig;
use evalfw_engine::lora::Target;

#[derive(Module, Debug)]
pub struct Qwen2 {
    pub embedding: Embedding,
    pub blocks: Vec<Block>,
    pub norm: RmsNorm,
    /// `None` where the embedding is the head.
    pub head: Option<Linear>,
}

#[derive(Module, Debug)]
pub struct Block {
    pub input_norm: RmsNorm,
    pub attention: Attention,
    pub post_attention_norm: RmsNorm,
    /// Inner is the gate, outer the way up.
    pub gate_and_up: SwiGlu,
    pub down: Linear,
}

#[derive(Module, Debug)]
pub struct Attention {
    pub query: Linear,
    pub key: Linear,
    pub value: Linear,
    pub output: Linear,
}

/// What all blocks share in one forward pass.
pub struct Pass {
    heads: Heads,
    rotation: Rotation,
}

impl Pass {
    /// For `positions` from `start` on; `device` is that of the parameters.
    pub fn new(config: &ModelConfig, start: usize, positions: usize, device: &Device) -> Self {
        Self { heads: Heads::new(config), rotation: Rotation::new(config, start, positions, device) }
    }
}

/// Rotated keys and values of one layer so far, `[1, key-value heads, positions, dim]`.
pub type LayerCache = Option<[Tensor<4>; 2]>;

impl Qwen2 {
    /// After the last norm, `[batch, positions, hidden]`. A `cache` has an entry for each layer.
    pub fn hidden(
        &self,
        tokens: Tensor<2, Int>,
        pass: &Pass,
        mut cache: Option<&mut [LayerCache]>,
    ) -> Tensor<3> {
        let mut x = self.embedding.forward(tokens);
        for (layer, block) in self.blocks.iter().enumerate() {
            x = block.forward(x, pass, cache.as_deref_mut().map(|layers| &mut layers[layer]));
        }
        self.norm.forward(x)
    }

    /// `[batch · positions, vocab_size]`
    pub fn logits(&self, hidden: Tensor<3>) -> Tensor<2> {
        let hidden: Tensor<2> = hidden.flatten(0, 1);
        match &self.head {
            Some(head) => head.forward(hidden),
            None => hidden.matmul(self.embedding.weight.val().transpose()),
        }
    }

    /// The adapted projections, by layer, then in the order of [`Target::ALL`].
    pub fn projections(&self) -> impl Iterator<Item = &Linear> {
        self.blocks.iter().flat_map(|block| Target::ALL.map(|target| block.projection(target)))
    }
}

impl Block {
    pub fn projection(&self, target: Target) -> &Linear {
        match target {
            Target::Q => &self.attention.query,
            Target::K => &self.attention.key,
            Target::V => &self.attention.value,
            Target::O => &self.attention.output,
            Target::Gate => &self.gate_and_up.linear_inner,
            Target::Up => &self.gate_and_up.linear_outer,
            Target::Down => &self.down,
        }
    }

    fn forward(&self, x: Tensor<3>, pass: &Pass, cache: Option<&mut LayerCache>) -> Tensor<3> {
        let normed = self.input_norm.forward(x.clone());
        let x = x + self.attention.forward(normed, pass, cache);
        let normed = self.post_attention_norm.forward(x.clone());
        x + self.down.forward(self.gate_and_up.forward(normed))
    }
}

impl Attention {
    fn forward(&self, x: Tensor<3>, pass: &Pass, cache: Option<&mut LayerCache>) -> Tensor<3> {
        let [batch, positions, _] = x.dims();
        let Heads { query: query_heads, key_value: key_value_heads, dim } = pass.heads;
        let split = |x: Tensor<3>, heads| x.reshape([batch, positions, heads, dim]);

        let query = pass.rotation.apply(split(self.query.forward(x.clone()), query_heads)).swap_dims(1, 2);
        let key = pass.rotation.apply(split(self.key.forward(x.clone()), key_value_heads)).swap_dims(1, 2);
        let value = split(self.value.forward(x), key_value_heads).swap_dims(1, 2);
        let [key, value] = match cache {
            Some(cache) => append(cache, [key, value]),
            None => [key, value],
        };

        // Each key-value head serves a group of query heads.
        let group = query_heads / key_value_heads;
        let seen = key.dims()[2];
        let repeat = |x: Tensor<4>| {
            let repeated: Tensor<5> = x.unsqueeze_dim::<5>(2).repeat_dim(2, group);
            repeated.reshape([batch, query_heads, seen, dim])
        };
        // A single position sees everything before it.
        let options = AttentionModuleOptions { is_causal: positions > 1, ..Default::default() };
        let mixed = attention(query, repeat(key), repeat(value), None, None, options);
        self.output.forward(mixed.swap_dims(1, 2).reshape([batch, positions, query_heads * dim]))
    }
}

/// Appends new positions and returns all so far.
fn append(cache: &mut LayerCache, new: [Tensor<4>; 2]) -> [Tensor<4>; 2] {
    let all = match cache.take() {
        Some([keys, values]) => {
            let [key, value] = new;
            [Tensor::cat(vec![keys, key], 2), Tensor::cat(vec![values, value], 2)]
        }
        None => new,
    };
    cache.insert(all).clone()
}

/// Token numbers for [`Qwen2::hidden`].
pub fn tokens(flat: &[u32], batch: usize, device: &Device) -> Tensor<2, Int> {
    let values: Vec<i32> = flat.iter().map(|&token| token as i32).collect();
    let shape = [batch, values.len() / batch];
    Tensor::from_data(TensorData::new(values, shape), device)
}

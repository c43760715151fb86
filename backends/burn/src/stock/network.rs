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
    pub fn projections(&self) -> impl Iterator<Item = ((usize, Target), &Linear)> {
        self.blocks
            .iter()
            .enumerate()
            .flat_map(|(layer, block)| Target::ALL.map(|target| ((layer, target), block.projection(target))))
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

        // A single position sees everything before it.
        let options = AttentionModuleOptions { is_causal: positions > 1, ..Default::default() };
        let [key, value] = [key, value].map(|x| for_each_query_head(x, query_heads));
        let mixed = attention(query, key, value, None, None, options);
        self.output.forward(mixed.swap_dims(1, 2).reshape([batch, positions, query_heads * dim]))
    }
}

/// Repeats each key-value head, `[batch, key-value heads, positions, dim]`, for its group of query heads.
///
/// Groups of one are left alone, and not only because it is quicker: their gradient would be a sum over a dimension of
/// length 1 before two that are swapped in memory, and cubek-reduce 0.3.1, which Burn 0.22 sums with on a GPU, gives it
/// wrongly. For the width of its vectors it counts the dimensions that input and output have in the same order in
/// memory, and goes on counting after the first that they have not: `[3, 2, 2, 3]` with the last two swapped is
/// summed wrongly over the first.
fn for_each_query_head(x: Tensor<4>, query_heads: usize) -> Tensor<4> {
    let [batch, heads, positions, dim] = x.dims();
    if heads == query_heads {
        return x;
    }
    let repeated: Tensor<5> = x.unsqueeze_dim::<5>(2).repeat_dim(2, query_heads / heads);
    repeated.reshape([batch, query_heads, positions, dim])
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::all_for_tests;
    use crate::guard::read;

    fn values<const D: usize>(shape: [usize; D], place: usize, device: &Device) -> Tensor<D> {
        let values =
            (0..shape.iter().product::<usize>()).map(|i| ((i * place) as f32 * 0.7311).sin()).collect();
        Tensor::from_data(TensorData::new::<f32, _>(values, shape), device)
    }

    /// The gradient of the keys, of the sum of the scores times random values.
    fn gradient(heads: usize, query_heads: usize, device: &Device) -> Vec<f32> {
        let (positions, dim) = (5, 4);
        let device = &device.clone().autodiff();
        let key = values([2, heads, positions, dim], 1, device).require_grad();
        let query = values([2, query_heads, positions, dim], 2, device);
        let scores = query.matmul(for_each_query_head(key.clone(), query_heads).transpose());
        let gradients = (scores * values([2, query_heads, positions, positions], 3, device)).sum().backward();
        read(key.grad(&gradients).unwrap()).unwrap()
    }

    #[test]
    fn the_gradient_of_the_keys_is_the_same_on_all_devices_whatever_the_groups() {
        for (heads, query_heads) in [(2, 2), (1, 1), (1, 2), (2, 6)] {
            let expected = gradient(heads, query_heads, &Device::flex());
            for device in all_for_tests() {
                let found = gradient(heads, query_heads, &device.device);
                let alike = found.iter().zip(&expected).all(|(f, e)| (f - e).abs() < 1e-4);
                assert!(alike, "{heads} for {query_heads} on {}: {found:?}, {expected:?}", device.info.name);
            }
        }
    }
}

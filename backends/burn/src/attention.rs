//! Grouped-query attention and its KV cache.

use crate::BurnDevice;
use crate::device::OpenDevice;
use crate::fused::{self, KeyValueCache, RowOp};
use crate::product::product;
use crate::rope::{Rotation, fused_rotation};
use burn::tensor::activation;
use burn::tensor::{Bool, Tensor};
use evalfw_engine::config::ModelConfig;
use evalfw_kernels::attention::Shape;

/// The heads of the model.
#[derive(Debug, Clone, Copy)]
pub struct Heads {
    pub query: usize,
    pub key_value: usize,
    pub dim: usize,
}

impl Heads {
    pub fn new(config: &ModelConfig) -> Self {
        Self {
            query: config.num_attention_heads,
            key_value: config.num_key_value_heads,
            dim: config.head_dim,
        }
    }

    /// Query heads that share a key and a value.
    fn group(&self) -> usize {
        self.query / self.key_value
    }
}

/// What all blocks share in one forward pass.
pub struct Pass {
    pub batch: usize,
    /// Positions of each sequence in this pass.
    pub positions: usize,
    form: Form,
}

/// What computes it.
#[allow(clippy::large_enum_variant, reason = "one of them exists at a time")]
enum Form {
    /// The operations of [`fused`].
    Fused { rotation: RowOp },
    /// Those of burn.
    Composed {
        rotation: Rotation,
        /// `[1, 1, positions, positions]`, true where attention may not look. There is none for a single
        /// position, which sees everything before it.
        mask: Option<Tensor<4, Bool>>,
    },
}

impl Pass {
    /// `start` is the position of the first token: not 0 when a KV cache holds what came before.
    pub fn new(
        config: &ModelConfig,
        batch: usize,
        start: usize,
        positions: usize,
        device: &OpenDevice,
    ) -> Self {
        let form = match device.kind {
            BurnDevice::Flex => Form::Fused { rotation: fused_rotation(config, start, positions) },
            BurnDevice::Wgpu => {
                let device = &device.device;
                let causal =
                    || Tensor::<2, Bool>::tril_mask([positions, positions], 0, device).unsqueeze::<4>();
                Form::Composed {
                    rotation: Rotation::new(config, start, positions, device),
                    mask: (positions > 1).then(causal),
                }
            }
        };
        Self { batch, positions, form }
    }

    pub fn is_fused(&self) -> bool {
        matches!(self.form, Form::Fused { .. })
    }
}

/// Attends from `query` `[n, query heads * dim]` to `key` and `value` `[n, key-value heads * dim]`, where
/// n is batch · positions, and gives `[n, query heads * dim]`.
pub fn attend(
    heads: &Heads,
    pass: &Pass,
    [query, key, value]: [Tensor<2>; 3],
    cache: Option<&mut LayerCache>,
) -> Tensor<2> {
    let Heads { query: query_heads, key_value: key_value_heads, dim } = *heads;
    let (batch, positions) = (pass.batch, pass.positions);
    let (rotation, mask) = match &pass.form {
        Form::Fused { rotation } => {
            let args = [rotation.clone().apply(query), rotation.clone().apply(key), value];
            let (queries, keys) = (positions, positions);
            let shape =
                Shape { examples: batch, queries, keys, heads: query_heads, kv_heads: key_value_heads, dim };
            return match cache {
                Some(cache) => fused::attend_to_cache(args, &cache.fused, shape),
                None => fused::attend(args, shape),
            };
        }
        Form::Composed { rotation, mask } => (rotation, mask),
    };
    let split = |x: Tensor<2>, heads: usize| x.reshape([batch, positions, heads, dim]);
    // One product for each key-value head: the queries of its group stand below each other.
    let by_head =
        |x: Tensor<4>| x.swap_dims(1, 2).reshape([(batch * key_value_heads) as i32, -1, dim as i32]);

    let query = rotation.apply(split(query, query_heads)) * (dim as f64).powf(-0.5);
    let query = by_head(query);
    let key = by_head(rotation.apply(split(key, key_value_heads)));
    let value = by_head(split(value, key_value_heads));
    let (key, value, softmax): (_, _, fn(Tensor<4>) -> Tensor<4>) = match cache {
        Some(cache) => {
            let (key, value) = cache.append(key, value);
            (key, value, |scores| activation::softmax(scores, 3))
        }
        None => (key, value, repeatable_softmax),
    };

    let scores: Tensor<3> = product(query, key.swap_dims(1, 2));
    let [products, rows, seen] = scores.dims();
    let scores = scores.reshape([products, heads.group(), positions, seen]);
    let scores = match mask {
        Some(mask) => {
            scores.mask_fill(mask.clone().expand([products, heads.group(), positions, seen]), f32::MIN)
        }
        None => scores,
    };
    let weights = softmax(scores).reshape([products, rows, seen]);
    let mixed = product(weights, value).reshape([batch, query_heads, positions, dim]);
    mixed.swap_dims(1, 2).reshape([batch * positions, query_heads * dim])
}

/// Softmax over the last dimension by the same operations with and without autodiff: flex's own is a
/// fused kernel outside of it, and a block that is computed again in the backward pass would differ from
/// its first pass in the last bits.
fn repeatable_softmax(scores: Tensor<4>) -> Tensor<4> {
    let largest = scores.clone().detach().max_dim(3);
    let exponentials = (scores - largest).exp();
    exponentials.clone() / exponentials.sum_dim(3)
}

/// Keys and values of one layer for one sequence, of the form that the passes have.
#[derive(Default)]
pub struct LayerCache {
    fused: KeyValueCache,
    stored: Option<Stored>,
}

/// Each `[key-value heads, capacity, dim]`. Grows in steps, so that most tokens write into memory that is already there.
struct Stored {
    key: Tensor<3>,
    value: Tensor<3>,
    length: usize,
}

const GROWTH: usize = 256;

impl LayerCache {
    /// Appends new positions and returns all so far.
    fn append(&mut self, key: Tensor<3>, value: Tensor<3>) -> (Tensor<3>, Tensor<3>) {
        let [heads, new, dim] = key.dims();
        let device = key.device();
        let Stored { key: keys, value: values, length } = self.stored.take().unwrap_or_else(|| {
            let empty = || Tensor::zeros([heads, 0, dim], &device);
            Stored { key: empty(), value: empty(), length: 0 }
        });
        let end = length + new;
        let write = |stored: Tensor<3>, new: Tensor<3>| {
            reserve(stored, length, end).slice_assign([0..heads, length..end, 0..dim], new)
        };
        let stored = Stored { key: write(keys, key), value: write(values, value), length: end };
        let seen = |stored: &Tensor<3>| stored.clone().narrow(1, 0, end);
        let all = (seen(&stored.key), seen(&stored.value));
        self.stored = Some(stored);
        all
    }
}

/// Makes room for `wanted` positions behind the `length` that count.
fn reserve(stored: Tensor<3>, length: usize, wanted: usize) -> Tensor<3> {
    let [heads, capacity, dim] = stored.dims();
    if wanted <= capacity {
        return stored;
    }
    let grown = Tensor::zeros([heads, wanted.next_multiple_of(GROWTH), dim], &stored.device());
    match length {
        0 => grown,
        _ => grown.slice_assign([0..heads, 0..length, 0..dim], stored.narrow(1, 0, length)),
    }
}

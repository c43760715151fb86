//! What is only computed without gradients: frozen layers, and attention with a cache.

use super::{HostLayer, like};
use crate::packed::values;
use burn::backend::flex::FlexTensor;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, Dispatch, Flex, backend_extension};
use burn::tensor::{Tensor, TensorData};
use evalfw_kernels::attention::{self, Shape};
use std::sync::{Arc, Mutex, PoisonError};

/// `x Wᵀ + bias` of several layers for one row, one after the other in the row of the result: in one loop over all their
/// outputs, as the threads would otherwise wait for each other after each layer. Of one layer also for more rows.
pub fn layers(x: Tensor<2>, layers: Vec<HostLayer>) -> Tensor<2> {
    Tensor::from_dispatch(Dispatch::fused_layers(x.into_dispatch(), layers))
}

/// Appends keys and values of new positions to the cache, and attends to all in it: from `[queries, heads · dim]` and
/// `[queries, kv_heads · dim]`. The shape is that of the new positions.
pub fn attend_to_cache(
    [query, key, value]: [Tensor<2>; 3],
    cache: &KeyValueCache,
    shape: Shape,
) -> Tensor<2> {
    let (query, key, value) = (query.into_dispatch(), key.into_dispatch(), value.into_dispatch());
    Tensor::from_dispatch(Dispatch::attention_to_cache(query, key, value, cache.clone(), shape))
}

/// Keys and values of one layer for one sequence, each `[positions, kv_heads · dim]`. Cloning copies a reference.
#[derive(Debug, Clone, Default)]
pub struct KeyValueCache(Arc<Mutex<[Vec<f32>; 2]>>);

#[backend_extension(Flex)]
trait InferenceOps: Backend {
    fn fused_layers(x: FloatTensor<Self>, layers: Vec<HostLayer>) -> FloatTensor<Self>;

    fn attention_to_cache(
        query: FloatTensor<Self>,
        key: FloatTensor<Self>,
        value: FloatTensor<Self>,
        cache: KeyValueCache,
        shape: Shape,
    ) -> FloatTensor<Self>;
}

impl InferenceOps for Flex {
    fn fused_layers(x: FlexTensor, layers: Vec<HostLayer>) -> FlexTensor {
        let x = x.to_contiguous();
        let rows = x.layout().shape()[0];
        let out = match &layers[..] {
            [HostLayer { matrix, bias }] => matrix.product(values(&x), bias.as_deref()),
            several => {
                let several: Vec<_> =
                    several.iter().map(|layer| (&*layer.matrix, layer.bias.as_deref())).collect();
                evalfw_kernels::HostMatrix::products_of_row(&several, values(&x))
            }
        };
        let width = out.len() / rows;
        FlexTensor::from_data(TensorData::new(out, [rows, width]))
    }

    fn attention_to_cache(
        query: FlexTensor,
        key: FlexTensor,
        value: FlexTensor,
        KeyValueCache(cache): KeyValueCache,
        shape: Shape,
    ) -> FlexTensor {
        let query = query.to_contiguous();
        let mut cache = cache.lock().unwrap_or_else(PoisonError::into_inner);
        for (seen, new) in cache.iter_mut().zip([key, value]) {
            seen.extend_from_slice(values(&new.to_contiguous()));
        }
        let [keys, values_seen] = &*cache;
        let shape = Shape { keys: keys.len() / (shape.kv_heads * shape.dim), ..shape };
        like(&query, attention::forward(shape, values(&query), keys, values_seen))
    }
}

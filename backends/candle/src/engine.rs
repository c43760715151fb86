//! The engine: a device, and how a checkpoint gets onto it.

use crate::block::Block;
use crate::linear::Linear;
use crate::matrix::{FrozenMatrix, Nf4Tables};
use crate::model::CandleModel;
use crate::network::Network;
use crate::{CandleDevice, device};
use candle_core::{Device, Tensor};
use evalfw_engine::lora::Target;
use evalfw_engine::protocol::{EngineInfo, VERSION};
use evalfw_engine::weights::{DenseTensor, Weight, WeightLoader};
use evalfw_engine::{Engine, Error, LoadedModel, Result};
use evalfw_kernels::Products;
use std::sync::Arc;

pub struct CandleEngine {
    kind: CandleDevice,
    device: Device,
    /// On the CPU.
    products: Products,
}

impl CandleEngine {
    pub fn open(kind: CandleDevice, products: Products) -> Result<Self> {
        Ok(Self { kind, device: device::open(kind)?, products })
    }

    fn is_bf16(&self) -> bool {
        self.products == Products::Bf16
    }
}

impl Engine for CandleEngine {
    fn info(&self) -> EngineInfo {
        EngineInfo {
            protocol: VERSION,
            engine: format!("candle-{}{}", self.kind.name(), if self.is_bf16() { "-bf16" } else { "" }),
            engine_version: env!("CARGO_PKG_VERSION").to_owned(),
            framework: "candle".to_owned(),
            framework_version: env!("CANDLE_VERSION").to_owned(),
            device: device::info(&self.device),
            compute_dtype: if self.is_bf16() { "bf16 products" } else { "f32" }.to_owned(),
            features: device::features(self.kind),
            threads: rayon::current_num_threads(),
        }
    }

    fn load(&mut self, loader: WeightLoader<'_>) -> Result<LoadedModel> {
        let tables = Nf4Tables::new(&self.device).map_err(Error::framework)?;
        let network = Loading { loader, device: &self.device, products: self.products, tables }.network()?;
        Ok(Box::new(CandleModel::new(network)))
    }
}

/// Moves one weight after the other to the device.
struct Loading<'a> {
    loader: WeightLoader<'a>,
    device: &'a Device,
    products: Products,
    tables: Nf4Tables,
}

impl Loading<'_> {
    fn network(mut self) -> Result<Network> {
        let config = self.loader.config().clone();
        let embedding = self.loader.embedding()?;
        let embedding = Arc::new(self.dense(embedding)?);
        let blocks = (0..config.num_hidden_layers).map(|layer| self.block(layer)).collect::<Result<_>>()?;
        let final_norm = self.loader.final_norm()?;
        let final_norm = self.vector(final_norm)?;
        let head = match self.loader.head()? {
            Some(head) => Arc::new(self.dense(head)?),
            None => embedding.clone(),
        };
        Ok(Network { config, device: self.device.clone(), embedding, blocks, final_norm, head })
    }

    fn block(&mut self, layer: usize) -> Result<Block> {
        let input_norm = self.loader.input_norm(layer)?;
        let post_attention_norm = self.loader.post_attention_norm(layer)?;
        Ok(Block {
            projections: Target::ALL
                .iter()
                .map(|&target| self.linear(layer, target))
                .collect::<Result<_>>()?,
            input_norm: self.vector(input_norm)?,
            post_attention_norm: self.vector(post_attention_norm)?,
        })
    }

    fn linear(&mut self, layer: usize, target: Target) -> Result<Linear> {
        let projection = self.loader.projection(layer, target)?;
        let bias = projection.bias.map(|bias| self.vector(bias)).transpose()?;
        Ok(Linear::new(layer, target, self.matrix(projection.weight)?, bias))
    }

    fn dense(&self, tensor: DenseTensor) -> Result<FrozenMatrix> {
        self.matrix(Weight::Dense(tensor))
    }

    fn matrix(&self, weight: Weight) -> Result<FrozenMatrix> {
        FrozenMatrix::new(weight, self.device, self.products, &self.tables).map_err(Error::framework)
    }

    fn vector(&self, values: Vec<f32>) -> Result<Tensor> {
        let len = values.len();
        Tensor::from_vec(values, len, self.device).map_err(Error::framework)
    }
}

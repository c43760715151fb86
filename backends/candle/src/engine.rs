//! The engine: a device, and how a checkpoint gets onto it.

use crate::block::Block;
use crate::linear::Linear;
use crate::matrix::{FrozenMatrix, NativeMatrix, Nf4Tables};
use crate::model::CandleModel;
use crate::network::Network;
use crate::ops::Form;
use crate::{CandleDevice, Variant, device, limits, self_check};
use candle_core::{Device, Tensor};
use evalfw_engine::lora::Target;
use evalfw_engine::protocol::{DeviceLimits, EngineInfo, Quantization, VERSION};
use evalfw_engine::weights::{DenseTensor, Weight, WeightLoader};
use evalfw_engine::{Engine, Error, LoadedModel, Result};
use evalfw_kernels::Products;
use evalfw_kernels::level::Factors;
use evalfw_kernels::memory::keep_freed_memory;
use std::sync::Arc;
use std::time::Instant;

pub struct CandleEngine {
    kind: CandleDevice,
    variant: Variant,
    device: Device,
    form: Form,
    products: Products,
    /// What the record should say of this device beside the build's features.
    notes: Vec<String>,
}

impl CandleEngine {
    pub fn open(kind: CandleDevice, variant: Variant) -> Result<Self> {
        let device = device::open(kind)?;
        let (form, notes) = match variant {
            Variant::Stock => (Form::Stock, Vec::new()),
            Variant::Tuned | Variant::TunedBf16 => form_that_works(&device).map_err(Error::framework)?,
        };
        // Stock kernels are in f32 whatever was asked for.
        let products = if form == Form::Stock { Products::F32 } else { variant.products() };
        Ok(Self { kind, variant, device, form, products, notes })
    }
}

/// The tuned form, or the stock one where the tuned one is wrong on this device, and a note of that.
fn form_that_works(device: &Device) -> candle_core::Result<(Form, Vec<String>)> {
    let form = Form::tuned(device);
    if form != Form::Device {
        // The loops on the CPU are held against candle by tests.
        keep_freed_memory();
        return Ok((form, Vec::new()));
    }
    match self_check::problem(device)? {
        None => Ok((form, Vec::new())),
        Some(problem) => Ok((Form::Stock, vec![format!("stock kernels: {problem}")])),
    }
}

impl Engine for CandleEngine {
    fn info(&self) -> EngineInfo {
        EngineInfo {
            protocol: VERSION,
            engine: format!("candle-{}{}", self.kind.name(), self.variant.suffix()),
            engine_version: env!("CARGO_PKG_VERSION").to_owned(),
            framework: "candle".to_owned(),
            framework_version: env!("CANDLE_VERSION").to_owned(),
            device: device::info(&self.device),
            adapters: None,
            compute_dtype: compute_dtype(self.kind, self.products).to_owned(),
            features: device::features(self.kind, self.products)
                .into_iter()
                .chain(self.notes.clone())
                .collect(),
            quantizations: vec![Quantization::None, Quantization::Nf4, Quantization::Native],
            threads: rayon::current_num_threads(),
            tunes: false,
            own_dropout: false,
        }
    }

    fn limits(&mut self) -> Result<DeviceLimits> {
        limits::measure(&self.device)
    }

    fn load(&mut self, loader: WeightLoader<'_>) -> Result<LoadedModel> {
        let tables = Nf4Tables::new(&self.device).map_err(Error::framework)?;
        let arithmetic = (self.form, self.products);
        let network = Loading { loader, device: &self.device, arithmetic, tables }.network()?;
        Ok(Box::new(CandleModel::new(network)))
    }
}

fn compute_dtype(kind: CandleDevice, products: Products) -> &'static str {
    match (products, kind) {
        (products, CandleDevice::Cpu) => Factors::compute_dtype(products),
        (Products::F32, _) => "f32",
        (Products::Bf16, _) => "bf16 products",
    }
}

/// Moves one weight after the other to the device.
struct Loading<'a> {
    loader: WeightLoader<'a>,
    device: &'a Device,
    arithmetic: (Form, Products),
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
        let (device, (form, products)) = (self.device.clone(), self.arithmetic);
        Ok(Network { config, device, form, products, embedding, blocks, final_norm, head })
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
        let matrix = match (self.loader.quantization(), projection.weight) {
            (Quantization::Native, Weight::Dense(tensor)) => {
                let start = Instant::now();
                let native = NativeMatrix::new(tensor, self.device).map_err(Error::framework)?;
                self.loader.quantized_in(start.elapsed());
                FrozenMatrix::Native(native)
            }
            (_, weight) => self.matrix(weight)?,
        };
        Ok(Linear::new(layer, target, matrix, bias))
    }

    fn dense(&self, tensor: DenseTensor) -> Result<FrozenMatrix> {
        self.matrix(Weight::Dense(tensor))
    }

    fn matrix(&self, weight: Weight) -> Result<FrozenMatrix> {
        FrozenMatrix::new(weight, self.device, &self.tables, self.arithmetic).map_err(Error::framework)
    }

    fn vector(&self, values: Vec<f32>) -> Result<Tensor> {
        let len = values.len();
        Tensor::from_vec(values, len, self.device).map_err(Error::framework)
    }
}

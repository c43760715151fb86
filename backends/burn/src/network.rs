//! Qwen2 without its adapter.

use crate::BurnDevice;
use crate::attention::{LayerCache, Pass};
use crate::block::Block;
use crate::device::OpenDevice;
use crate::embedding::Embedding;
use crate::head::Head;
use crate::lora::Lora;
use crate::norm::RmsNorm;
use crate::packed::HostMatrix;
use burn::tensor::{Device, Tensor};
use evalfw_engine::Result;
use evalfw_engine::config::ModelConfig;
use evalfw_engine::weights::{DenseTensor, Weight, WeightLoader};
use evalfw_kernels::Products;

pub struct Network {
    pub config: ModelConfig,
    pub device: Device,
    opened: OpenDevice,
    pub embedding: Embedding,
    pub blocks: Vec<Block>,
    pub norm: RmsNorm,
    pub head: Head,
}

impl Network {
    pub fn load(mut loader: WeightLoader<'_>, device: &OpenDevice) -> Result<Self> {
        let config = loader.config().clone();
        let table = loader.embedding()?;
        let blocks = (0..config.num_hidden_layers)
            .map(|layer| Block::load(&mut loader, layer, device))
            .collect::<Result<_>>()?;
        let norm = RmsNorm::new(loader.final_norm()?, config.rms_norm_eps, device);
        let (embedding, head) = ends(table, loader.head()?, device);
        Ok(Self {
            config,
            device: device.device.clone(),
            opened: device.clone(),
            embedding,
            blocks,
            norm,
            head,
        })
    }

    /// The type of the factors of products on the CPU.
    pub fn products(&self) -> Products {
        self.opened.products
    }

    pub fn on_host(&self) -> bool {
        self.opened.kind == BurnDevice::Flex
    }

    /// What the blocks share for `batch` sequences whose next `positions` begin at `start`.
    pub fn pass(&self, batch: usize, start: usize, positions: usize) -> Pass {
        Pass::new(&self.config, batch, start, positions, &self.opened)
    }

    /// From the embedding to the last block, `[n, hidden]`, without gradients.
    pub fn forward(
        &self,
        tokens: &[u32],
        pass: &Pass,
        lora: Option<&Lora>,
        mut cache: Option<&mut [LayerCache]>,
    ) -> Tensor<2> {
        let mut x = self.embedding.look_up(tokens, &self.device);
        for (layer, block) in self.blocks.iter().enumerate() {
            let cache = cache.as_deref_mut().map(|layers| &mut layers[layer]);
            x = block.forward(x, pass, lora.map(|lora| lora.layer(layer, None)), cache);
        }
        x
    }
}

/// Both ends of the model, which have one table where there is no head.
fn ends(table: DenseTensor, head: Option<DenseTensor>, device: &OpenDevice) -> (Embedding, Head) {
    let on_host = |table| HostMatrix::new(Weight::Dense(table), device.products);
    match device.kind {
        BurnDevice::Flex => {
            let table = on_host(table);
            let head = Head::on_host(head.map_or_else(|| table.clone(), on_host), device);
            (Embedding { table }, head)
        }
        BurnDevice::Wgpu => {
            let head = Head::in_shards(head.as_ref().unwrap_or(&table), device);
            (Embedding { table: on_host(table) }, head)
        }
    }
}

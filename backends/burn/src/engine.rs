//! The engine: an open device that loads models.

use crate::BurnDevice;
use crate::device::OpenDevice;
use crate::guard::guard;
use crate::model::BurnModel;
use crate::network::Network;
use evalfw_engine::protocol::{EngineInfo, Quantization, VERSION};
use evalfw_engine::weights::WeightLoader;
use evalfw_engine::{Engine, Error, LoadedModel, Result};
use evalfw_kernels::Products;
use evalfw_kernels::level::level;

pub struct BurnEngine {
    device: OpenDevice,
}

impl BurnEngine {
    pub fn open(device: BurnDevice, products: Products) -> Result<Self> {
        Ok(Self { device: OpenDevice::open(device, products)? })
    }
}

impl Engine for BurnEngine {
    fn info(&self) -> EngineInfo {
        let engine = match (self.device.kind, self.device.products) {
            (BurnDevice::Wgpu, _) => "burn-wgpu",
            (BurnDevice::Flex, Products::F32) => "burn-flex",
            (BurnDevice::Flex, Products::Bf16) => "burn-flex-bf16",
        };
        EngineInfo {
            protocol: VERSION,
            engine: engine.into(),
            engine_version: env!("CARGO_PKG_VERSION").into(),
            framework: "burn".into(),
            framework_version: env!("BURN_VERSION").into(),
            device: self.device.info.clone(),
            compute_dtype: match self.device.products {
                Products::F32 => "f32",
                Products::Bf16 => "bf16 products",
            }
            .into(),
            features: features(self.device.kind),
            quantizations: Quantization::usual(),
            native_4_bits_throughout: false,
            threads: rayon::current_num_threads(),
        }
    }

    fn load(&mut self, loader: WeightLoader<'_>) -> Result<LoadedModel> {
        if loader.quantization() == Quantization::Native {
            let message = "Burn with the quantization `native`; it has `nf4` and `none`".to_owned();
            return Err(Error::Unsupported { message });
        }
        guard(|| {
            let network = Network::load(loader, &self.device)?;
            Ok(Box::new(BurnModel::new(network)) as LoadedModel)
        })
    }
}

/// The features that matter on the device and are compiled in.
fn features(device: BurnDevice) -> Vec<String> {
    let known = match device {
        BurnDevice::Wgpu => vec![("autotune", cfg!(feature = "autotune"))],
        BurnDevice::Flex => vec![(level().name(), true), ("x86-v4", cfg!(feature = "x86-v4"))],
    };
    known.into_iter().filter(|(_, on)| *on).map(|(name, _)| name.to_owned()).collect()
}

//! The engine: an open device that loads models.

use crate::device::OpenDevice;
use crate::guard::guard;
use crate::limits;
use crate::model::BurnModel;
use crate::network::Network;
use crate::pool::PoolWatch;
use crate::self_check;
use crate::stock::{self, StockModel};
use crate::tune::Tuner;
use crate::{BurnDevice, Preparation, Variant};
use evalfw_engine::protocol::{DeviceLimits, EngineInfo, Quantization, VERSION};
use evalfw_engine::weights::WeightLoader;
use evalfw_engine::{Engine, Error, LoadedModel, Result};
use evalfw_kernels::Products;
use evalfw_kernels::level::{Factors, instructions};
use evalfw_kernels::memory::keep_freed_memory;

pub struct BurnEngine {
    device: OpenDevice,
    variant: Variant,
    /// What the self-check of the tuned form said. It runs before any clock does; a device that failed still has a name.
    checked: Result<()>,
    tuner: Option<&'static Tuner>,
}

impl BurnEngine {
    pub fn open(
        device: BurnDevice,
        variant: Variant,
        products: Products,
        preparation: &Preparation,
    ) -> Result<Self> {
        if device == BurnDevice::Flex && variant != Variant::Stock {
            keep_freed_memory();
        }
        let device = OpenDevice::open(device, products)?;
        let tuner = match (device.kind, variant) {
            (BurnDevice::Flex, _) | (_, Variant::Stock) => None,
            (BurnDevice::Wgpu, _) => Tuner::install(&preparation.autotune, &device.info),
        };
        let checked = match variant {
            Variant::Stock => Ok(()),
            Variant::Tuned | Variant::TunedBf16 => {
                self_check::once(&device, preparation.self_checks.as_deref())
            }
        };
        Ok(Self { device, variant, checked, tuner })
    }

    /// Loads with nothing but what Burn ships.
    fn load_stock(&self, loader: WeightLoader<'_>) -> Result<LoadedModel> {
        guard(|| Ok(Box::new(StockModel::load(loader, &self.device.device)?) as LoadedModel))
    }
}

impl Engine for BurnEngine {
    fn info(&self) -> EngineInfo {
        let engine = match (self.device.kind, self.variant) {
            (BurnDevice::Wgpu, Variant::Stock) => "burn-wgpu-stock",
            (BurnDevice::Wgpu, _) => "burn-wgpu",
            (BurnDevice::Flex, Variant::Tuned) => "burn-flex",
            (BurnDevice::Flex, Variant::TunedBf16) => "burn-flex-bf16",
            (BurnDevice::Flex, Variant::Stock) => "burn-flex-stock",
        };
        EngineInfo {
            protocol: VERSION,
            engine: engine.into(),
            engine_version: env!("CARGO_PKG_VERSION").into(),
            framework: "burn".into(),
            framework_version: env!("BURN_VERSION").into(),
            device: self.device.info.clone(),
            adapters: self.device.adapters.clone(),
            compute_dtype: Factors::compute_dtype(self.device.products).into(),
            features: self.features(),
            quantizations: match self.variant {
                Variant::Stock => stock::quantizations(),
                Variant::Tuned | Variant::TunedBf16 => Quantization::usual(),
            },
            threads: rayon::current_num_threads(),
            tunes: self.tuner.is_some(),
            own_dropout: false,
        }
    }

    fn limits(&mut self) -> Result<DeviceLimits> {
        limits::measure(&self.device)
    }

    fn load(&mut self, loader: WeightLoader<'_>) -> Result<LoadedModel> {
        if self.variant == Variant::Stock {
            return self.load_stock(loader);
        }
        if loader.quantization() == Quantization::Native {
            let message = "Burn with the quantization `native`; it has `nf4` and `none`".to_owned();
            return Err(Error::Unsupported { message });
        }
        self.checked.clone()?;
        guard(|| {
            let pool = PoolWatch::start(&self.device.device);
            let network = Network::load(loader, &self.device)?;
            Ok(Box::new(BurnModel::new(network, pool, self.tuner)) as LoadedModel)
        })
    }
}

impl BurnEngine {
    /// The switches that matter on the device and are on.
    fn features(&self) -> Vec<String> {
        let known: Vec<_> = match self.device.kind {
            BurnDevice::Wgpu => vec![("autotune", self.tuner.is_some())],
            BurnDevice::Flex => {
                let ours = self.variant != Variant::Stock;
                let instructions = instructions(self.device.products).map(|name| (name, ours));
                instructions.chain([("x86-v4", cfg!(feature = "x86-v4"))]).collect()
            }
        };
        known.into_iter().filter(|(_, on)| *on).map(|(name, _)| name.to_owned()).collect()
    }
}

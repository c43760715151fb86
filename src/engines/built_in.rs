//! The engines that are built in: a line each.

use crate::folders::cache_dir;
use anyhow::{Context, Result};
use evalfw_engine::{Engine, Error};
use std::path::PathBuf;

/// An engine on a device, as named on the command line.
pub struct EngineSpec {
    pub name: &'static str,
    pub summary: &'static str,
    pub kernels: Kernels,
    /// Opens the device. Called in the worker process only.
    pub open: fn() -> evalfw_engine::Result<Box<dyn Engine>>,
}

/// Whose kernels an engine runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kernels {
    /// Ours beside the framework's; `stock` names the engine that has the framework's alone.
    Tuned { stock: Option<&'static str> },
    /// Nothing but what the framework ships.
    Stock,
}

pub const ENGINES: &[EngineSpec] = &[
    EngineSpec {
        name: "candle-cpu",
        summary: "candle on the CPU",
        kernels: Kernels::Tuned { stock: Some("candle-cpu-stock") },
        open: candle::cpu,
    },
    EngineSpec {
        name: "candle-cpu-bf16",
        summary: "candle on the CPU, with bf16 where that is faster",
        kernels: Kernels::Tuned { stock: Some("candle-cpu-stock") },
        open: candle::cpu_bf16,
    },
    EngineSpec {
        name: "candle-cpu-stock",
        summary: "candle on the CPU, with nothing but its own operations",
        kernels: Kernels::Stock,
        open: candle::cpu_stock,
    },
    EngineSpec {
        name: "candle-cuda",
        summary: "candle on an NVIDIA GPU",
        kernels: Kernels::Tuned { stock: Some("candle-cuda-stock") },
        open: candle::cuda,
    },
    EngineSpec {
        name: "candle-cuda-bf16",
        summary: "candle on an NVIDIA GPU, with products of bf16",
        kernels: Kernels::Tuned { stock: Some("candle-cuda-stock") },
        open: candle::cuda_bf16,
    },
    EngineSpec {
        name: "candle-cuda-stock",
        summary: "candle on an NVIDIA GPU, with nothing but its own operations",
        kernels: Kernels::Stock,
        open: candle::cuda_stock,
    },
    EngineSpec {
        name: "candle-metal",
        summary: "candle on an Apple GPU",
        kernels: Kernels::Tuned { stock: Some("candle-metal-stock") },
        open: candle::metal,
    },
    EngineSpec {
        name: "candle-metal-stock",
        summary: "candle on an Apple GPU, with nothing but its own operations",
        kernels: Kernels::Stock,
        open: candle::metal_stock,
    },
    EngineSpec {
        name: "burn-wgpu",
        summary: "Burn on a GPU through Vulkan, Metal or DX12",
        kernels: Kernels::Tuned { stock: Some("burn-wgpu-stock") },
        open: burn::wgpu,
    },
    EngineSpec {
        name: "burn-wgpu-stock",
        summary: "Burn on a GPU, with nothing but its own operations",
        kernels: Kernels::Stock,
        open: burn::wgpu_stock,
    },
    EngineSpec {
        name: "burn-flex",
        summary: "Burn on the CPU",
        kernels: Kernels::Tuned { stock: Some("burn-flex-stock") },
        open: burn::flex,
    },
    EngineSpec {
        name: "burn-flex-bf16",
        summary: "Burn on the CPU, with bf16 where that is faster",
        kernels: Kernels::Tuned { stock: Some("burn-flex-stock") },
        open: burn::flex_bf16,
    },
    EngineSpec {
        name: "burn-flex-stock",
        summary: "Burn on the CPU, with nothing but its own operations",
        kernels: Kernels::Stock,
        open: burn::flex_stock,
    },
];

/// The engines that run when none is named: a stock form runs where a suite asks for it.
pub fn tuned() -> impl Iterator<Item = &'static EngineSpec> {
    ENGINES.iter().filter(|engine| engine.kernels != Kernels::Stock)
}

/// The stock form of an engine, if it has one; a stock form is its own.
pub fn stock_form(name: &str) -> Option<&'static str> {
    let engine = ENGINES.iter().find(|engine| engine.name == name)?;
    match engine.kernels {
        Kernels::Tuned { stock } => stock,
        Kernels::Stock => Some(engine.name),
    }
}

/// Engines that take part where none is named.
pub fn unasked() -> impl Iterator<Item = &'static EngineSpec> {
    ENGINES.iter().filter(|engine| !ONLY_WHEN_NAMED.contains(&engine.name))
}

/// Stock forms that verification leaves out unless they are named, and most suites too. They have no NF4, which suites
/// ask for first, and on the CPU each pass with Burn's own 4 bits takes a 0.5B model some twenty seconds on two cores:
/// Burn gives a quantized weight a dimension of 1 for the batch, and flex decodes it and quantizes it anew for that.
const ONLY_WHEN_NAMED: [&str; 2] = ["burn-flex-stock", "burn-wgpu-stock"];

/// The stock form that a suite runs for an engine that was selected, be it one of `all` or of those that it need not
/// name.
pub fn stock_form_in_suites(name: &str, all: bool) -> Option<&'static str> {
    stock_form(name).filter(|form| all || *form == name || !ONLY_WHEN_NAMED.contains(form))
}

/// Whether `stock` is the stock form of `engine`, another one.
pub fn is_stock_form_of(stock: &str, engine: &str) -> bool {
    stock != engine && stock_form(engine) == Some(stock)
}

/// A built-in engine by its name.
pub fn built_in_engine(name: &str) -> Result<&'static EngineSpec> {
    let engine = ENGINES.iter().find(|engine| engine.name == name);
    engine.with_context(|| format!("no engine {name:?} is built in"))
}

/// Where it is remembered that a GPU has passed an engine's self-check. `None` where there is no cache folder.
pub fn self_checks() -> Option<PathBuf> {
    Some(cache_dir().ok()?.join("self-check"))
}

/// The engine that has one.
const SELF_CHECKING: &str = "burn-wgpu";

/// From now on these engines check every GPU anew.
pub fn forget_self_checks(engines: &[&str]) -> Result<()> {
    let Some(folder) = self_checks().filter(|_| engines.contains(&SELF_CHECKING)) else { return Ok(()) };
    match std::fs::remove_dir_all(&folder) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("{}: cannot be removed", folder.display()))
        }
        _ => Ok(()),
    }
}

/// An engine whose framework was left out of this build.
#[allow(dead_code, reason = "used by the builds without a framework only")]
fn left_out(feature: &str) -> evalfw_engine::Result<Box<dyn Engine>> {
    Err(Error::Unavailable {
        reason: format!("this evalfw was built without the cargo feature `{feature}`"),
        advice: format!("build it with `--features {feature}`"),
    })
}

#[cfg(feature = "candle")]
mod candle {
    use evalfw_candle::{CandleDevice, Variant, open};
    use evalfw_engine::{Engine, Result};

    pub fn cpu() -> Result<Box<dyn Engine>> {
        open(CandleDevice::Cpu, Variant::Tuned)
    }

    pub fn cpu_bf16() -> Result<Box<dyn Engine>> {
        open(CandleDevice::Cpu, Variant::TunedBf16)
    }

    pub fn cpu_stock() -> Result<Box<dyn Engine>> {
        open(CandleDevice::Cpu, Variant::Stock)
    }

    pub fn cuda() -> Result<Box<dyn Engine>> {
        open(CandleDevice::Cuda, Variant::Tuned)
    }

    pub fn cuda_bf16() -> Result<Box<dyn Engine>> {
        open(CandleDevice::Cuda, Variant::TunedBf16)
    }

    pub fn cuda_stock() -> Result<Box<dyn Engine>> {
        open(CandleDevice::Cuda, Variant::Stock)
    }

    pub fn metal() -> Result<Box<dyn Engine>> {
        open(CandleDevice::Metal, Variant::Tuned)
    }

    pub fn metal_stock() -> Result<Box<dyn Engine>> {
        open(CandleDevice::Metal, Variant::Stock)
    }
}

#[cfg(not(feature = "candle"))]
mod candle {
    use super::left_out;
    use evalfw_engine::{Engine, Result};

    pub fn cpu() -> Result<Box<dyn Engine>> {
        left_out("candle")
    }

    pub fn cuda() -> Result<Box<dyn Engine>> {
        left_out("cuda")
    }

    pub fn metal() -> Result<Box<dyn Engine>> {
        left_out("metal")
    }

    pub use {
        cpu as cpu_bf16, cpu as cpu_stock, cuda as cuda_bf16, cuda as cuda_stock, metal as metal_stock,
    };
}

#[cfg(feature = "burn")]
mod burn {
    use crate::folders::cache_dir;
    use evalfw_burn::{Autotune, BurnDevice, Preparation, Variant, When, open};
    use evalfw_engine::{Engine, Error, Result};

    /// `on` tunes on software adapters, too, `off` nowhere.
    const AUTOTUNE_VARIABLE: &str = "EVALFW_AUTOTUNE";

    fn autotune() -> Result<Autotune> {
        let wish = std::env::var(AUTOTUNE_VARIABLE).unwrap_or_default();
        let when = match wish.as_str() {
            "" => When::Hardware,
            "on" => When::Always,
            "off" => When::Never,
            _ => {
                let message = format!("{AUTOTUNE_VARIABLE} is {wish:?}, but must be `on` or `off`");
                return Err(Error::input(message));
            }
        };
        // Without a cache folder it tunes each time.
        Ok(Autotune { when, cache: cache_dir().ok() })
    }

    fn on_gpu() -> Result<Preparation> {
        Ok(Preparation { autotune: autotune()?, self_checks: super::self_checks() })
    }

    pub fn wgpu() -> Result<Box<dyn Engine>> {
        open(BurnDevice::Wgpu, Variant::Tuned, &on_gpu()?)
    }

    pub fn flex() -> Result<Box<dyn Engine>> {
        open(BurnDevice::Flex, Variant::Tuned, &Preparation::default())
    }

    pub fn flex_bf16() -> Result<Box<dyn Engine>> {
        open(BurnDevice::Flex, Variant::TunedBf16, &Preparation::default())
    }

    pub fn wgpu_stock() -> Result<Box<dyn Engine>> {
        open(BurnDevice::Wgpu, Variant::Stock, &on_gpu()?)
    }

    pub fn flex_stock() -> Result<Box<dyn Engine>> {
        open(BurnDevice::Flex, Variant::Stock, &Preparation::default())
    }
}

#[cfg(not(feature = "burn"))]
mod burn {
    use super::left_out;
    use evalfw_engine::{Engine, Result};

    pub fn wgpu() -> Result<Box<dyn Engine>> {
        left_out("burn")
    }

    pub fn flex() -> Result<Box<dyn Engine>> {
        left_out("burn")
    }

    pub use {flex as flex_bf16, flex as flex_stock, wgpu as wgpu_stock};
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_stock_form_is_an_engine_with_stock_kernels() {
        for engine in tuned() {
            if let Some(stock) = stock_form(engine.name) {
                let form = ENGINES.iter().find(|engine| engine.name == stock).unwrap();
                assert_eq!(form.kernels, Kernels::Stock);
                assert_eq!(stock_form(stock), Some(stock));
            }
        }
    }
}

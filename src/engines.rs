//! The registry of engines: a line each.

use anyhow::{Result, bail};
use evalfw_engine::{Engine, Error};

/// An engine on a device, as named on the command line.
pub struct EngineSpec {
    pub name: &'static str,
    pub summary: &'static str,
    /// Opens the device. Called in the worker process only.
    pub open: fn() -> evalfw_engine::Result<Box<dyn Engine>>,
}

pub const ENGINES: &[EngineSpec] = &[
    EngineSpec { name: "candle-cpu", summary: "candle on the CPU", open: candle::cpu },
    EngineSpec {
        name: "candle-cpu-bf16",
        summary: "candle on a CPU that multiplies bf16",
        open: candle::cpu_bf16,
    },
    EngineSpec { name: "candle-cuda", summary: "candle on an NVIDIA GPU", open: candle::cuda },
    EngineSpec { name: "candle-metal", summary: "candle on an Apple GPU", open: candle::metal },
    EngineSpec {
        name: "burn-wgpu",
        summary: "Burn on a GPU through Vulkan, Metal or DX12",
        open: burn::wgpu,
    },
    EngineSpec { name: "burn-flex", summary: "Burn on the CPU", open: burn::flex },
];

pub fn find(name: &str) -> Result<&'static EngineSpec> {
    match ENGINES.iter().find(|e| e.name == name) {
        Some(engine) => Ok(engine),
        None => {
            let known: Vec<_> = ENGINES.iter().map(|e| e.name).collect();
            bail!("no engine {name:?}; there are {}", known.join(", "))
        }
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
    use evalfw_candle::{CandleDevice, open, open_cpu_bf16};
    use evalfw_engine::{Engine, Result};

    pub fn cpu() -> Result<Box<dyn Engine>> {
        open(CandleDevice::Cpu)
    }

    pub fn cpu_bf16() -> Result<Box<dyn Engine>> {
        open_cpu_bf16()
    }

    pub fn cuda() -> Result<Box<dyn Engine>> {
        open(CandleDevice::Cuda)
    }

    pub fn metal() -> Result<Box<dyn Engine>> {
        open(CandleDevice::Metal)
    }
}

#[cfg(not(feature = "candle"))]
mod candle {
    use super::left_out;
    use evalfw_engine::{Engine, Result};

    pub fn cpu() -> Result<Box<dyn Engine>> {
        left_out("candle")
    }

    pub fn cpu_bf16() -> Result<Box<dyn Engine>> {
        left_out("candle")
    }

    pub fn cuda() -> Result<Box<dyn Engine>> {
        left_out("cuda")
    }

    pub fn metal() -> Result<Box<dyn Engine>> {
        left_out("metal")
    }
}

#[cfg(feature = "burn")]
mod burn {
    use evalfw_burn::{BurnDevice, open};
    use evalfw_engine::{Engine, Result};

    pub fn wgpu() -> Result<Box<dyn Engine>> {
        open(BurnDevice::Wgpu)
    }

    pub fn flex() -> Result<Box<dyn Engine>> {
        open(BurnDevice::Flex)
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
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_engine_lists_the_known_ones() {
        let error = find("candle").err().unwrap().to_string();
        assert!(error.contains("candle-cpu") && error.contains("burn-flex"), "{error}");
    }
}

//! candle with a planted error: `mutant_engine MUTATION [FLAG...]` is a worker that `verify` must catch.

mod adamw;
mod checkpoint;
mod model;
mod mutation;

use checkpoint::told_weights;
use evalfw_candle::{CandleDevice, Variant, open};
use evalfw_engine::checkpoint::Checkpoint;
use evalfw_engine::protocol::{EngineInfo, LoadTimes, Quantization};
use evalfw_engine::serve::serve_stdio;
use evalfw_engine::weights::WeightLoader;
use evalfw_engine::{Engine, Error, LoadedModel, Result};
use model::MutantModel;
use mutation::Mutant;

fn main() -> std::io::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let mutant = Mutant::parse(&arguments).unwrap_or_else(|problem| panic!("{problem}"));
    serve_stdio(Box::new(move || {
        let engine = open(CandleDevice::Cpu, Variant::Tuned)?;
        Ok(Box::new(MutantEngine { engine, mutant }))
    }))
}

struct MutantEngine {
    engine: Box<dyn Engine>,
    mutant: Mutant,
}

impl Engine for MutantEngine {
    fn info(&self) -> EngineInfo {
        let mut info = self.engine.info();
        if self.mutant.says_bf16 {
            info.compute_dtype = "bf16".into();
        }
        info
    }

    fn load(&mut self, loader: WeightLoader<'_>) -> Result<LoadedModel> {
        let altered = tempfile::tempdir().map_err(Error::framework)?;
        checkpoint::alter(&loader.checkpoint().dir, altered.path(), &self.mutant);
        let checkpoint = Checkpoint::open(altered.path())?;
        let mut times = LoadTimes::default();
        let (form, decoded) = match loader.quantization() {
            Quantization::Native if self.mutant.native => {
                (Quantization::Nf4, Some(told_weights(&checkpoint, self.mutant.mutation)?))
            }
            other => (other, None),
        };
        let model = self.engine.load(WeightLoader::new(&checkpoint, form, &mut times))?;
        Ok(Box::new(MutantModel::new(model, self.mutant, decoded)))
    }
}

//! The models of a run, each found or made, checked and prepared when it is first needed.

use super::inputs::ModelInputs;
use super::settings::Settings;
use crate::data::dataset::Dataset;
use crate::model::{Context as ModelContext, ModelSource, Origin, ResolvedModel};
use crate::record::ModelRecord;
use crate::scenario::Scenario;
use anyhow::Result;

/// The largest checkpoint that a software adapter runs when nobody asked for it by name.
const SOFTWARE_ADAPTER_BYTES: u64 = 64_000_000;

pub struct Models<'a> {
    settings: &'a Settings,
    data: &'a Dataset,
    source: ModelContext<'a>,
    specs: Vec<String>,
    /// In the order in which they were first needed.
    pub records: Vec<ModelRecord>,
    /// In the same order.
    pub inputs: Vec<ModelInputs>,
}

impl<'a> Models<'a> {
    pub fn new(settings: &'a Settings, data: &'a Dataset, notify: &'a mut dyn FnMut(&str)) -> Result<Self> {
        let source = ModelContext::from_env(notify)?;
        Ok(Self { settings, data, source, specs: Vec::new(), records: Vec::new(), inputs: Vec::new() })
    }

    pub fn main(&mut self) -> Result<usize> {
        self.get(self.settings.model.as_deref().unwrap_or(&self.settings.suite.model))
    }

    /// The model that was asked for if it is small, or if the engine was asked for too; else the
    /// suite's small one.
    pub fn for_software_adapter(&mut self) -> Result<usize> {
        if self.settings.model.is_some() {
            let model = self.main()?;
            if self.settings.engines_named || self.inputs[model].checkpoint_bytes <= SOFTWARE_ADAPTER_BYTES {
                return Ok(model);
            }
        }
        self.get(&self.settings.suite.software_adapter_model)
    }

    pub fn get(&mut self, spec: &str) -> Result<usize> {
        if let Some(index) = self.specs.iter().position(|s| s == spec) {
            return Ok(index);
        }
        let suite = &self.settings.suite;
        let scenarios: Vec<&Scenario> = suite
            .cells
            .iter()
            .map(|c| &c.scenario)
            .filter(|s| s.own_model().is_none_or(|own| own == spec))
            .collect();
        let resolved = ModelSource::resolve(spec, &mut self.source)?;
        let inputs = ModelInputs::prepare(&resolved.name, &resolved.dir, self.data, &scenarios, suite.seed)?;
        self.specs.push(spec.to_owned());
        self.records.push(model_record(&resolved, &inputs));
        self.inputs.push(inputs);
        Ok(self.specs.len() - 1)
    }
}

fn model_record(resolved: &ResolvedModel, inputs: &ModelInputs) -> ModelRecord {
    ModelRecord {
        name: resolved.name.clone(),
        parameters: inputs.config.parameters(),
        checkpoint_bytes: inputs.checkpoint_bytes,
        synthetic: resolved.synthetic,
        config: Some(inputs.config.clone()),
        origin: origin(resolved),
    }
}

fn origin(model: &ResolvedModel) -> String {
    match &model.origin {
        Origin::Folder => "local folder".to_owned(),
        Origin::Preset { seed } => format!("evalfw synth, seed {seed}"),
        Origin::Hub { endpoint } => {
            format!("{endpoint}, commit {}", model.revision.as_deref().unwrap_or("unknown"))
        }
    }
}

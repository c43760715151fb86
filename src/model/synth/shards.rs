//! How a checkpoint's tensors are laid out in safetensors files.
//!
//! The `safetensors` crate wants each tensor in memory as a whole. Here only the headers are made, and
//! the caller streams the data after them.

use evalfw_engine::config::ModelConfig;
use serde_json::{Map, Value, json};

/// A tensor and its number in the model.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    pub index: usize,
    pub name: String,
    pub shape: Vec<usize>,
}

impl Tensor {
    /// Bytes of the elements in bf16.
    pub fn bytes(&self) -> u64 {
        2 * self.shape.iter().product::<usize>() as u64
    }
}

/// One file of the checkpoint.
#[derive(Debug, Clone, PartialEq)]
pub struct Shard {
    pub file: String,
    /// In the order of their data.
    pub tensors: Vec<Tensor>,
}

impl Shard {
    /// Bytes of all elements.
    pub fn data_bytes(&self) -> u64 {
        self.tensors.iter().map(Tensor::bytes).sum()
    }

    /// What precedes the elements: the length of the JSON, and the JSON, padded so that the elements
    /// begin at a multiple of eight.
    pub fn header(&self) -> Vec<u8> {
        let mut entries = Map::new();
        entries.insert("__metadata__".into(), json!({"format": "pt"}));
        let mut start = 0;
        for tensor in &self.tensors {
            let end = start + tensor.bytes();
            let entry = json!({"dtype": "BF16", "shape": tensor.shape, "data_offsets": [start, end]});
            entries.insert(tensor.name.clone(), entry);
            start = end;
        }
        let mut text = Value::Object(entries).to_string().into_bytes();
        text.resize(text.len().next_multiple_of(8), b' ');
        let mut header = (text.len() as u64).to_le_bytes().to_vec();
        header.append(&mut text);
        header
    }
}

/// Splits the model's tensors into files of at most `max_shard_bytes` of elements. A tensor is never
/// split: one that is larger has a file of its own.
pub fn plan(config: &ModelConfig, max_shard_bytes: u64) -> Vec<Shard> {
    let mut groups: Vec<Vec<Tensor>> = Vec::new();
    let mut filled = 0;
    for (index, (name, shape)) in config.tensors().into_iter().enumerate() {
        let tensor = Tensor { index, name, shape };
        let bytes = tensor.bytes();
        match groups.last_mut() {
            Some(group) if filled + bytes <= max_shard_bytes => {
                group.push(tensor);
                filled += bytes;
            }
            _ => {
                groups.push(vec![tensor]);
                filled = bytes;
            }
        }
    }
    let count = groups.len();
    let name = |index: usize| match count {
        1 => "model.safetensors".to_owned(),
        _ => format!("model-{:05}-of-{count:05}.safetensors", index + 1),
    };
    groups.into_iter().enumerate().map(|(i, tensors)| Shard { file: name(i), tensors }).collect()
}

/// `model.safetensors.index.json`, which a checkpoint of more than one file has.
pub fn index(shards: &[Shard]) -> Option<Value> {
    if shards.len() < 2 {
        return None;
    }
    let total: u64 = shards.iter().map(Shard::data_bytes).sum();
    let mut places: Vec<(&str, &str)> = shards
        .iter()
        .flat_map(|shard| shard.tensors.iter().map(|tensor| (tensor.name.as_str(), shard.file.as_str())))
        .collect();
    places.sort_unstable();
    let weight_map: Map<String, Value> =
        places.into_iter().map(|(tensor, file)| (tensor.to_owned(), file.into())).collect();
    Some(json!({"metadata": {"total_size": total}, "weight_map": weight_map}))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::presets::Preset;
    use safetensors::SafeTensors;

    fn config() -> ModelConfig {
        Preset::parse("tiny").unwrap().config
    }

    #[test]
    fn the_safetensors_crate_accepts_the_header() {
        for shard in plan(&config(), 200_000) {
            let header = shard.header();
            assert!(header.len().is_multiple_of(8));
            let mut file = header.clone();
            file.resize(header.len() + shard.data_bytes() as usize, 0);
            let tensors = SafeTensors::deserialize(&file).unwrap();
            for tensor in &shard.tensors {
                assert_eq!(tensors.tensor(&tensor.name).unwrap().shape(), tensor.shape);
            }
            let (_, metadata) = SafeTensors::read_metadata(&file).unwrap();
            assert_eq!(metadata.metadata().as_ref().unwrap()["format"], "pt");
        }
    }

    #[test]
    fn every_tensor_is_in_one_shard_and_no_shard_is_too_large_without_need() {
        let limit = 100_000;
        let shards = plan(&config(), limit);
        let planned: Vec<_> =
            shards.iter().flat_map(|s| &s.tensors).map(|t| (t.name.clone(), t.shape.clone())).collect();
        assert_eq!(planned, config().tensors());
        assert!(shards.iter().all(|s| s.data_bytes() <= limit || s.tensors.len() == 1));
        assert!(shards.len() > 2);
    }

    #[test]
    fn one_file_needs_no_index_and_several_have_a_whole_one() {
        assert_eq!(index(&plan(&config(), u64::MAX)), None);
        assert_eq!(plan(&config(), u64::MAX)[0].file, "model.safetensors");
        let shards = plan(&config(), 100_000);
        let index = index(&shards).unwrap();
        assert_eq!(index["weight_map"].as_object().unwrap().len(), config().tensors().len());
        assert_eq!(index["metadata"]["total_size"], 2 * config().parameters());
        assert_eq!(shards[1].file, format!("model-00002-of-{:05}.safetensors", shards.len()));
    }
}

//! NF4 against what bitsandbytes made of the same matrices: every code and every bit.

use evalfw_engine::nf4::{DYNAMIC_MAP, LEVELS, Nf4Tensor};
use half::{bf16, f16};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::Deserialize;
use std::path::PathBuf;

#[derive(Deserialize)]
struct Case {
    name: String,
    shape: [usize; 2],
}

fn golden(file: &str) -> Vec<u8> {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/reference/golden/nf4");
    std::fs::read(folder.join(file)).unwrap_or_else(|e| panic!("{file}: {e}"))
}

/// Widened to f32, as the checkpoint reader does before quantizing.
fn floats(tensor: &TensorView<'_>) -> Vec<f32> {
    let halves = || tensor.data().as_chunks::<2>().0.iter();
    match tensor.dtype() {
        Dtype::F32 => tensor.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        Dtype::BF16 => halves().map(|b| bf16::from_le_bytes(*b).to_f32()).collect(),
        Dtype::F16 => halves().map(|b| f16::from_le_bytes(*b).to_f32()).collect(),
        other => panic!("a source of type {other:?}"),
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

#[test]
fn the_maps_are_those_of_bitsandbytes() {
    let bytes = golden("maps.safetensors");
    let maps = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(bits(&LEVELS), bits(&floats(&maps.tensor("levels").unwrap())));
    assert_eq!(bits(&*DYNAMIC_MAP), bits(&floats(&maps.tensor("dynamic_map").unwrap())));
}

#[test]
fn codes_scales_and_decoded_values_are_bit_equal() {
    let cases: Vec<Case> = serde_json::from_slice(&golden("cases.json")).unwrap();
    assert!(cases.len() > 20);
    let differences: Vec<String> = cases.iter().flat_map(differences).collect();
    assert!(differences.is_empty(), "{differences:#?}");
}

fn differences(case: &Case) -> Vec<String> {
    let bytes = golden(&format!("{}.safetensors", case.name));
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tensor = |name: &str| file.tensor(name).unwrap();
    let found = Nf4Tensor::quantize(case.shape, &floats(&tensor("source")));
    let bytes = [("codes", &found.codes), ("absmax_codes", &found.scales.codes)]
        .map(|(name, ours)| (name, count(ours, tensor(name).data())));
    let words = [
        ("nested_absmax", &found.scales.absmax[..]),
        ("offset", &[found.scales.offset]),
        ("decoded", &found.dequantize()),
    ]
    .map(|(name, ours)| (name, count(&bits(ours), &bits(&floats(&tensor(name))))));
    bytes
        .into_iter()
        .chain(words)
        .filter(|&(_, differing)| differing > 0)
        .map(|(name, differing)| format!("{}: {differing} of {name}", case.name))
        .collect()
}

/// How many values differ; all of them where the lengths do.
fn count<T: PartialEq>(ours: &[T], theirs: &[T]) -> usize {
    if ours.len() != theirs.len() {
        return ours.len().max(theirs.len());
    }
    ours.iter().zip(theirs).filter(|(a, b)| a != b).count()
}

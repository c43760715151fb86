//! Packed matrices in device buffers, and the kernels that decode them there.

use super::{Decode, Packed, Storage, WordFormat};
use burn::backend::tensor::FloatTensor;
use burn::backend::{Cube, CubeDevice};
use burn::tensor::{DType, Device, Int, Shape, Tensor, TensorData};
use burn_wgpu::CubeTensor;
use cubecl::calculate_cube_count_elemwise;
use cubecl::prelude::*;
use evalfw_engine::nf4::{BLOCK, DYNAMIC_MAP, LEVELS, NESTED_BLOCK, Nf4Tensor};
use half::bf16;
use std::ops::Range;

impl Storage<burn::backend::Dispatch> {
    /// Uploads a matrix in NF4 with its scales as they are: 4.13 bits a weight.
    pub fn nf4_words(tensor: &Nf4Tensor, device: &Device) -> Self {
        let mut words = little_endian(&tensor.codes);
        let scales = words.len() as u32;
        words.extend(little_endian(&tensor.scales.codes));
        let nested = words.len() as u32;
        words.extend(tensor.scales.absmax.iter().map(|v| v.to_bits()));
        let tables = words.len() as u32;
        words.extend(LEVELS.iter().chain(&*DYNAMIC_MAP).map(|v| v.to_bits()));
        words.push(tensor.scales.offset.to_bits());
        Self::words(words, WordFormat::Nf4 { scales, nested, tables }, device)
    }

    /// Uploads values in bf16.
    pub fn bf16_words(values: &[bf16], device: &Device) -> Self {
        let pair = |pair: &[bf16]| {
            let high = pair.get(1).map_or(0, |v| v.to_bits());
            u32::from(high) << 16 | u32::from(pair[0].to_bits())
        };
        Self::words(values.chunks(2).map(pair).collect(), WordFormat::Bf16, device)
    }

    fn words(words: Vec<u32>, format: WordFormat, device: &Device) -> Self {
        let count = words.len();
        let words = Tensor::<1, Int>::from_data(TensorData::new(words, [count]), (device, DType::U32));
        Self::Words { words: words.into_dispatch(), format }
    }
}

fn little_endian(bytes: &[u8]) -> Vec<u32> {
    let word = |bytes: &[u8]| bytes.iter().rev().fold(0, |word, &byte| word << 8 | u32::from(byte));
    bytes.chunks(4).map(word).collect()
}

impl Decode for Cube {
    fn decode(weight: &Packed<Self>, rows: Range<usize>, device: &CubeDevice) -> FloatTensor<Self> {
        let Storage::Words { words, format } = &weight.storage else {
            unreachable!("wgpu stores its matrices on the device");
        };
        let shape = Shape::new([rows.len(), weight.columns]);
        let elements = shape.num_elements();
        let client = words.client.clone();
        let buffer = client.empty(elements * size_of::<f32>());
        let out = CubeTensor::new_contiguous(client.clone(), device.clone(), shape, buffer, DType::F32);
        let cube_dim = CubeDim::new(&client, elements);
        let cube_count = calculate_cube_count_elemwise(&client, elements, cube_dim);
        let first = (rows.start * weight.columns) as u32;
        let words = words.clone().into_buffer_arg();
        let target = out.clone().into_buffer_arg();
        match *format {
            WordFormat::Bf16 => decode_bf16::launch(&client, cube_count, cube_dim, words, target, first),
            WordFormat::Nf4 { scales, nested, tables } => {
                decode_nf4::launch(
                    &client, cube_count, cube_dim, words, target, first, scales, nested, tables,
                );
            }
        }
        out
    }
}

/// One thread an element: `out[i]` is element `first + i`.
#[cube(launch)]
fn decode_bf16(words: &[u32], out: &mut [f32], first: u32) {
    let index = ABSOLUTE_POS;
    if index < out.len() {
        let element = first + index as u32;
        let bits = words[(element / 2) as usize] >> (16 * (element % 2));
        out[index] = f32::reinterpret(bits << 16);
    }
}

/// One thread an element: `out[i]` is element `first + i`. See [`WordFormat::Nf4`] for the layout.
#[cube(launch)]
fn decode_nf4(words: &[u32], out: &mut [f32], first: u32, scales: u32, nested: u32, tables: u32) {
    let index = ABSOLUTE_POS;
    if index < out.len() {
        let element = first + index as u32;
        let block = element / BLOCK as u32;

        // The first value of a byte is in its high nibble.
        let byte = element / 2;
        let shift = 8 * (byte % 4) + 4 * (1 - element % 2);
        let code = (words[(byte / 4) as usize] >> shift) & 15;
        let scale_code = (words[(scales + block / 4) as usize] >> (8 * (block % 4))) & 255;

        let level = f32::reinterpret(words[(tables + code) as usize]);
        let map = f32::reinterpret(words[(tables + 16 + scale_code) as usize]);
        let outer = f32::reinterpret(words[(nested + block / NESTED_BLOCK as u32) as usize]);
        let offset = f32::reinterpret(words[(tables + 272) as usize]);
        out[index] = level * (map * outer + offset);
    }
}

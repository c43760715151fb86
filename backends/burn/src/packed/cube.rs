//! Packed matrices in device buffers, and the kernels that decode them there or multiply one row by them.

use super::{
    Decode, Packed, PackedOps, Storage, WordFormat, matmul_by_decoding, matmul_transposed_by_decoding,
};
use crate::buffer::unwritten;
use burn::backend::tensor::FloatTensor;
use burn::backend::{Cube, TensorMetadata};
use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use burn_wgpu::CubeTensor;
use cubecl::calculate_cube_count_elemwise;
use cubecl::prelude::*;
use cubecl::server::CubeCountSelection;
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

impl PackedOps for Cube {
    fn packed_matmul(x: FloatTensor<Self>, weight: Packed<Self>) -> FloatTensor<Self> {
        match x.shape()[0] {
            1 if x.is_contiguous() && has_whole_words(&weight) => multiply_row(x, &weight),
            _ => matmul_by_decoding(x, &weight),
        }
    }

    fn packed_matmul_transposed(y: FloatTensor<Self>, weight: Packed<Self>) -> FloatTensor<Self> {
        matmul_transposed_by_decoding(y, &weight)
    }
}

/// Whether each row begins with a word and, in NF4, with a block.
fn has_whole_words(weight: &Packed<Cube>) -> bool {
    weight.columns.is_multiple_of(match words_of(weight).1 {
        WordFormat::Bf16 => 2,
        WordFormat::Nf4 { .. } => BLOCK,
    })
}

fn words_of(weight: &Packed<Cube>) -> (&CubeTensor, WordFormat) {
    match &weight.storage {
        Storage::Words { words, format } => (words, *format),
        Storage::Host(_) => unreachable!("wgpu stores its matrices on the device"),
    }
}

/// `x [1, in] · Wᵀ`, which reads each word of W once: a single row is bound by the memory's rate.
fn multiply_row(x: CubeTensor, weight: &Packed<Cube>) -> CubeTensor {
    let (words, format) = words_of(weight);
    assert_eq!(*x.shape(), [1, weight.columns], "the row does not fit the matrix");
    let client = words.client.clone();
    let rows = weight.rows.len();
    let out = unwritten(&x, [1, rows]);

    let lanes = lanes(&client);
    let cube_rows = UNITS / lanes;
    let cube_count = CubeCountSelection::new(&client, rows.div_ceil(cube_rows) as u32).cube_count();
    let cube_dim = CubeDim::new_2d(lanes as u32, cube_rows as u32);
    let first = weight.rows.start as u32;
    let (words, x) = (words.clone().into_buffer_arg(), x.into_buffer_arg());
    let target = out.clone().into_buffer_arg();
    let columns = weight.columns as u32;
    match format {
        WordFormat::Bf16 => {
            let row_words = columns / 2;
            multiply_bf16::launch(&client, cube_count, cube_dim, words, x, target, first, row_words, lanes);
        }
        WordFormat::Nf4 { scales, nested, tables } => {
            let row_words = columns / NF4_VALUES as u32;
            multiply_nf4::launch(
                &client, cube_count, cube_dim, words, x, target, first, row_words, scales, nested, tables,
                lanes,
            );
        }
    }
    out
}

impl Decode for Cube {
    fn decode(weight: &Packed<Self>, rows: Range<usize>) -> FloatTensor<Self> {
        let (words, format) = words_of(weight);
        let out = unwritten(words, [rows.len(), weight.columns]);
        let (client, elements) = (out.client.clone(), out.shape().num_elements());
        let cube_dim = CubeDim::new(&client, elements);
        let cube_count = calculate_cube_count_elemwise(&client, elements, cube_dim);
        let first = (rows.start * weight.columns) as u32;
        let words = words.clone().into_buffer_arg();
        let target = out.clone().into_buffer_arg();
        match format {
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
        let level = f32::reinterpret(words[(tables + code) as usize]);
        out[index] = level * scale_of(words, block, scales, nested, tables);
    }
}

/// The scale of a block of NF4.
#[cube]
fn scale_of(words: &[u32], block: u32, scales: u32, nested: u32, tables: u32) -> f32 {
    let code = (words[(scales + block / 4) as usize] >> (8 * (block % 4))) & 255;
    let map = f32::reinterpret(words[(tables + 16 + code) as usize]);
    let outer = f32::reinterpret(words[(nested + block / NESTED_BLOCK as u32) as usize]);
    let offset = f32::reinterpret(words[(tables + 272) as usize]);
    map * outer + offset
}

/// Threads of a group. There are `lanes` for each of its rows.
const UNITS: usize = 64;

/// Threads that share a row of the matrix: those that the device runs together, so that they read whole lines of
/// memory. A software adapter has 8.
fn lanes(client: &Client) -> usize {
    (client.properties().hardware.plane_size_max as usize).next_power_of_two().clamp(8, 32)
}

/// Values of a word.
const NF4_VALUES: usize = 8;

/// `out[i]` is x times row `first_row + i`, which has `row_words` words. One row of threads a row.
#[cube(launch)]
fn multiply_bf16(
    words: &[u32],
    x: &[f32],
    out: &mut [f32],
    first_row: u32,
    row_words: u32,
    #[comptime] lanes: usize,
) {
    let row = CUBE_POS * comptime!(UNITS / lanes) + UNIT_POS_Y as usize;
    let mut sum = 0f32;
    if row < out.len() {
        let start = (first_row + row as u32) * row_words;
        let mut i = UNIT_POS_X;
        while i < row_words {
            let word = words[(start + i) as usize];
            let at = (2 * i) as usize;
            sum += f32::reinterpret(word << 16) * x[at];
            sum += f32::reinterpret(word & 0xffff_0000) * x[at + 1];
            i += comptime!(lanes as u32);
        }
    }
    add_lanes(sum, row, out, lanes);
}

/// The same for NF4; each row begins with a block.
#[cube(launch)]
fn multiply_nf4(
    words: &[u32],
    x: &[f32],
    out: &mut [f32],
    first_row: u32,
    row_words: u32,
    scales: u32,
    nested: u32,
    tables: u32,
    #[comptime] lanes: usize,
) {
    let mut levels = Shared::<[f32]>::new_slice(16usize);
    if UNIT_POS < 16 {
        levels[UNIT_POS as usize] = f32::reinterpret(words[(tables + UNIT_POS) as usize]);
    }
    sync_cube();

    let row = CUBE_POS * comptime!(UNITS / lanes) + UNIT_POS_Y as usize;
    let mut sum = 0f32;
    if row < out.len() {
        let start = (first_row + row as u32) * row_words;
        let mut i = UNIT_POS_X;
        while i < row_words {
            let at = start + i;
            let word = words[at as usize];
            let mut of_word = 0f32;
            #[unroll]
            for j in 0..NF4_VALUES {
                // The first value of a byte is in its high nibble.
                let shift = comptime!((8 * (j / 2) + 4 * (1 - j % 2)) as u32);
                let level = levels[((word >> shift) & 15) as usize];
                of_word += level * x[i as usize * NF4_VALUES + j];
            }
            let block = at / comptime!((BLOCK / NF4_VALUES) as u32);
            sum += of_word * scale_of(words, block, scales, nested, tables);
            i += comptime!(lanes as u32);
        }
    }
    add_lanes(sum, row, out, lanes);
}

/// Adds up what the threads of each row have. Through shared memory, as WGSL need not have operations within subgroups;
/// all threads of the group have to come here.
#[cube]
fn add_lanes(sum: f32, row: usize, out: &mut [f32], #[comptime] lanes: usize) {
    let mut sums = Shared::<[f32]>::new_slice(UNITS);
    let rows = comptime!(UNITS / lanes);
    sums[UNIT_POS_X as usize * rows + UNIT_POS_Y as usize] = sum;
    sync_cube();
    // One wait and a short loop: a tree would wait at each of its levels.
    if UNIT_POS_X == 0 && row < out.len() {
        let mut total = 0f32;
        for lane in 0..lanes {
            total += sums[lane * rows + UNIT_POS_Y as usize];
        }
        out[row] = total;
    }
}

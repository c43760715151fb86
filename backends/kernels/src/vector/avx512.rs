//! With AVX-512.

use crate::level::{Factors as Rounded, Level, level};
use crate::matrix::{Elements, HostMatrix};
use crate::nf4::avx512::absmax;
use crate::transpose::{SIDE, transpose};
use evalfw_engine::nf4::{BLOCK, LEVELS, Nf4Tensor};
use half::bf16;
use std::arch::x86_64::*;
use std::cell::RefCell;

/// Weights that are multiplied together: the codes fill one register.
const CHUNK: usize = 2 * BLOCK;
/// Bytes of codes in a chunk.
const BYTES: usize = CHUNK / 2;
/// Rows that are multiplied side by side: each part of the vector is loaded once for all of them, and while one
/// sum waits for its last product the others go on.
const TOGETHER: usize = 4;
/// Bytes by which codes are fetched ahead, at the least: into the second cache, as the first can wait for too few
/// lines at a time to make up for the memory's latency.
const AHEAD: usize = 8192;

thread_local! {
    /// Memory to work in.
    static SCALES: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// A chunk of the vector, in the order in which shifting a register of codes uncovers their nibbles.
#[repr(align(64))]
pub struct Chunk<T>(pub [T; CHUNK]);

/// How registers of codes are decoded and multiplied.
pub trait Factors {
    type Element: Copy + Send + Sync;
    /// The levels, in a register that is looked up.
    type Table: Copy;

    /// # Safety
    /// The CPU has the instructions of the factors.
    unsafe fn chunk(x: &[f32; CHUNK]) -> Chunk<Self::Element>;

    /// # Safety
    /// As of [`chunk`](Self::chunk).
    unsafe fn table() -> Self::Table;

    /// The products of a chunk of the vector with one of each row, without the scales of their blocks: those of
    /// the first block add up in the lower eight lanes, those of the second in the upper ones.
    ///
    /// # Safety
    /// As of [`chunk`](Self::chunk).
    unsafe fn multiply<const N: usize>(
        rows: [__m512i; N],
        table: Self::Table,
        x: &Chunk<Self::Element>,
    ) -> [__m512; N];

    /// [`add_rows`], compiled for the instructions of the factors.
    ///
    /// # Safety
    /// As of [`chunk`](Self::chunk).
    unsafe fn add_rows(rows: Rows<'_>, x: &[Chunk<Self::Element>], scales: &mut Vec<f32>, out: &mut [f32]);
}

/// Some rows of a matrix.
pub struct Rows<'a> {
    tensor: &'a Nf4Tensor,
    first: usize,
}

/// In f32, eight look-ups for a register of codes.
pub struct Single;

impl Factors for Single {
    type Element = f32;
    type Table = __m512;

    unsafe fn chunk(x: &[f32; CHUNK]) -> Chunk<f32> {
        Chunk(std::array::from_fn(|place| {
            let (nibble, word) = (place / 16, place % 16);
            // The first weight of a byte is in its high nibble.
            x[8 * word + (nibble ^ 1)]
        }))
    }

    #[inline(always)]
    unsafe fn table() -> __m512 {
        // SAFETY: there are 16 levels; the instructions are there by the contract, also below.
        unsafe { _mm512_loadu_ps(LEVELS.as_ptr()) }
    }

    #[inline(always)]
    unsafe fn multiply<const N: usize>(
        mut rows: [__m512i; N],
        levels: __m512,
        x: &Chunk<f32>,
    ) -> [__m512; N] {
        // SAFETY: the parts have 16 elements.
        unsafe {
            let mut sums = [_mm512_setzero_ps(); N];
            for x in x.0.as_chunks::<16>().0 {
                let x = _mm512_loadu_ps(x.as_ptr());
                for (sum, codes) in sums.iter_mut().zip(&mut rows) {
                    *sum = _mm512_fmadd_ps(_mm512_permutexvar_ps(*codes, levels), x, *sum);
                    *codes = _mm512_srli_epi32::<4>(*codes);
                }
            }
            sums
        }
    }

    unsafe fn add_rows(rows: Rows<'_>, x: &[Chunk<f32>], scales: &mut Vec<f32>, out: &mut [f32]) {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
        fn run(rows: Rows<'_>, x: &[Chunk<f32>], scales: &mut Vec<f32>, out: &mut [f32]) {
            // SAFETY: the instructions are there, also below.
            unsafe { add_rows::<Single>(rows, x, scales, out) };
        }
        unsafe { run(rows, x, scales, out) };
    }
}

/// In bf16, summed in f32: four look-ups, of two weights in each lane.
pub struct Pairs;

impl Factors for Pairs {
    type Element = bf16;
    type Table = __m512i;

    unsafe fn chunk(x: &[f32; CHUNK]) -> Chunk<bf16> {
        /// Where the first 16 words of codes have the weights of their lowest nibbles.
        const PLACES: [i16; 32] = {
            let mut places = [0; 32];
            let mut word = 0;
            while word < 32 {
                places[word] = 4 * (word as i16 % 16);
                word += 1;
            }
            places
        };
        #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
        fn run(x: &[f32; CHUNK]) -> Chunk<bf16> {
            let mut chunk = Chunk([bf16::ZERO; CHUNK]);
            // SAFETY: the parts have the sizes of registers; the types that are cast have the same bits.
            unsafe {
                let load = |i: usize| _mm512_loadu_ps(x.as_ptr().add(16 * i));
                let narrow =
                    |i| std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(load(i + 1), load(i)));
                let [a, b, c, d] = [narrow(0), narrow(2), narrow(4), narrow(6)];
                let places = _mm512_loadu_si512(PLACES.as_ptr().cast());
                for (nibble, out) in chunk.0.as_chunks_mut::<32>().0.iter_mut().enumerate() {
                    // The first weight of a byte is in its high nibble.
                    let places = _mm512_add_epi16(places, _mm512_set1_epi16(nibble as i16 ^ 1));
                    let first = _mm512_permutex2var_epi16(a, places, b);
                    let second = _mm512_permutex2var_epi16(c, places, d);
                    let both = _mm512_mask_blend_epi16(0xffff_0000, first, second);
                    _mm512_storeu_si512(out.as_mut_ptr().cast(), both);
                }
            }
            chunk
        }
        // SAFETY: the instructions are there by the contract.
        unsafe { run(x) }
    }

    #[inline(always)]
    unsafe fn table() -> __m512i {
        // Twice, as the look-up sees five bits, one of them of the next nibble.
        let levels: [bf16; 32] = std::array::from_fn(|code| bf16::from_f32(LEVELS[code % 16]));
        // SAFETY: 32 values of 16 bits are read; the instructions are there by the contract, also below.
        unsafe { _mm512_loadu_si512(levels.as_ptr().cast()) }
    }

    #[inline(always)]
    unsafe fn multiply<const N: usize>(
        mut rows: [__m512i; N],
        levels: __m512i,
        x: &Chunk<bf16>,
    ) -> [__m512; N] {
        // SAFETY: the parts have 32 elements; the types that are cast have the same bits.
        unsafe {
            let pairs = |v| std::mem::transmute::<__m512i, __m512bh>(v);
            let mut sums = [_mm512_setzero_ps(); N];
            for x in x.0.as_chunks::<32>().0 {
                let x = pairs(_mm512_loadu_si512(x.as_ptr().cast()));
                for (sum, codes) in sums.iter_mut().zip(&mut rows) {
                    *sum = _mm512_dpbf16_ps(*sum, pairs(_mm512_permutexvar_epi16(*codes, levels)), x);
                    *codes = _mm512_srli_epi16::<4>(*codes);
                }
            }
            sums
        }
    }

    unsafe fn add_rows(rows: Rows<'_>, x: &[Chunk<bf16>], scales: &mut Vec<f32>, out: &mut [f32]) {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")]
        fn run(rows: Rows<'_>, x: &[Chunk<bf16>], scales: &mut Vec<f32>, out: &mut [f32]) {
            // SAFETY: the instructions are there, also below.
            unsafe { add_rows::<Pairs>(rows, x, scales, out) };
        }
        unsafe { run(rows, x, scales, out) };
    }
}

/// A vector in whole chunks, for the products of NF4.
pub enum Chunks {
    Pairs(Vec<Chunk<bf16>>),
    Single(Vec<Chunk<f32>>),
}

impl Chunks {
    /// As the first of the matrices in NF4 needs them, if the CPU has the instructions.
    pub fn new(matrices: &[&HostMatrix], x: &[f32]) -> Option<Self> {
        let nf4 = matrices.iter().find(|matrix| matches!(matrix.elements, Elements::Nf4(_)))?;
        let (chunks, rest) = x.as_chunks::<CHUNK>();
        if level() != Level::Avx512 || !rest.is_empty() {
            return None;
        }
        // SAFETY: the CPU has the instructions: of f32 with the level, and of bf16 where factors are of that type.
        Some(match Rounded::of(nf4.products) {
            Rounded::Bf16 => Self::Pairs(chunks.iter().map(|x| unsafe { Pairs::chunk(x) }).collect()),
            Rounded::F32 | Rounded::Int16 => {
                Self::Single(chunks.iter().map(|x| unsafe { Single::chunk(x) }).collect())
            }
        })
    }

    /// Adds the products of the rows from `first`; false where the matrix needs the vector in another form.
    pub fn add_rows(&self, matrix: &HostMatrix, first: usize, out: &mut [f32]) -> bool {
        let Elements::Nf4(tensor) = &matrix.elements else { return false };
        let rows = Rows { tensor, first };
        // SAFETY: whoever made the chunks has seen that the CPU has their instructions.
        SCALES.with_borrow_mut(|scales| unsafe {
            match (self, Rounded::of(matrix.products)) {
                (Self::Pairs(chunks), Rounded::Bf16) => Pairs::add_rows(rows, chunks, scales, out),
                (Self::Single(chunks), Rounded::F32 | Rounded::Int16) => {
                    Single::add_rows(rows, chunks, scales, out)
                }
                _ => return false,
            }
            true
        })
    }
}

/// `out` has an element for each of the rows; `scales` is memory to work in.
///
/// # Safety
/// The CPU has the instructions of the factors, and the caller is compiled for them.
#[inline(always)]
unsafe fn add_rows<F: Factors>(
    Rows { tensor, first }: Rows<'_>,
    x: &[Chunk<F::Element>],
    scales: &mut Vec<f32>,
    out: &mut [f32],
) {
    let blocks = 2 * x.len();
    scales.resize(out.len() * blocks, 0.0);
    // SAFETY: the instructions are there, also below.
    unsafe { absmax(&tensor.scales, first * blocks, scales) };
    let (scales, _) = scales.as_chunks::<2>();
    let (codes, _) = tensor.codes[first * BYTES * x.len()..].as_chunks::<BYTES>();
    let table = unsafe { F::table() };
    let (whole, rest) = out.as_chunks_mut::<SIDE>();
    let first_of_rest = whole.len() * SIDE;
    for (group, out) in whole.iter_mut().enumerate() {
        // The sums of 16 rows are added up side by side.
        unsafe {
            let mut sums = [_mm512_setzero_ps(); SIDE];
            for (i, sums) in sums.as_chunks_mut::<TOGETHER>().0.iter_mut().enumerate() {
                let first = (group * SIDE + i * TOGETHER) * x.len();
                *sums = sums_of_rows::<F, TOGETHER>(&codes[first..], &scales[first..], table, x);
            }
            let mut total = _mm512_loadu_ps(out.as_ptr());
            for sum in transpose(sums) {
                total = _mm512_add_ps(total, sum);
            }
            _mm512_storeu_ps(out.as_mut_ptr(), total);
        }
    }
    for (row, out) in (first_of_rest..).zip(rest) {
        let first = row * x.len();
        unsafe {
            let [sum] = sums_of_rows::<F, 1>(&codes[first..], &scales[first..], table, x);
            *out += _mm512_reduce_add_ps(sum);
        }
    }
}

/// The products of the first `N` rows, not yet added up over the lanes.
///
/// # Safety
/// As of [`add_rows`].
#[inline(always)]
unsafe fn sums_of_rows<F: Factors, const N: usize>(
    codes: &[[u8; BYTES]],
    scales: &[[f32; 2]],
    table: F::Table,
    x: &[Chunk<F::Element>],
) -> [__m512; N] {
    let (codes, scales) = (&codes[..N * x.len()], &scales[..N * x.len()]);
    // Fetched in the order of the memory, which is not that of their use: the last row begins early.
    let ahead = codes.as_ptr().cast::<i8>().wrapping_add(AHEAD + (N - 1) * x.len() * BYTES);
    // SAFETY: each of the `N` rows has as many chunks as `x`; the instructions are there. What is fetched ahead
    // need not be.
    unsafe {
        let halves = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
        let mut sums = [_mm512_setzero_ps(); N];
        for (i, x_chunk) in x.iter().enumerate() {
            let mut rows = [_mm512_setzero_si512(); N];
            for (row, register) in rows.iter_mut().enumerate() {
                *register = _mm512_loadu_si512(codes.as_ptr().add(row * x.len() + i).cast());
                _mm_prefetch::<_MM_HINT_T1>(ahead.wrapping_add((i * N + row) * BYTES));
            }
            let products = F::multiply(rows, table, x_chunk);
            for row in 0..N {
                let pair = _mm_load_sd(scales.as_ptr().add(row * x.len() + i).cast());
                let pair = _mm512_castps128_ps512(_mm_castpd_ps(pair));
                let scale = _mm512_permutexvar_ps(halves, pair);
                sums[row] = _mm512_fmadd_ps(products[row], scale, sums[row]);
            }
        }
        sums
    }
}

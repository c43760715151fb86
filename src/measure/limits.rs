//! What this machine can do at best: the scale on which a speed is slow or fast.
//!
//! A limit is the best of several runs of the best implementation at hand, and still a lower bound of what the hardware
//! can do. Measured in a process of its own: the harness stays small.

use anyhow::{Context, Result};
use evalfw_engine::protocol::DeviceLimits;
use evalfw_engine::weights::{DenseData, DenseTensor, Weight};
use evalfw_kernels::level::Factors;
use evalfw_kernels::pages::prefer_huge_pages;
use evalfw_kernels::{HostMatrix, Products};
use half::bf16;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::hint::black_box;
use std::io::{Read, Write};
use std::path::Path;
use std::time::Instant;

/// Of the machine, and of the device that the engine of the cell computes on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Limits {
    pub host: HostLimits,
    /// `None` for an engine on the CPU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<DeviceLimits>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct HostLimits {
    pub threads: usize,
    /// Bytes per second that all threads read from memory.
    pub memory_bytes_per_second: Option<f64>,
    /// f32 operations per second of a product of large matrices, on all threads.
    pub f32_flops: Option<f64>,
    /// The same with factors in bf16; `None` where the CPU has no such instructions, or no faster ones than for f32 or
    /// integers, or evalfw no kernel for them.
    pub bf16_flops: Option<f64>,
    /// The same with factors that are 16-bit integers, where these are the fastest that evalfw has on this CPU.
    pub int16_flops: Option<f64>,
    /// Bytes per second that all threads read from a file that is in the page cache.
    pub page_cache_bytes_per_second: Option<f64>,
    /// The same of a file that is not; `None` where the system does not let go of it.
    pub disk_bytes_per_second: Option<f64>,
}

/// Larger than any cache.
const READ_BYTES: usize = 512 << 20;
const FILE_BYTES: usize = 256 << 20;
const ROUNDS: usize = 7;

/// A limit for people: its name, bytes or operations per second, and the unit of 10^9 of them.
pub type Named = (&'static str, Option<f64>, &'static str);

impl HostLimits {
    pub fn named(&self) -> [Named; 6] {
        [
            ("memory, read", self.memory_bytes_per_second, "GB/s"),
            ("matrix products, f32", self.f32_flops, "GFLOP/s"),
            ("matrix products, bf16", self.bf16_flops, "GFLOP/s"),
            ("matrix products, int16", self.int16_flops, "GFLOP/s"),
            ("file in the page cache, read", self.page_cache_bytes_per_second, "GB/s"),
            ("file on the disk, read", self.disk_bytes_per_second, "GB/s"),
        ]
    }

    /// Takes some seconds. The file is made in `folder`, as a file of the disk that models are on.
    pub fn measure(folder: &Path) -> Result<Self> {
        let (page_cache, disk) = file_rates(folder).with_context(|| folder.display().to_string())?;
        let rounded =
            |factors| (Factors::of(Products::Bf16) == factors).then(|| product_rate(Products::Bf16));
        Ok(Self {
            threads: rayon::current_num_threads(),
            memory_bytes_per_second: Some(memory_rate()),
            f32_flops: Some(gemm_rate().max(product_rate(Products::F32))),
            bf16_flops: rounded(Factors::Bf16),
            int16_flops: rounded(Factors::Int16),
            page_cache_bytes_per_second: Some(page_cache),
            disk_bytes_per_second: disk,
        })
    }
}

/// Seconds of the fastest run.
fn shortest(mut run: impl FnMut()) -> f64 {
    run();
    let time = |_| {
        let start = Instant::now();
        run();
        start.elapsed().as_secs_f64()
    };
    (0..ROUNDS).map(time).fold(f64::INFINITY, f64::min)
}

/// Bytes per second read by all threads, in two orders: each thread a part of its own, and all side by side.
pub fn memory_rate() -> f64 {
    let mut words = Vec::with_capacity(READ_BYTES / size_of::<u64>());
    prefer_huge_pages(words.spare_capacity_mut());
    words.resize(words.capacity(), 1u64);
    let own_part = words.len().div_ceil(rayon::current_num_threads());
    let seconds = [own_part, 1 << 15].map(|part| {
        shortest(|| {
            black_box(words.par_chunks(part).map(sum).reduce(|| 0, u64::wrapping_add));
        })
    });
    (words.len() * size_of::<u64>()) as f64 / seconds[0].min(seconds[1])
}

/// In so many sums that adding up is never what is waited for.
fn sum(words: &[u64]) -> u64 {
    let mut sums = [0u64; 32];
    for chunk in words.chunks_exact(sums.len()) {
        for (sum, word) in sums.iter_mut().zip(chunk) {
            *sum = sum.wrapping_add(*word);
        }
    }
    sums.iter().fold(0, |a, b| a.wrapping_add(*b))
}

/// f32 operations per second of the gemm crate's product that suits every library, on all threads.
pub fn gemm_rate() -> f64 {
    let n = 1024;
    let (a, b, mut out) = (vec![0.5f32; n * n], vec![0.25f32; n * n], vec![0f32; n * n]);
    let rows = n as isize;
    let seconds = shortest(|| {
        let (a, b, out) = (a.as_ptr(), b.as_ptr(), out.as_mut_ptr());
        let all = gemm::Parallelism::Rayon(0);
        // SAFETY: three matrices of n · n elements, row-major.
        unsafe {
            gemm::gemm(
                n, n, n, out, 1, rows, false, a, 1, rows, b, 1, rows, 0.0, 1.0, false, false, false, all,
            );
        }
    });
    black_box(&out);
    2.0 * (n as f64).powi(3) / seconds
}

/// Operations per second of evalfw's own product of 512 rows with a frozen matrix.
fn product_rate(products: Products) -> f64 {
    let (rows, shape) = (512, [2048, 2048]);
    let data = DenseData::Bf16(vec![bf16::from_f32(0.25); shape[0] * shape[1]]);
    let matrix = HostMatrix::new(Weight::Dense(DenseTensor { shape, data }), products);
    let x = vec![0.5f32; rows * shape[1]];
    let seconds = shortest(|| {
        black_box(matrix.product(&x, None));
    });
    2.0 * (rows * shape[0] * shape[1]) as f64 / seconds
}

/// From the page cache and from the disk.
fn file_rates(folder: &Path) -> std::io::Result<(f64, Option<f64>)> {
    std::fs::create_dir_all(folder)?;
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    // No two blocks are alike, so that nothing on the way can leave any out.
    let mut block = vec![0u8; 1 << 20];
    for index in 0..FILE_BYTES / block.len() {
        for (place, byte) in (0usize..).zip(&mut block) {
            *byte = (place.wrapping_mul(2_654_435_761).wrapping_add(index * 97) >> 11) as u8;
        }
        file.write_all(&block)?;
    }
    file.as_file().sync_all()?;
    // Before the page cache is asked, as that fills it.
    let disk = if forget(file.as_file()) {
        let start = Instant::now();
        read_all(file.path())?;
        Some(FILE_BYTES as f64 / start.elapsed().as_secs_f64())
    } else {
        None
    };
    let mut failure = None;
    let seconds = shortest(|| failure = failure.take().or(read_all(file.path()).err()));
    match failure {
        Some(error) => Err(error),
        // What is no slower than the page cache was read from memory after all.
        None => {
            let page_cache = FILE_BYTES as f64 / seconds;
            Ok((page_cache, disk.filter(|disk| *disk < 0.9 * page_cache)))
        }
    }
}

/// All threads, each a part.
fn read_all(path: &Path) -> std::io::Result<()> {
    let part = FILE_BYTES.div_ceil(rayon::current_num_threads());
    (0..FILE_BYTES.div_ceil(part)).into_par_iter().try_for_each(|index| {
        use std::io::{Seek, SeekFrom};
        let mut file = File::open(path)?;
        file.seek(SeekFrom::Start((index * part) as u64))?;
        let mut left = part.min(FILE_BYTES - index * part);
        let mut buffer = vec![0u8; 1 << 20];
        while left > 0 {
            let wanted = left.min(buffer.len());
            file.read_exact(&mut buffer[..wanted])?;
            left -= wanted;
        }
        black_box(&buffer);
        Ok(())
    })
}

/// Drops the file from the page cache; whether that was asked for.
#[cfg(target_os = "linux")]
fn forget(file: &File) -> bool {
    rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed).is_ok()
}

#[cfg(not(target_os = "linux"))]
fn forget(_: &File) -> bool {
    false
}

//! The products that decoding, prefill and training are made of, beside what the machine can do: a product
//! with one vector as a share of the memory's read rate, one with many rows as a share of the f32 matrix
//! rate of the gemm crate.
//!
//!     cargo bench --bench kernels

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use evalfw::measure::limits::{gemm_rate, memory_rate};
use evalfw_engine::nf4::Nf4Tensor;
use evalfw_engine::weights::{DenseData, DenseTensor, Weight};
use evalfw_kernels::{HostMatrix, Products};
use half::bf16;
use std::hint::black_box;
use std::time::Instant;

/// gate_proj and down_proj of Qwen2.5-Coder-0.5B.
const SHAPES: [[usize; 2]; 2] = [[4864, 896], [896, 4864]];
const ROWS: [usize; 2] = [128, 512];

fn nf4(shape: [usize; 2]) -> Weight {
    let values: Vec<f32> = (0..shape[0] * shape[1]).map(|i| (i as f32 * 0.37).sin()).collect();
    Weight::Nf4(Nf4Tensor::quantize(shape, &values))
}

fn median(mut run: impl FnMut()) -> f64 {
    run();
    let time = |_| {
        let start = Instant::now();
        run();
        start.elapsed().as_secs_f64()
    };
    let mut seconds: Vec<f64> = (0..9).map(time).collect();
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}

/// All matrices of some layers, so that none stays in a cache: what decoding reads for one token.
fn vectors(criterion: &mut Criterion) {
    let rate = memory_rate();
    println!("memory read rate: {:.1} GB/s", rate / 1e9);
    let mut group = criterion.benchmark_group("vector");
    let shape = SHAPES[0];
    let dense = |i: usize| {
        let data = DenseData::Bf16(vec![bf16::from_f32(0.01 * (i + 1) as f32); shape[0] * shape[1]]);
        Weight::Dense(DenseTensor { shape, data })
    };
    let bytes_of = |weight: &Weight| match weight {
        Weight::Nf4(tensor) => tensor.bytes(),
        Weight::Dense(tensor) => 2 * tensor.shape[0] * tensor.shape[1],
    };
    for (name, weights, products) in [
        ("nf4", (0..64).map(|_| nf4(shape)).collect::<Vec<_>>(), Products::F32),
        ("nf4, products of bf16", (0..64).map(|_| nf4(shape)).collect(), Products::Bf16),
        ("bf16", (0..32).map(dense).collect(), Products::F32),
    ] {
        let bytes: usize = weights.iter().map(bytes_of).sum();
        let matrices: Vec<_> = weights.into_iter().map(|w| HostMatrix::new(w, products)).collect();
        let x = vec![0.5; shape[1]];
        let mut out = vec![0.0; shape[0]];
        let mut all = || matrices.iter().for_each(|matrix| matrix.add_product(&x, &mut out));
        let share = bytes as f64 / median(&mut all) / rate;
        println!("vector/{name}: {:.0} % of the memory read rate", 100.0 * share);
        group.throughput(Throughput::Bytes(bytes as u64));
        group.bench_function(name, |bench| bench.iter(&mut all));
    }
}

fn matrices(criterion: &mut Criterion) {
    let rate = gemm_rate();
    println!("f32 matrix rate: {:.0} GFLOP/s", rate / 1e9);
    for products in [Products::F32, Products::Bf16] {
        let name = format!("{products:?}").to_lowercase();
        let mut group = criterion.benchmark_group(format!("matrix-{name}"));
        for (shape, rows) in SHAPES.into_iter().flat_map(|shape| ROWS.map(|rows| (shape, rows))) {
            let matrix = HostMatrix::new(nf4(shape), products);
            let x = vec![0.5; rows * shape[1]];
            let y = vec![0.5; rows * shape[0]];
            let operations = 2 * rows * shape[0] * shape[1];
            let id = format!("{}x{}x{rows}", shape[0], shape[1]);
            let share = |seconds: f64| 100.0 * operations as f64 / seconds / rate;
            let forward = share(median(|| drop(black_box(matrix.product(&x, None)))));
            let backward = share(median(|| drop(black_box(matrix.transposed_product(&y)))));
            println!("matrix-{name}/{id}: {forward:.0} % of the f32 matrix rate, backward {backward:.0} %");
            group.throughput(Throughput::Elements(operations as u64));
            group.bench_function(BenchmarkId::new("forward", &id), |bench| {
                bench.iter(|| matrix.product(&x, None));
            });
            group.bench_function(BenchmarkId::new("backward", &id), |bench| {
                bench.iter(|| matrix.transposed_product(&y));
            });
        }
    }
}

criterion_group!(benches, vectors, matrices);
criterion_main!(benches);

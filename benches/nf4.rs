//! The paths that every engine's load goes through: NF4 there and back, and dropout masks.
//!
//! `cargo bench --bench nf4` prints bytes of f32 per second; a copy of the same size stands beside
//! them as this machine's limit.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use evalfw_engine::dropout::MaskKey;
use evalfw_engine::lora::Target;
use evalfw_engine::nf4::Nf4Tensor;
use std::hint::black_box;

/// The gate projection of the 0.5b model: `[4864, 896]`.
const SHAPE: [usize; 2] = [4864, 896];

fn nf4(criterion: &mut Criterion) {
    let elements = SHAPE[0] * SHAPE[1];
    let values: Vec<f32> = (0..elements).map(|i| (i as f32 * 0.618).sin() * 0.05).collect();
    let tensor = Nf4Tensor::quantize(SHAPE, &values);
    let mut out = vec![0.0; elements];

    let mut group = criterion.benchmark_group("nf4");
    group.throughput(Throughput::Bytes(4 * elements as u64));
    group.bench_function("quantize", |b| b.iter(|| Nf4Tensor::quantize(SHAPE, black_box(&values))));
    group.bench_function("dequantize", |b| b.iter(|| tensor.dequantize_into(black_box(&mut out))));
    group.bench_function("copy", |b| b.iter(|| out.copy_from_slice(black_box(&values))));
    group.finish();
}

fn dropout(criterion: &mut Criterion) {
    let key = MaskKey { seed: 1, step: 2, micro_batch: 0, layer: 3, target: Target::Down };
    let mut group = criterion.benchmark_group("dropout mask");
    for tokens in [128, 512] {
        let mut mask = vec![0.0; tokens * SHAPE[0]];
        group.throughput(Throughput::Elements(mask.len() as u64));
        group.bench_function(BenchmarkId::from_parameter(tokens), |b| {
            b.iter(|| key.fill(0.1, black_box(&mut mask)))
        });
    }
    group.finish();
}

criterion_group!(benches, nf4, dropout);
criterion_main!(benches);

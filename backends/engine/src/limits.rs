//! How a device's limits are timed: the same for all frameworks.

use crate::Result;
use std::time::Instant;

/// Side of the square matrices of a product.
pub const SIDE: usize = 4096;
/// Elements of the tensor that is read and written, of 4 bytes each.
pub const ELEMENTS: usize = 1 << 26;

const ROUNDS: usize = 7;
/// Started one after the other before the device is waited for, so that starting them is not what is timed.
const AT_ONCE: usize = 4;

/// Seconds of one run of `work`, the shortest of some: a limit is what is possible, not what is usual. `wait` returns
/// when the device has finished.
pub fn shortest(mut work: impl FnMut() -> Result<()>, mut wait: impl FnMut() -> Result<()>) -> Result<f64> {
    work()?;
    wait()?;
    let mut shortest = f64::INFINITY;
    for _ in 0..ROUNDS {
        let start = Instant::now();
        for _ in 0..AT_ONCE {
            work()?;
        }
        wait()?;
        shortest = shortest.min(start.elapsed().as_secs_f64() / AT_ONCE as f64);
    }
    Ok(shortest)
}

/// Operations per second of a product of two square matrices that took so long.
pub fn flops(seconds: f64) -> f64 {
    2.0 * (SIDE as f64).powi(3) / seconds
}

/// Bytes per second of reading and writing the tensor once.
pub fn bytes_per_second(seconds: f64) -> f64 {
    (2 * ELEMENTS * size_of::<f32>()) as f64 / seconds
}

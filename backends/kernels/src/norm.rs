//! Root mean square layer normalisation (Zhang and Sennrich 2019) with a frozen weight, `[width]`: row by row
//! `x / sqrt(mean(x²) + eps) · weight`.

use crate::dot;
use crate::filled::filled;

pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    filled(x.len(), weight.len(), |start, out| {
        let x = &x[start..start + out.len()];
        let inverse = inverse(x, eps);
        for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
            *out = x * inverse * weight;
        }
    })
}

/// The gradient of `x` from that of the result.
pub fn rms_norm_gradient(x: &[f32], weight: &[f32], eps: f32, grad: &[f32]) -> Vec<f32> {
    let width = weight.len();
    filled(x.len(), width, |start, out| {
        let x = &x[start..start + width];
        let inverse = inverse(x, eps);
        for ((out, grad), weight) in out.iter_mut().zip(&grad[start..]).zip(weight) {
            *out = grad * weight;
        }
        let along = dot(out, x) * inverse * inverse / width as f32;
        for (out, x) in out.iter_mut().zip(x) {
            *out = inverse * (*out - along * x);
        }
    })
}

fn inverse(x: &[f32], eps: f32) -> f32 {
    1.0 / (dot(x, x) / x.len() as f32 + eps).sqrt()
}

//! Rotary position tables in f32, in the half-split form that Qwen2 uses.

/// `cos` and `sin`, each row-major `[positions, head_dim / 2]`, for the positions from `start`.
///
/// Angles are computed in f64: in bf16 the cosine of a late position can have the wrong sign.
pub fn tables(theta: f64, head_dim: usize, start: usize, positions: usize) -> (Vec<f32>, Vec<f32>) {
    let half = head_dim / 2;
    let mut cos = Vec::with_capacity(positions * half);
    let mut sin = Vec::with_capacity(positions * half);
    for position in start..start + positions {
        for pair in 0..half {
            let frequency = theta.powf(-2.0 * pair as f64 / head_dim as f64);
            let angle = position as f64 * frequency;
            cos.push(angle.cos() as f32);
            sin.push(angle.sin() as f32);
        }
    }
    (cos, sin)
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_later_start_is_a_window_of_the_same_table() {
        let (cos, sin) = super::tables(1e6, 8, 0, 10);
        let (cos_late, sin_late) = super::tables(1e6, 8, 6, 2);
        assert_eq!(&cos[24..32], &cos_late[..]);
        assert_eq!(&sin[24..32], &sin_late[..]);
        assert_eq!(cos[0..4], [1.0; 4]);
    }
}

//! Deviations between what an engine says and what the reference says.

use evalfw_engine::lora::AdapterTensors;

/// A deviation and where it is.
pub struct Deviation {
    pub value: f64,
    pub place: String,
}

impl Deviation {
    pub fn new(value: f64, place: impl Into<String>) -> Self {
        // NaN compares with nothing; here it is as far off as can be.
        let value = if value.is_nan() { f64::INFINITY } else { value };
        Self { value, place: place.into() }
    }

    /// The largest of several; a comparison of nothing is no pass.
    pub fn largest(all: impl IntoIterator<Item = Self>) -> Self {
        let largest = all.into_iter().max_by(|a, b| a.value.total_cmp(&b.value));
        largest.unwrap_or_else(|| Self::new(f64::INFINITY, "nothing was compared"))
    }
}

/// The largest difference over the largest reference value.
pub fn relative_to_largest(got: &[f32], expected: &[f32]) -> f64 {
    if got.len() != expected.len() {
        return f64::INFINITY;
    }
    let mut difference = 0f64;
    let mut largest = 0f64;
    for (got, expected) in got.iter().zip(expected) {
        let distance = (f64::from(*got) - f64::from(*expected)).abs();
        difference = if distance.is_nan() { f64::INFINITY } else { difference.max(distance) };
        largest = largest.max(f64::from(expected.abs()));
    }
    difference / largest.max(f64::MIN_POSITIVE)
}

pub fn relative(got: f64, expected: f64) -> f64 {
    (got - expected).abs() / expected.abs().max(f64::MIN_POSITIVE)
}

/// L2 norm of the difference over that of the reference, for each factor of each projection.
pub fn tensors(got: &AdapterTensors, expected: &AdapterTensors) -> Deviation {
    let mut all = Vec::new();
    for ((layer, target), expected) in expected {
        let Some(got) = got.get(&(*layer, *target)) else {
            return Deviation::new(f64::INFINITY, format!("no {} of layer {layer}", target.module()));
        };
        for (factor, got, expected) in [('A', &got.a, &expected.a), ('B', &got.b, &expected.b)] {
            let place = format!("lora_{factor} of {} of layer {layer}", target.module());
            all.push(Deviation::new(relative_norm(got, expected), place));
        }
    }
    Deviation::largest(all)
}

/// L2 norm of the difference of all factors together over that of all of `expected`: for two runs of one
/// engine, where a small tensor may differ by the order of a sum.
pub fn whole(got: &AdapterTensors, expected: &AdapterTensors) -> Deviation {
    let flat =
        |tensors: &AdapterTensors| tensors.values().flat_map(|p| [&p.a, &p.b]).flatten().copied().collect();
    let (got, expected): (Vec<f32>, Vec<f32>) = (flat(got), flat(expected));
    Deviation::new(relative_norm(&got, &expected), "all adapter gradients together")
}

/// L2 norm of the difference over that of `expected`.
pub fn relative_norm(got: &[f32], expected: &[f32]) -> f64 {
    if got.len() != expected.len() {
        return f64::INFINITY;
    }
    let square = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>();
    let difference = square(&mut got.iter().zip(expected).map(|(a, b)| f64::from(*a) - f64::from(*b)));
    (difference / square(&mut expected.iter().map(|v| f64::from(*v))).max(f64::MIN_POSITIVE)).sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nan_and_missing_values_are_never_close() {
        assert_eq!(relative_to_largest(&[f32::NAN, 1.0], &[1.0, 1.0]), f64::INFINITY);
        assert_eq!(relative_to_largest(&[1.0], &[1.0, 1.0]), f64::INFINITY);
        assert_eq!(Deviation::largest([]).value, f64::INFINITY);
        assert_eq!(Deviation::new(f64::NAN, "").value, f64::INFINITY);
        assert!((relative_to_largest(&[1.0, 1.9], &[1.0, 2.0]) - 0.05).abs() < 1e-7);
    }
}

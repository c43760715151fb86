//! Softmax of one row, in place.

/// Replaces `row` by its exponentials less the maximum and returns (maximum, their sum).
pub fn exponentials(row: &mut [f32]) -> (f32, f64) {
    let max = row.iter().fold(f32::NEG_INFINITY, |max, &v| max.max(v));
    let mut sum = 0.0;
    // A vocabulary is too long to be summed in f32 alone.
    for part in row.chunks_mut(256) {
        let mut of_part = 0.0;
        for value in part {
            *value = (*value - max).exp();
            of_part += *value;
        }
        sum += f64::from(of_part);
    }
    (max, sum)
}

pub fn softmax(row: &mut [f32]) {
    let (_, sum) = exponentials(row);
    let factor = (1.0 / sum) as f32;
    for value in row {
        *value *= factor;
    }
}

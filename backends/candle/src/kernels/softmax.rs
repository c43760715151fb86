//! Softmax of one row, in place.

use evalfw_kernels::elementwise::exponentials;

pub fn softmax(row: &mut [f32]) {
    let (_, sum) = exponentials(row);
    let factor = (1.0 / sum) as f32;
    for value in row {
        *value *= factor;
    }
}

//! Matrix products through the gemm crate, with its bounds checked.

use gemm::Parallelism;

/// A matrix in borrowed memory: element (i, j) is `data[i * row_stride + j * col_stride]`.
#[derive(Clone, Copy)]
pub struct View<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> View<'a> {
    /// A row-major matrix that fills `data`.
    pub fn new(data: &'a [f32], cols: usize) -> Self {
        Self { data, rows: data.len() / cols, cols, row_stride: cols, col_stride: 1 }
    }

    /// Rows that lie `row_stride` apart.
    pub fn strided(data: &'a [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        Self { data, rows, cols, row_stride, col_stride: 1 }
    }

    pub fn height(&self) -> usize {
        self.rows
    }

    /// The rows from `start`.
    pub fn rows(self, start: usize, rows: usize) -> Self {
        assert!(start + rows <= self.rows);
        Self { data: &self.data[start * self.row_stride..], rows, ..self }
    }

    /// The transpose, without a copy.
    pub fn t(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }
}

/// A matrix to write to; its elements in a row are neighbours.
pub struct ViewMut<'a> {
    data: &'a mut [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
}

impl<'a> ViewMut<'a> {
    pub fn new(data: &'a mut [f32], cols: usize) -> Self {
        Self { rows: data.len() / cols, data, cols, row_stride: cols }
    }
}

#[derive(Clone, Copy)]
pub enum Threads {
    One,
    All,
}

/// `out += factor · a · b`
pub fn add_product(out: ViewMut<'_>, factor: f32, a: View<'_>, b: View<'_>, threads: Threads) {
    multiply(out, true, factor, (a, b), threads);
}

/// `out = factor · a · b`, whatever was there.
pub fn put_product(out: ViewMut<'_>, factor: f32, a: View<'_>, b: View<'_>, threads: Threads) {
    multiply(out, false, factor, (a, b), threads);
}

fn multiply(out: ViewMut<'_>, add: bool, factor: f32, (a, b): (View<'_>, View<'_>), threads: Threads) {
    assert!(out.rows == a.rows && a.cols == b.rows && out.cols == b.cols, "shapes do not fit");
    if out.rows == 0 || out.cols == 0 {
        return;
    }
    if a.cols == 0 {
        // An empty sum.
        if !add {
            out.data.chunks_mut(out.row_stride).for_each(|row| row[..out.cols].fill(0.0));
        }
        return;
    }
    let reach = |rows, cols, row_stride, col_stride| (rows - 1) * row_stride + (cols - 1) * col_stride;
    assert!(reach(a.rows, a.cols, a.row_stride, a.col_stride) < a.data.len());
    assert!(reach(b.rows, b.cols, b.row_stride, b.col_stride) < b.data.len());
    assert!(reach(out.rows, out.cols, out.row_stride, 1) < out.data.len());
    assert!(out.row_stride >= out.cols);
    let parallelism = match threads {
        Threads::One => Parallelism::None,
        Threads::All => Parallelism::Rayon(0),
    };
    // SAFETY: the largest offset into each matrix was checked above, no two elements of `out` share a
    // place, and the borrows rule out that `out` overlaps `a` or `b`.
    unsafe {
        gemm::gemm(
            out.rows,
            out.cols,
            a.cols,
            out.data.as_mut_ptr(),
            1,
            out.row_stride as isize,
            add,
            a.data.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            1.0,
            factor,
            false,
            false,
            false,
            parallelism,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adds_a_scaled_product() {
        let a = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        let b = [1.0, 0.0, 2.0, -1.0, 0.5, 1.0];
        let mut out = vec![1.0; 2 * 2];
        // a [2, 3] times the transpose of b [2, 3].
        add_product(ViewMut::new(&mut out, 2), 2.0, View::new(&a, 3), View::new(&b, 3).t(), Threads::All);
        assert_eq!(out, [15.0, 7.0, 33.0, 10.0]);
        put_product(ViewMut::new(&mut out, 2), 1.0, View::new(&a, 3), View::new(&b, 3).t(), Threads::All);
        assert_eq!(out, [7.0, 3.0, 16.0, 4.5]);
    }

    #[test]
    #[should_panic(expected = "shapes do not fit")]
    fn shapes_that_do_not_fit_are_refused() {
        let mut out = [0.0; 4];
        add_product(
            ViewMut::new(&mut out, 2),
            1.0,
            View::new(&[0.0; 6], 3),
            View::new(&[0.0; 4], 2),
            Threads::One,
        );
    }
}

//! New memory, written by all threads: the C library would clear it on one, while the others wait.

use rayon::prelude::*;
use std::mem::MaybeUninit;

/// Elements that one thread takes at a time: 64 KiB of f32, which stays in L2.
pub const PIECE: usize = 16 * 1024;

/// `len` elements. `fill(start, piece)` gets pieces of `size` elements, the last one perhaps shorter, with
/// the default in all of them.
pub fn filled<T: Copy + Default + Send>(
    len: usize,
    size: usize,
    fill: impl Fn(usize, &mut [T]) + Sync,
) -> Vec<T> {
    let mut out = Vec::with_capacity(len);
    let pieces = out.spare_capacity_mut()[..len].par_chunks_mut(size).enumerate();
    pieces.for_each(|(i, piece): (usize, &mut [MaybeUninit<T>])| {
        piece.fill(MaybeUninit::new(T::default()));
        // SAFETY: every element of the piece has just been written.
        fill(i * size, unsafe { &mut *(std::ptr::from_mut(piece) as *mut [T]) });
    });
    // SAFETY: the pieces are all of the first `len` elements.
    unsafe { out.set_len(len) };
    out
}

/// `len` zeros.
pub fn zeros(len: usize) -> Vec<f32> {
    filled(len, PIECE, |_, _| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_element_is_there_once() {
        for len in [0, 1, 6, 7, 8, 50] {
            let out = filled(len, 7, |start, piece: &mut [usize]| {
                assert!(piece.iter().all(|&value| value == 0));
                for (i, value) in piece.iter_mut().enumerate() {
                    *value = start + i + 1;
                }
            });
            assert_eq!(out, (1..=len).collect::<Vec<_>>());
        }
    }
}

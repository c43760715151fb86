//! Memory in large pages: a matrix that is read once from end to end else waits for the address of every 4 KiB.

/// Asks for large pages for memory that has not been written yet. It is a wish: nothing depends on it but time.
pub fn prefer_huge_pages<T>(memory: &mut [T]) {
    #[cfg(target_os = "linux")]
    {
        /// Advice is for whole pages; every size in use divides this one.
        const PAGE: usize = 1 << 16;
        let range = memory.as_mut_ptr_range();
        let (start, end) = (range.start.addr().next_multiple_of(PAGE), range.end.addr() / PAGE * PAGE);
        if start < end {
            // SAFETY: the pages lie within the memory, and the advice changes nothing that is in them.
            unsafe { libc::madvise(range.start.with_addr(start).cast(), end - start, libc::MADV_HUGEPAGE) };
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = memory;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_memory_stays_as_it_is() {
        for len in [0, 1, 5_000_000] {
            let mut memory = vec![7u8; len];
            prefer_huge_pages(&mut memory);
            assert!(memory.iter().all(|&value| value == 7));
        }
    }
}

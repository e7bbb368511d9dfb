//! Memory of whole tensors: what the allocator keeps, and how zeros and copies are made.

use std::{mem::MaybeUninit, ops::Range};

use rayon::prelude::*;

pub use crate::scratch::scratch_bytes;

/// Lets the allocator keep large blocks that are freed, for the whole process. A training step frees what the next one asks
/// for again; from the system such memory would come as fresh pages each time, a tenth of a step's time. Only glibc is told.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        /// What is asked of the system at a time, so that the heap rarely grows.
        const GROWTH: i32 = 16 << 20;
        // One arena, because blocks above 64 MiB of other arenas come from the system in any case.
        let settings =
            [(libc::M_ARENA_MAX, 1), (libc::M_MMAP_THRESHOLD, i32::MAX), (libc::M_TRIM_THRESHOLD, i32::MAX), (libc::M_TOP_PAD, GROWTH)];
        for (parameter, value) in settings {
            // SAFETY: two integers; what the library does not know it refuses.
            unsafe { libc::mallopt(parameter, value) };
        }
    }
}

/// Numbers that tasks write part by part: zeros for all first would go through memory twice.
pub(crate) struct Parts<T = f32> {
    numbers: Vec<T>,
    start: *mut T,
    len: usize,
}

// SAFETY: tasks write to disjoint parts, as every way to a part asks of them.
unsafe impl<T: Send> Sync for Parts<T> {}

impl<T: bytemuck::Zeroable> Parts<T> {
    /// Room for `len` numbers.
    pub(crate) fn new(len: usize) -> Self {
        let mut numbers = Vec::with_capacity(len);
        Self { start: numbers.as_mut_ptr(), numbers, len }
    }

    /// A part, to be written.
    ///
    /// # Safety
    /// Nobody else may have elements of this part while the result lives, and all of it must be written before [`Self::finish`].
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn unwritten(&self, part: Range<usize>) -> &mut [MaybeUninit<T>] {
        assert!(part.start <= part.end && part.end <= self.len);
        // SAFETY: the part lies within the vector's room, and the caller has it alone.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(part.start).cast(), part.len()) }
    }

    /// A part, of zeros, in the cache of the core that goes on with it.
    ///
    /// # Safety
    /// Nobody else may have elements of this part while the result lives.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn zeroed(&self, part: Range<usize>) -> &mut [T] {
        assert!(part.start <= part.end && part.end <= self.len);
        // SAFETY: the part lies within the vector's room, all of it is written before it is a slice, and the caller has it alone.
        unsafe {
            let start = self.start.add(part.start);
            start.write_bytes(0, part.len());
            std::slice::from_raw_parts_mut(start, part.len())
        }
    }

    /// A part, copied from elsewhere.
    ///
    /// # Safety
    /// As for [`Self::zeroed`].
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn copied(&self, start: usize, from: &[T]) -> &mut [T]
    where
        T: Copy,
    {
        assert!(start <= self.len && from.len() <= self.len - start);
        // SAFETY: as in `zeroed`; the source is a slice, which nothing that is written to can be.
        unsafe {
            let start = self.start.add(start);
            start.copy_from_nonoverlapping(from.as_ptr(), from.len());
            std::slice::from_raw_parts_mut(start, from.len())
        }
    }

    /// All of them.
    ///
    /// # Safety
    /// Every element must have been in a part, and been written.
    pub(crate) unsafe fn finish(mut self) -> Vec<T> {
        // SAFETY: as the caller promises.
        unsafe { self.numbers.set_len(self.len) };
        self.numbers
    }
}

/// Elements per parallel task, and below which threads cost more than they save.
const BLOCK: usize = 1 << 15;

/// `len` zeros. Large ones are written by all threads: one alone would keep the others waiting.
pub fn zeros(len: usize) -> Vec<f32> {
    if len <= BLOCK { vec![0.0; len] } else { filled(len, |_, part| part.fill(MaybeUninit::new(0.0))) }
}

/// The same numbers again, copied by all threads.
pub fn copied(from: &[f32]) -> Vec<f32> {
    if from.len() <= BLOCK {
        return from.to_vec();
    }
    filled(from.len(), |start, part| {
        part.write_copy_of_slice(&from[start..start + part.len()]);
    })
}

/// `len` numbers, each of which `fill` writes: it gets the parts of the result and where each begins.
fn filled(len: usize, fill: impl Fn(usize, &mut [MaybeUninit<f32>]) + Sync) -> Vec<f32> {
    let mut numbers = Vec::with_capacity(len);
    let room = &mut numbers.spare_capacity_mut()[..len];
    room.par_chunks_mut(BLOCK).enumerate().for_each(|(block, part)| fill(block * BLOCK, part));
    // SAFETY: both uses of this function fill all of each part.
    unsafe { numbers.set_len(len) };
    numbers
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_ones_are_what_small_ones_are() {
        for len in [0, 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7] {
            assert_eq!(zeros(len), vec![0.0; len]);
            let numbers: Vec<f32> = (0..len).map(|i| i as f32).collect();
            assert_eq!(copied(&numbers), numbers);
        }
    }
}

//! Memory of whole tensors: what the allocator keeps, and how zeros and copies are made.

use std::mem::MaybeUninit;

use rayon::prelude::*;

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

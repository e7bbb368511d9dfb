//! The process's allocator.

use std::alloc::{GlobalAlloc, Layout, System};

use mimalloc::MiMalloc;

/// Keeps small blocks and large ones apart. Threads that tokenise ask for small ones and free them millions of times a second: those come
/// from mimalloc, where each thread has its own. Large ones are tensors, of which a training step frees what the next one asks for again:
/// those come from the system's allocator, which [`crate::memory::keep_freed_memory`] tells to keep them, in one place for all threads.
pub struct Allocator;

/// Bytes of a large block, at least.
const LARGE: usize = 64 << 10;
/// Bytes of a line of the cache. Large blocks begin with one: a vector that lies across two takes two loads, and where all do, products
/// of few rows take a quarter longer.
const LINE: usize = 64;

fn is_small(size: usize) -> bool {
    size < LARGE
}

/// The layout of a large block.
fn large(layout: Layout) -> Layout {
    // What is too large to be aligned is too large to be had.
    layout.align_to(LINE).unwrap_or(layout)
}

// SAFETY: both allocators keep the contract, and a block goes back to the one that its size says it came from.
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as the caller promises.
        unsafe { if is_small(layout.size()) { MiMalloc.alloc(layout) } else { System.alloc(large(layout)) } }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        // SAFETY: as the caller promises.
        unsafe { if is_small(layout.size()) { MiMalloc.alloc_zeroed(layout) } else { System.alloc_zeroed(large(layout)) } }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: as the caller promises; the size says whose block it is.
        unsafe { if is_small(layout.size()) { MiMalloc.dealloc(block, layout) } else { System.dealloc(block, large(layout)) } }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        // SAFETY: as the caller promises: the new size makes a layout with the old alignment, and both blocks have the bytes that are copied.
        unsafe {
            match (is_small(layout.size()), is_small(new_size)) {
                (true, true) => MiMalloc.realloc(block, layout, new_size),
                (false, false) => System.realloc(block, large(layout), new_size),
                _ => {
                    let new = self.alloc(Layout::from_size_align_unchecked(new_size, layout.align()));
                    if !new.is_null() {
                        new.copy_from_nonoverlapping(block, layout.size().min(new_size));
                        self.dealloc(block, layout);
                    }
                    new
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Blocks that grow and shrink across the boundary keep what they hold and where they are aligned.
    #[test]
    fn blocks_move_between_the_allocators_whole() {
        for align in [1, 16, 64, 4096] {
            let mut size = 100;
            let layout = |size: usize| Layout::from_size_align(size, align).unwrap();
            // SAFETY: each block is used within its size, and freed once with its layout.
            unsafe {
                let mut block = Allocator.alloc_zeroed(layout(size));
                assert_eq!(*block.add(size - 1), 0);
                for (number, next) in [LARGE - 1, LARGE, 3 * LARGE, LARGE + 1, LARGE - 1, 50].into_iter().enumerate() {
                    let kept = size.min(next);
                    (0..size).for_each(|at| *block.add(at) = (at + number) as u8);
                    block = Allocator.realloc(block, layout(size), next);
                    size = next;
                    assert!((0..kept).all(|at| *block.add(at) == (at + number) as u8));
                    assert!(block.addr().is_multiple_of(if is_small(size) { align } else { align.max(LINE) }));
                }
                Allocator.dealloc(block, layout(size));
            }
        }
    }
}

//! Scratch memory that outlives a call: fresh pages for each would cost as much as small products.

use std::cell::Cell;

thread_local! {
    static MEMORY: Cell<Vec<f32>> = const { Cell::new(Vec::new()) };
}

/// Runs `work` with `len` numbers of any value. A call within `work` on the same thread (one that the pool put there while it
/// waited) gets memory of its own.
pub(crate) fn with_scratch<T>(len: usize, work: impl FnOnce(&mut [f32]) -> T) -> T {
    let mut memory = MEMORY.take();
    if memory.len() < len {
        memory.resize(len, 0.0);
    }
    let result = work(&mut memory[..len]);
    MEMORY.set(memory);
    result
}

//! Scratch memory that outlives a product: fresh pages for each would cost as much as packing.

use std::{cell::Cell, thread::LocalKey};

/// Memory aligned as tiles like it.
#[derive(Default)]
pub(super) struct Buffer(Vec<Line>);

#[derive(Clone, Copy, bytemuck::Zeroable, bytemuck::Pod)]
#[repr(C, align(64))]
pub(super) struct Line([u16; LINE]);

/// Numbers of a line.
pub(super) const LINE: usize = 32;

thread_local! {
    pub(super) static LEFT: Cell<Buffer> = const { Cell::new(Buffer(Vec::new())) };
    pub(super) static RIGHT: Cell<Buffer> = const { Cell::new(Buffer(Vec::new())) };
}

/// Runs `work` with `len` numbers. A call within `work` on the same thread (one that the pool put there while it waited) gets
/// memory of its own.
pub(super) fn with_buffer<T>(buffer: &'static LocalKey<Cell<Buffer>>, len: usize, work: impl FnOnce(&mut [u16]) -> T) -> T {
    let mut memory = buffer.take();
    let lines = len.div_ceil(LINE);
    if memory.0.len() < lines {
        memory.0.resize(lines, Line([0; LINE]));
    }
    let result = work(&mut bytemuck::cast_slice_mut::<Line, u16>(&mut memory.0)[..len]);
    buffer.set(memory);
    result
}

//! Scratch memory that outlives a call: fresh pages for each would cost as much as small products, and zeros a good part of it.

use std::{
    cell::RefCell,
    marker::PhantomData,
    mem::MaybeUninit,
    ops::{Deref, DerefMut},
    sync::atomic::{AtomicUsize, Ordering::Relaxed},
};

/// A line of the cache, as processors like to load it.
#[derive(Clone, Copy, bytemuck::Zeroable, bytemuck::Pod)]
#[repr(C, align(64))]
pub(crate) struct Line([u8; 64]);

/// Buffers that a thread keeps, and the lines of the largest that it keeps (4 MiB).
const KEPT: usize = 12;
const KEPT_LINES: usize = 1 << 16;

/// Bytes of all scratch that is in use or kept.
static BYTES: AtomicUsize = AtomicUsize::new(0);

/// Bytes of scratch that threads use or keep: some megabytes each, whatever the model.
pub fn scratch_bytes() -> usize {
    BYTES.load(Relaxed)
}

thread_local! {
    static FREE: RefCell<Vec<Vec<Line>>> = const { RefCell::new(Vec::new()) };
}

/// Numbers of any value. Dropped, they are the thread's next scratch.
pub(crate) struct Scratch<T: bytemuck::Pod> {
    lines: Vec<Line>,
    len: usize,
    numbers: PhantomData<T>,
}

impl<T: bytemuck::Pod> Scratch<T> {
    /// The numbers as places to be written.
    ///
    /// # Safety
    /// Only numbers may be written there: they are read again as such.
    pub(crate) unsafe fn places(&mut self) -> &mut [MaybeUninit<T>] {
        let numbers: &mut [T] = self;
        // SAFETY: the same layout; the caller writes numbers.
        unsafe { std::slice::from_raw_parts_mut(numbers.as_mut_ptr().cast(), numbers.len()) }
    }
}

/// `len` numbers of any value.
pub(crate) fn scratch<T: bytemuck::Pod>(len: usize) -> Scratch<T> {
    let needed = (len * size_of::<T>()).div_ceil(size_of::<Line>());
    // The smallest that is large enough: taking any would make all of them as large as the largest.
    let free = FREE.try_with(|free| {
        let mut free = free.borrow_mut();
        let fitting = free.iter().enumerate().filter(|(_, lines)| lines.len() >= needed).min_by_key(|(_, lines)| lines.len());
        fitting.map(|(index, _)| index).map(|index| free.swap_remove(index))
    });
    let lines = free.ok().flatten().unwrap_or_else(|| {
        BYTES.fetch_add(needed * size_of::<Line>(), Relaxed);
        vec![Line([0; 64]); needed]
    });
    Scratch { lines, len, numbers: PhantomData }
}

impl<T: bytemuck::Pod> Deref for Scratch<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &bytemuck::cast_slice(&self.lines)[..self.len]
    }
}

impl<T: bytemuck::Pod> DerefMut for Scratch<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut bytemuck::cast_slice_mut(&mut self.lines)[..self.len]
    }
}

impl<T: bytemuck::Pod> Drop for Scratch<T> {
    fn drop(&mut self) {
        let lines = std::mem::take(&mut self.lines);
        let mut freed = size_of_val(&lines[..]);
        if lines.len() <= KEPT_LINES {
            // At a thread's end there is nowhere to put it: it is freed.
            let _ = FREE.try_with(|free| {
                let mut free = free.borrow_mut();
                free.push(lines);
                // What was not used for longest goes first.
                freed = if free.len() > KEPT { size_of_val(&free.remove(0)[..]) } else { 0 };
            });
        }
        BYTES.fetch_sub(freed, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_in_use_are_never_shared() {
        let (mut a, mut b) = (scratch::<f32>(100), scratch::<u16>(1000));
        a.fill(1.0);
        b.fill(7);
        drop(scratch::<f32>(5000));
        assert!(a.len() == 100 && a.iter().all(|value| *value == 1.0));
        assert!(b.len() == 1000 && b.iter().all(|value| *value == 7));
        assert_eq!(a.as_ptr().addr() % 64, 0);
    }
}

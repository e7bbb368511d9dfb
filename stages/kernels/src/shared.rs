//! A slice that several tasks write to at once.

use std::marker::PhantomData;

/// A slice that tasks write to at places that never overlap.
#[derive(Clone, Copy)]
pub(crate) struct Shared<'a> {
    start: *mut f32,
    len: usize,
    marker: PhantomData<&'a mut [f32]>,
}

// SAFETY: tasks write to disjoint columns (heads), rows (sequences) or tiles, as each use says.
unsafe impl Send for Shared<'_> {}
unsafe impl Sync for Shared<'_> {}

impl<'a> Shared<'a> {
    pub(crate) fn new(slice: &'a mut [f32]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), marker: PhantomData }
    }

    /// # Safety
    /// No other task may touch, while the result lives, the elements that the caller touches.
    #[allow(clippy::mut_from_ref)]
    pub(crate) unsafe fn from(&self, offset: usize) -> &'a mut [f32] {
        assert!(offset <= self.len);
        unsafe { std::slice::from_raw_parts_mut(self.start.add(offset), self.len - offset) }
    }
}

//! Rows that a backward pass reads again, in the number format of the products around them.

use std::{mem::MaybeUninit, ops::Range};

use rayon::prelude::*;

use crate::{
    bf16::{round, widen},
    matmul::Arithmetic,
    memory::Parts,
    simd::multiversion,
};

/// Rows, saved.
#[derive(Debug, Clone)]
pub(crate) enum Saved {
    F32(Vec<f32>),
    Bf16(Vec<u16>),
}

/// Rows that tasks are about to save.
pub(crate) enum Saving {
    F32(Parts),
    Bf16(Parts<u16>),
}

impl Saving {
    /// Room for `len` numbers.
    pub(crate) fn new(len: usize, arithmetic: Arithmetic) -> Self {
        match arithmetic {
            Arithmetic::F32 => Self::F32(Parts::new(len)),
            Arithmetic::Bf16 => Self::Bf16(Parts::new(len)),
        }
    }

    /// Saves rows, each of which begins at `first` or a multiple of `row_stride` further on. They become what is saved.
    ///
    /// # Safety
    /// No other task may save the same elements.
    pub(crate) unsafe fn put(&self, rows: &mut [f32], width: usize, first: usize, row_stride: usize) {
        rows.par_chunks_mut(width).enumerate().with_min_len(32).for_each(|(row, from)| {
            let at = first + row * row_stride;
            // SAFETY: as the caller promises.
            unsafe {
                match self {
                    Self::F32(parts) => _ = parts.copied(at, from),
                    Self::Bf16(parts) => round_row(parts.unwritten(at..at + width), from),
                }
            }
        });
    }

    /// # Safety
    /// Every element must have been put.
    pub(crate) unsafe fn finish(self) -> Saved {
        // SAFETY: as the caller promises.
        unsafe {
            match self {
                Self::F32(parts) => Saved::F32(parts.finish()),
                Self::Bf16(parts) => Saved::Bf16(parts.finish()),
            }
        }
    }
}

impl Saved {
    /// Bytes held.
    pub(crate) fn size_bytes(&self) -> usize {
        match self {
            Self::F32(numbers) => size_of_val(&numbers[..]),
            Self::Bf16(numbers) => size_of_val(&numbers[..]),
        }
    }

    /// Reads what stands at `at`.
    pub(crate) fn read(&self, to: &mut [f32], at: Range<usize>) {
        match self {
            Self::F32(numbers) => to.copy_from_slice(&numbers[at]),
            Self::Bf16(numbers) => widen_row(to, &numbers[at]),
        }
    }
}

multiversion!(fn round_row(narrow: &mut [MaybeUninit<u16>], wide: &mut [f32]) = round_row_inner);

#[inline(always)]
fn round_row_inner<const FMA: bool>(narrow: &mut [MaybeUninit<u16>], wide: &mut [f32]) {
    for (narrow, wide) in narrow.iter_mut().zip(wide) {
        *wide = widen(*narrow.write(round(*wide)));
    }
}

multiversion!(fn widen_row(wide: &mut [f32], narrow: &[u16]) = widen_row_inner);

#[inline(always)]
fn widen_row_inner<const FMA: bool>(wide: &mut [f32], narrow: &[u16]) {
    for (wide, narrow) in wide.iter_mut().zip(narrow) {
        *wide = widen(*narrow);
    }
}

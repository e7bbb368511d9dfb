//! A weight as the model holds it.

use std::{borrow::Cow, ops::Range};

use half::bf16;

use crate::{bf16::widen_all, matmul::Arithmetic, operand::tile_kernel};

/// A weight as it is held.
#[derive(Debug, Clone, Copy)]
pub enum Weight<'a> {
    /// In f32.
    F32(&'a [f32]),
    /// In bfloat16.
    Bf16(&'a [bf16]),
}

impl<'a> From<&'a [f32]> for Weight<'a> {
    fn from(elements: &'a [f32]) -> Self {
        Self::F32(elements)
    }
}

impl<'a> Weight<'a> {
    /// Number of elements.
    pub fn len(self) -> usize {
        match self {
            Self::F32(elements) => elements.len(),
            Self::Bf16(elements) => elements.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }

    /// As f32: itself or a copy.
    pub fn wide(self) -> Cow<'a, [f32]> {
        match self {
            Self::F32(elements) => elements.into(),
            Self::Bf16(elements) => widen_all(elements).into(),
        }
    }

    /// What is f32 in every model: norms, biases, factors of adapters.
    ///
    /// # Panics
    /// If it is something else.
    pub(crate) fn plain(self) -> &'a [f32] {
        match self {
            Self::F32(elements) => elements,
            Self::Bf16(_) => panic!("norms, biases and factors are held as f32"),
        }
    }

    /// Some rows of `width` elements.
    pub(crate) fn rows(self, rows: &Range<usize>, width: usize) -> Self {
        let elements = rows.start * width..rows.end * width;
        match self {
            Self::F32(all) => Self::F32(&all[elements]),
            Self::Bf16(all) => Self::Bf16(&all[elements]),
        }
    }
}

/// Whether products in this arithmetic read weights in bfloat16 as they are; otherwise they widen them first, all at once.
pub fn reads_narrow_weights(arithmetic: Arithmetic) -> bool {
    tile_kernel(arithmetic).is_some()
}

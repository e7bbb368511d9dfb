//! In the place of [`panels`](crate::panels) on processors that have no AVX-512.

use std::ops::Range;

use crate::matmul::{Into, MatrixRef};

pub(crate) const ROWS: usize = 1;

pub(crate) enum Panels {}

impl Panels {
    pub(crate) fn new(_: MatrixRef<'_>) -> Self {
        unreachable!("this processor has no AVX-512")
    }

    pub(crate) fn multiply(&self, _: &mut [f32], _: usize, _: &PackedRows, _: Range<usize>, _: Range<usize>, _: Into) {
        match *self {}
    }
}

pub(crate) enum PackedRows {}

impl PackedRows {
    pub(crate) fn new(_: MatrixRef<'_>) -> Self {
        unreachable!("this processor has no AVX-512")
    }
}

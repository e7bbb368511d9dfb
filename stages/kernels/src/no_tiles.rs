//! In the place of [`tiles`](crate::tiles) on processors that have no such units.

use std::ops::Range;

use crate::matmul::{Into, MatrixRef};

pub(crate) const DEPTH: usize = 1;
pub(crate) const PANEL: usize = 1;

#[derive(Debug, Clone, Copy)]
pub(crate) enum Kernel {
    Amx,
    Avx512,
}

pub(crate) fn has_amx() -> bool {
    false
}

pub(crate) fn has_avx512() -> bool {
    false
}

pub(crate) fn multiply(kernel: Kernel, _: &mut [f32], _: usize, _: MatrixRef<'_>, _: MatrixRef<'_>, _: f32, _: Into, _: bool) {
    unreachable!("this processor has no {kernel:?}")
}

pub(crate) enum Packed {}

impl Packed {
    pub(crate) fn left(_: MatrixRef<'_>) -> Self {
        unreachable!("this processor has no tiles")
    }

    pub(crate) fn passing_right(_: MatrixRef<'_>) -> Self {
        unreachable!("this processor has no tiles")
    }

    pub(crate) fn right(_: MatrixRef<'_>) -> Self {
        unreachable!("this processor has no tiles")
    }

    pub(crate) fn right_weight(_: &[half::bf16], _: usize, _: bool) -> Self {
        unreachable!("this processor has no tiles")
    }

    pub(crate) fn lines(&self) -> usize {
        match *self {}
    }

    pub(crate) fn product(_: Kernel, left: &Self, _: &Self) -> Vec<f32> {
        match *left {}
    }

    pub(crate) fn product_into(_: Kernel, _: &mut [f32], left: &Self, _: &Self, _: Into) {
        match *left {}
    }

    pub(crate) fn multiply(&self, _: Kernel, _: &mut [f32], _: usize, _: &Self, _: Range<usize>, _: Range<usize>, _: Into) {
        match *self {}
    }
}

pub(crate) enum Writer {}

impl Writer {
    pub(crate) fn new(_: usize, _: usize, _: bool) -> Self {
        unreachable!("this processor has no tiles")
    }

    pub(crate) unsafe fn put(&self, _: MatrixRef<'_>, _: usize, _: usize) {
        match *self {}
    }

    pub(crate) unsafe fn finish(self) -> Packed {
        match self {}
    }
}

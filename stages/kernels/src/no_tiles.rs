//! In the place of [`tiles`](crate::tiles) on processors that have no such units.

use crate::matmul::{Into, MatrixRef};

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

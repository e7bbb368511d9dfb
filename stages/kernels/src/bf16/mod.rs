//! Matrix products of numbers rounded to bfloat16, with sums in f32.
//!
//! Operands are f32 and rounded (to nearest, ties to even) while they are packed; products of two such numbers are exact
//! in f32. Three units compute them, the best that the processor has: AMX tiles, AVX-512 BF16 dot products, or rounding
//! followed by an f32 product. Each sums along the inner dimension in one order of its own, whatever the number of
//! threads and whatever the other rows and columns hold; which unit it was belongs to the numerics profile ([`unit`]).

mod convert;

pub use convert::{round_all, widen_all};

use std::sync::OnceLock;

use crate::{
    matmul::{self, Into, MatrixRef},
    tiles::{self, Kernel},
};

/// What multiplies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Tiles of the advanced matrix extensions.
    Amx,
    /// Dot products of AVX-512 BF16.
    Avx512,
    /// f32 arithmetic on rounded numbers.
    Rounded,
}

impl Unit {
    /// Name for the numerics profile.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Amx => "amx",
            Self::Avx512 => "avx512_bf16",
            Self::Rounded => "rounded",
        }
    }

    /// Units that this processor has, best first. `RLFLOW_SIMD=avx512` leaves AMX out; lower levels leave both out.
    pub fn available() -> Vec<Self> {
        let mut units = vec![Self::Rounded];
        if tiles::has_avx512() {
            units.insert(0, Self::Avx512);
        }
        if tiles::has_amx() {
            units.insert(0, Self::Amx);
        }
        units
    }
}

/// The unit in use.
pub fn unit() -> Unit {
    static UNIT: OnceLock<Unit> = OnceLock::new();
    *UNIT.get_or_init(|| Unit::available()[0])
}

/// A number rounded to bfloat16: to nearest, ties to even. NaN stays NaN.
#[inline]
pub fn round(value: f32) -> u16 {
    let bits = value.to_bits();
    if value.is_nan() {
        return (bits >> 16) as u16 | 0x40;
    }
    ((bits + 0x7fff + ((bits >> 16) & 1)) >> 16) as u16
}

/// The number that [`round`] stands for.
#[inline]
pub fn widen(value: u16) -> f32 {
    f32::from_bits(u32::from(value) << 16)
}

/// `out = a b * scale` or `out += a b * scale` with `a` and `b` rounded to bfloat16, `out` row-major with the given row
/// stride.
pub fn matmul_scaled(out: &mut [f32], out_row_stride: usize, a: MatrixRef<'_>, b: MatrixRef<'_>, scale: f32, into: Into, parallel: bool) {
    multiply(unit(), out, out_row_stride, a, b, scale, into, parallel);
}

/// [`matmul_scaled`] on a unit of choice, which [`Unit::available`] must list.
#[allow(clippy::too_many_arguments)]
pub fn multiply(
    unit: Unit,
    out: &mut [f32],
    out_row_stride: usize,
    a: MatrixRef<'_>,
    b: MatrixRef<'_>,
    scale: f32,
    into: Into,
    parallel: bool,
) {
    let kernel = match unit {
        Unit::Amx => Kernel::Amx,
        Unit::Avx512 => Kernel::Avx512,
        Unit::Rounded => return rounded(out, out_row_stride, a, b, scale, into, parallel),
    };
    tiles::multiply(kernel, out, out_row_stride, a, b, scale, into, parallel);
}

/// For processors without a unit for it.
fn rounded(out: &mut [f32], out_row_stride: usize, a: MatrixRef<'_>, b: MatrixRef<'_>, scale: f32, into: Into, parallel: bool) {
    let dense = |matrix: MatrixRef<'_>| -> Vec<f32> {
        let rows = (0..matrix.rows()).flat_map(|row| (0..matrix.columns()).map(move |column| (row, column)));
        rows.map(|(row, column)| widen(round(matrix.get(row, column)))).collect()
    };
    let (left, right) = (dense(a), dense(b));
    let (left, right) = (MatrixRef::new(&left, a.rows(), a.columns()), MatrixRef::new(&right, b.rows(), b.columns()));
    match parallel {
        true => matmul::matmul_scaled(out, out_row_stride, left, right, scale, into),
        false => matmul::matmul_serial(out, out_row_stride, left, right, scale, into),
    }
}

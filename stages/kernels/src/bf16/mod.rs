//! Matrix products of numbers rounded to bfloat16, with sums in f32.
//!
//! Operands are f32 and rounded (to nearest, ties to even) while they are packed; products of two such numbers are exact
//! in f32. Three units compute them, the best that the processor has: AMX tiles, AVX-512 BF16 dot products, or rounding
//! followed by an f32 product. Each sums along the inner dimension in one order of its own, whatever the number of
//! threads and whatever the other rows and columns hold; which unit it was belongs to the numerics profile ([`unit`]).

mod amx;
mod avx512;
mod convert;
mod pack;

pub use convert::{round_all, widen_all};

use std::{cell::RefCell, sync::OnceLock};

use rayon::prelude::*;

use crate::{
    matmul::{self, Into, MatrixRef},
    simd,
};

/// Rows of a panel of the left operand and columns of one of the right: two tiles of 16.
const PANEL: usize = 32;
/// Elements of the inner dimension that a tile holds.
const DEPTH: usize = 32;
/// Panels of rows that one task computes, so that a panel of columns is read from the cache more than once.
const TASK_PANELS: usize = 4;

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
        if simd::level() == simd::Level::Avx512 && avx512::is_available() {
            units.insert(0, Self::Avx512);
            let lowered = std::env::var("RLFLOW_SIMD").is_ok_and(|level| level == "avx512");
            if !lowered && amx::is_available() {
                units.insert(0, Self::Amx);
            }
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
    let (m, n, k) = (a.rows(), b.columns(), a.columns());
    assert_eq!(k, b.rows(), "inner dimensions differ");
    if m == 0 || n == 0 {
        return;
    }
    assert!(n <= out_row_stride && (m - 1) * out_row_stride + n <= out.len(), "result leaves its slice");
    if unit == Unit::Rounded {
        return rounded(out, out_row_stride, a, b, scale, into, parallel);
    }
    let blocks = k.div_ceil(DEPTH);
    let panel_len = blocks * DEPTH * PANEL;
    with_buffer(&RIGHT, n.div_ceil(PANEL) * panel_len, |packed| {
        let pack = |(panel, packed): (usize, &mut [u16])| pack::right(packed, b, panel * PANEL);
        match parallel {
            _ if panel_len == 0 => {}
            true => packed.par_chunks_mut(panel_len).enumerate().for_each(pack),
            false => packed.chunks_mut(panel_len).enumerate().for_each(pack),
        }
        let product = Product { unit, left: a, right: packed, blocks, columns: n, scale, into };
        let task_rows = TASK_PANELS * PANEL;
        let tasks = m.div_ceil(task_rows);
        let compute = |(task, rows): (usize, &mut [f32])| product.rows(task * task_rows, rows, out_row_stride);
        match parallel {
            true => out.par_chunks_mut(task_rows * out_row_stride).enumerate().take(tasks).for_each(compute),
            false => out.chunks_mut(task_rows * out_row_stride).enumerate().take(tasks).for_each(compute),
        }
    });
}

/// One product with its right operand packed.
struct Product<'a> {
    unit: Unit,
    left: MatrixRef<'a>,
    right: &'a [u16],
    /// Tiles along the inner dimension.
    blocks: usize,
    columns: usize,
    scale: f32,
    into: Into,
}

impl Product<'_> {
    /// Up to `TASK_PANELS` panels of rows from `first` on into `out`, which begins at that row.
    fn rows(&self, first: usize, out: &mut [f32], out_row_stride: usize) {
        let rows = (self.left.rows() - first).min(TASK_PANELS * PANEL);
        let panel_len = self.blocks * DEPTH * PANEL;
        with_buffer(&LEFT, rows.div_ceil(PANEL) * panel_len, |left| {
            for panel in 0..rows.div_ceil(PANEL) {
                pack::left(&mut left[panel * panel_len..(panel + 1) * panel_len], self.left, first + panel * PANEL);
            }
            let _tiles = (self.unit == Unit::Amx).then(amx::Tiles::configure);
            let mut sums = Sums([0.0; PANEL * PANEL]);
            for column in 0..self.columns.div_ceil(PANEL) {
                let right = &self.right[column * panel_len..(column + 1) * panel_len];
                for panel in 0..rows.div_ceil(PANEL) {
                    let left = &left[panel * panel_len..(panel + 1) * panel_len];
                    match self.unit {
                        Unit::Amx => amx::panel(left, right, &mut sums),
                        _ => avx512::panel(left, right, &mut sums),
                    }
                    let height = (rows - panel * PANEL).min(PANEL);
                    let width = (self.columns - column * PANEL).min(PANEL);
                    for row in 0..height {
                        let start = (panel * PANEL + row) * out_row_stride + column * PANEL;
                        let (out, sums) = (&mut out[start..start + width], &sums.0[row * PANEL..row * PANEL + width]);
                        match self.into {
                            Into::Overwrite => out.iter_mut().zip(sums).for_each(|(out, sum)| *out = sum * self.scale),
                            Into::Add => out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum * self.scale),
                        }
                    }
                }
            }
        });
    }
}

/// The sums of one panel by one panel, row-major, where tiles can be stored.
#[repr(align(64))]
struct Sums([f32; PANEL * PANEL]);

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

thread_local! {
    static LEFT: RefCell<Vec<u64>> = const { RefCell::new(Vec::new()) };
    static RIGHT: RefCell<Vec<u64>> = const { RefCell::new(Vec::new()) };
}

/// Runs `work` with `len` numbers of scratch memory that outlives the call. A call within `work` on the same thread (one
/// that the pool put there while it waited) gets memory of its own.
fn with_buffer<T>(buffer: &'static std::thread::LocalKey<RefCell<Vec<u64>>>, len: usize, work: impl FnOnce(&mut [u16]) -> T) -> T {
    let mut memory = buffer.take();
    if memory.len() < len.div_ceil(4) {
        memory.resize(len.div_ceil(4), 0);
    }
    let result = work(&mut bytemuck::cast_slice_mut::<u64, u16>(&mut memory)[..len]);
    buffer.replace(memory);
    result
}

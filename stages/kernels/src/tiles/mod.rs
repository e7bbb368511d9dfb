//! Matrix products of numbers rounded to bfloat16, on units that multiply those and add in f32.
//!
//! AMX could also multiply f32, each as three bfloat16 pieces (arXiv:1904.06376). Measured, that is 1.4 times as fast as fused
//! multiply-adds on a core of its own and half as fast while another thread uses the core, so it is not done.
//!
//! An element's sum has one order, blocks of the depth ascending. Neither the number of threads nor the other rows and columns
//! change a bit of it.

mod amx;
mod avx512;
mod pack;
mod packed;

pub(crate) use packed::{Packed, Writer};

use std::{mem::MaybeUninit, ops::Range, sync::OnceLock};

use rayon::prelude::*;

use self::pack::Side;
use crate::{
    matmul::{Into, MatrixRef},
    scratch::scratch,
    shared::Shared,
    simd,
};

/// Rows of a tile of the left operand, columns of one of the right.
const TILE: usize = 16;
/// Rows or columns that a kernel computes at once: two tiles.
pub(crate) const PANEL: usize = 2 * TILE;
/// Elements of the depth that a tile holds.
pub(crate) const DEPTH: usize = 32;
/// Numbers of one block of a panel: two tiles.
const BLOCK: usize = PANEL * DEPTH;
/// Blocks of the depth that are summed before the result is touched: two panels of them, 32 KiB, stay in the first-level cache.
/// Of a scaled product they are a part of the order of sums.
const DEPTH_BLOCKS: usize = 8;
/// Panels of a task: left ones stay in a core's second-level cache while right ones pass.
const TASK_PANELS: [usize; 2] = [4, 8];
/// Panels that a task packs.
const PACK_PANELS: usize = 4;
/// Numbers of packed operand held at once for each side, about (8 MiB): what is larger is packed in parts.
const PACKED: usize = 4 << 20;
/// Multiplications below which threads cost more than they save.
const SERIAL: usize = 1 << 17;

/// Whether AMX can be used. `RLFLOW_SIMD=avx512` and lower levels say no.
pub(crate) fn has_amx() -> bool {
    static LOWERED: OnceLock<bool> = OnceLock::new();
    has_avx512() && !LOWERED.get_or_init(|| std::env::var("RLFLOW_SIMD").is_ok_and(|level| level == "avx512")) && amx::is_available()
}

/// Whether dot products of AVX-512 BF16 can be used. Levels below `avx512` say no.
pub(crate) fn has_avx512() -> bool {
    simd::level() == simd::Level::Avx512 && avx512::is_available()
}

/// What multiplies tiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kernel {
    /// AMX.
    Amx,
    /// AVX-512 BF16.
    Avx512,
}

/// `out = a b * scale` or `out += a b * scale`, `out` row-major with the given row stride.
pub(crate) fn multiply(
    kernel: Kernel,
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
    if k == 0 {
        if into == Into::Overwrite {
            out.chunks_mut(out_row_stride).take(m).for_each(|row| row[..n].fill(0.0));
        }
        return;
    }
    let parallel = parallel && m * n * k > SERIAL;
    let (left, right) = (Side::left(a), Side::right(b));
    let out = Shared::new(out);
    for start in (0..k).step_by(DEPTH_BLOCKS * DEPTH) {
        let blocks = (k - start).div_ceil(DEPTH).min(DEPTH_BLOCKS);
        let panel_len = blocks * BLOCK;
        let panels = (PACKED / panel_len).max(1);
        let into = if start > 0 { Into::Add } else { into };
        for rows in parts(m.div_ceil(PANEL), panels) {
            let mut packed_left = scratch(rows.len() * panel_len);
            for (part, columns) in parts(n.div_ceil(PANEL), panels).enumerate() {
                let mut packed_right = scratch(columns.len() * panel_len);
                let group = PACK_PANELS * panel_len;
                // SAFETY: packing writes numbers.
                let (left_places, right_places) = unsafe { (packed_left.places(), packed_right.places()) };
                let lefts = left_places.chunks_mut(group).zip(rows.clone().step_by(PACK_PANELS)).filter(|_| part == 0);
                let rights = right_places.chunks_mut(group).zip(columns.clone().step_by(PACK_PANELS));
                let packs: Vec<_> = lefts.map(|task| (left, task)).chain(rights.map(|task| (right, task))).collect();
                let pack = |(side, (packed, panel)): (Side<'_>, (&mut [MaybeUninit<u16>], usize))| {
                    side.pack(packed, panel_len, panel * PANEL, start)
                };
                if parallel {
                    packs.into_par_iter().for_each(pack)
                } else {
                    packs.into_iter().for_each(pack)
                }
                let product = Product {
                    kernel,
                    left: (&packed_left, rows.start),
                    right: (&packed_right, columns.start),
                    panel_len,
                    sizes: [m, n],
                    out,
                    out_row_stride,
                    scale,
                    into,
                };
                product.run([rows.len(), columns.len()], parallel);
            }
        }
    }
}

/// `0..len` in ranges of `size`.
fn parts(len: usize, size: usize) -> impl Iterator<Item = Range<usize>> {
    (0..len).step_by(size).map(move |start| start..(start + size).min(len))
}

/// A product of packed panels, with the numbers of the first panels.
struct Product<'a> {
    kernel: Kernel,
    left: (&'a [u16], usize),
    right: (&'a [u16], usize),
    panel_len: usize,
    /// Rows and columns of the whole result.
    sizes: [usize; 2],
    out: Shared<'a>,
    out_row_stride: usize,
    scale: f32,
    into: Into,
}

impl Product<'_> {
    fn run(&self, panels: [usize; 2], parallel: bool) {
        let across = panels[1].div_ceil(TASK_PANELS[1]);
        let tasks = panels[0].div_ceil(TASK_PANELS[0]) * across;
        let compute = |task: usize| {
            let firsts = [task / across * TASK_PANELS[0], task % across * TASK_PANELS[1]];
            let _tiles = (self.kernel == Kernel::Amx).then(amx::Tiles::configure);
            let [rows, columns] = [0, 1].map(|side| firsts[side]..(firsts[side] + TASK_PANELS[side]).min(panels[side]));
            passes(rows, columns).for_each(|pass| self.panel(pass));
        };
        if parallel { (0..tasks).into_par_iter().for_each(compute) } else { (0..tasks).for_each(compute) }
    }

    fn panel(&self, pass: Pass) {
        let Pass { row, column, .. } = pass;
        let left = &self.left.0[row * self.panel_len..][..self.panel_len];
        let right = |column: usize| &self.right.0[column * self.panel_len..][..self.panel_len];
        let (right, next) = (right(column), pass.half(right(pass.next)));
        let (first_row, first_column) = ((self.left.1 + row) * PANEL, (self.right.1 + column) * PANEL);
        let size = [(self.sizes[0] - first_row).min(PANEL), (self.sizes[1] - first_column).min(PANEL)];
        // SAFETY: panels are disjoint parts of the result, and each is computed by one task.
        let out = unsafe { self.out.from(first_row * self.out_row_stride + first_column) };
        self.kernel.panel([left, right, next], out, self.out_row_stride, size, self.scale, self.into);
    }
}

/// A panel of rows by a panel of columns.
#[derive(Clone, Copy)]
struct Pass {
    row: usize,
    column: usize,
    /// Of which panel of columns a half is fetched meanwhile, and whether it is the second.
    next: usize,
    is_second: bool,
}

impl Pass {
    /// The half of the next panel that is fetched.
    fn half(self, next: &[u16]) -> &[u16] {
        &next[if self.is_second { next.len() / 2 } else { 0 }..]
    }
}

/// All panels of some rows and columns. Two of rows stay in the first-level cache while those of columns pass.
fn passes(rows: Range<usize>, columns: Range<usize>) -> impl Iterator<Item = Pass> {
    let last = rows.end;
    rows.step_by(2).flat_map(move |first| {
        let (begin, end) = (columns.start, columns.end);
        columns.clone().flat_map(move |column| {
            let next = if column + 1 < end { column + 1 } else { begin };
            (first..(first + 2).min(last)).map(move |row| Pass { row, column, next, is_second: row > first })
        })
    })
}

impl Kernel {
    /// A panel of rows by a panel of columns, of which the result has `height` and `width`. Half a panel of what comes `next` is
    /// fetched meanwhile.
    fn panel(self, [left, right, next]: [&[u16]; 3], out: &mut [f32], stride: usize, [height, width]: [usize; 2], scale: f32, into: Into) {
        if (height, width, scale) == (PANEL, PANEL, 1.0) {
            return self.multiply([left, right, next], out, stride, into);
        }
        let mut sums = Sums([0.0; PANEL * PANEL]);
        // A sum that is added to begins with what is there, here as in whole panels; a scaled one cannot.
        let begins = into == Into::Add && scale == 1.0;
        let rows = || (0..height).map(|row| (row * stride, row * PANEL));
        if begins {
            rows().for_each(|(at, from)| sums.0[from..from + width].copy_from_slice(&out[at..at + width]));
        }
        self.multiply([left, right, next], &mut sums.0, PANEL, if begins { Into::Add } else { Into::Overwrite });
        for (at, from) in rows() {
            let (out, sums) = (&mut out[at..at + width], &sums.0[from..from + width]);
            match into {
                Into::Add if !begins => out.iter_mut().zip(sums).for_each(|(out, sum)| *out += sum * scale),
                _ => out.iter_mut().zip(sums).for_each(|(out, sum)| *out = sum * scale),
            }
        }
    }

    /// A panel of rows by a panel of columns: all of `PANEL` by `PANEL` elements of `out`.
    fn multiply(self, [left, right, next]: [&[u16]; 3], out: &mut [f32], out_row_stride: usize, into: Into) {
        assert!((PANEL - 1) * out_row_stride + PANEL <= out.len() && left.len() == right.len());
        match self {
            Self::Amx => amx::panel(left, right, next.as_ptr(), out, out_row_stride, into),
            Self::Avx512 => avx512::panel(left, right, out, out_row_stride, into),
        }
    }
}

/// A panel of sums, row-major, where tiles can be stored.
#[repr(align(64))]
struct Sums([f32; PANEL * PANEL]);

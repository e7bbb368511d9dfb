//! Operands that are packed once for several products.

use std::{mem::MaybeUninit, ops::Range};

use half::bf16;
use rayon::prelude::*;

use super::{BLOCK, DEPTH, DEPTH_BLOCKS, Kernel, PANEL, amx, pack::Side, passes};
use crate::{
    matmul::{Into, MatrixRef},
    memory::Parts,
    scratch::{Line, Scratch, scratch},
};

/// Numbers of a line of the cache.
const LINE: usize = size_of::<Line>() / size_of::<u16>();
/// Panels of rows of a task of [`Packed::product`], at most.
const TASK_PANELS: usize = 4;

/// The numbers of lines that are to be written.
fn numbers(lines: &mut [MaybeUninit<Line>]) -> &mut [MaybeUninit<u16>] {
    // SAFETY: the same bytes; a line has no byte that is not of a number.
    unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), lines.len() * LINE) }
}

/// Where tasks put terms of lines, to be packed.
pub(crate) struct Writer {
    tiles: Parts<Line>,
    lines: usize,
    terms: usize,
    is_left: bool,
}

impl Writer {
    /// For a side of this many lines and terms.
    pub(crate) fn new(lines: usize, terms: usize, is_left: bool) -> Self {
        Self { tiles: Parts::new(lines.div_ceil(PANEL) * terms.div_ceil(DEPTH) * BLOCK / LINE), lines, terms, is_left }
    }

    /// Columns of `rows` become lines from `first_line` on, their rows terms from `first_term` on. The first is a multiple of
    /// [`PANEL`], the second of [`DEPTH`].
    ///
    /// # Safety
    /// No other task may put the same terms of the same lines.
    pub(crate) unsafe fn put(&self, rows: MatrixRef<'_>, first_line: usize, first_term: usize) {
        assert!(first_line.is_multiple_of(PANEL) && first_term.is_multiple_of(DEPTH), "ranges begin within a tile");
        assert!(first_line + rows.columns() <= self.lines && first_term + rows.rows() <= self.terms);
        let side = if self.is_left { Side::left(rows.t()) } else { Side::right(rows) };
        let (panel_len, len) = (self.terms.div_ceil(DEPTH) * BLOCK, rows.rows().div_ceil(DEPTH) * BLOCK);
        for panel in 0..rows.columns().div_ceil(PANEL) {
            let start = (first_line / PANEL + panel) * panel_len + first_term / DEPTH * BLOCK;
            // SAFETY: the caller says that nobody else has these tiles.
            let tiles = unsafe { self.tiles.unwritten(start / LINE..(start + len) / LINE) };
            side.pack(numbers(tiles), len, panel * PANEL, 0);
        }
    }

    /// # Safety
    /// All terms of all lines must have been put.
    pub(crate) unsafe fn finish(self) -> Packed {
        // SAFETY: as the caller promises.
        Packed { tiles: Tiles::Kept(unsafe { self.tiles.finish() }), lines: self.lines, terms: self.terms }
    }
}

/// One side of products, in panels of lines (rows of a left, columns of a right operand) with all of the summed dimension.
pub(crate) struct Packed {
    tiles: Tiles,
    lines: usize,
    /// Terms of each line.
    terms: usize,
}

/// Where packed numbers are.
enum Tiles {
    Kept(Vec<Line>),
    Passing(Scratch<u16>),
}

impl Tiles {
    fn numbers(&self) -> &[u16] {
        match self {
            Self::Kept(lines) => bytemuck::cast_slice(lines),
            Self::Passing(numbers) => numbers,
        }
    }
}

impl Packed {
    /// Packs rows on the calling thread, into its scratch.
    pub(crate) fn left(rows: MatrixRef<'_>) -> Self {
        Self::passing(Side::left(rows), rows.rows(), rows.columns())
    }

    /// Packs columns on the calling thread, into its scratch.
    pub(crate) fn passing_right(columns: MatrixRef<'_>) -> Self {
        Self::passing(Side::right(columns), columns.columns(), columns.rows())
    }

    fn passing(side: Side<'_>, lines: usize, terms: usize) -> Self {
        let panel_len = terms.div_ceil(DEPTH) * BLOCK;
        let mut tiles = scratch(lines.div_ceil(PANEL) * panel_len);
        // SAFETY: packing writes numbers.
        side.pack(unsafe { tiles.places() }, panel_len.max(1), 0, 0);
        Self { tiles: Tiles::Passing(tiles), lines, terms }
    }

    /// Packs columns on all threads.
    pub(crate) fn right(columns: MatrixRef<'_>) -> Self {
        Self::kept_right(Side::right(columns))
    }

    /// Packs the columns of a weight `[any, columns]`, or of its transpose, on all threads.
    pub(crate) fn right_weight(weight: &[bf16], columns: usize, transposed: bool) -> Self {
        Self::kept_right(Side::right_weight(weight, columns, transposed))
    }

    fn kept_right(side: Side<'_>) -> Self {
        let [lines, terms] = side.size();
        let panel_len = terms.div_ceil(DEPTH) * BLOCK;
        let panels = lines.div_ceil(PANEL);
        let tiles = Parts::<Line>::new(panels * panel_len / LINE);
        (0..panels).into_par_iter().for_each(|panel| {
            // SAFETY: each task has a panel of its own.
            let packed = unsafe { tiles.unwritten(panel * panel_len / LINE..(panel + 1) * panel_len / LINE) };
            side.pack(numbers(packed), panel_len, panel * PANEL, 0);
        });
        // SAFETY: all panels were packed.
        Self { tiles: Tiles::Kept(unsafe { tiles.finish() }), lines, terms }
    }

    fn panel(&self, panel: usize, blocks: Range<usize>) -> &[u16] {
        let panel_len = self.terms.div_ceil(DEPTH) * BLOCK;
        &self.tiles.numbers()[panel * panel_len + blocks.start * BLOCK..][..blocks.len() * BLOCK]
    }

    /// Number of lines.
    pub(crate) fn lines(&self) -> usize {
        self.lines
    }

    /// `left right` on all threads, all terms of both. Row-major.
    pub(crate) fn product(kernel: Kernel, left: &Self, right: &Self) -> Vec<f32> {
        let (lines, width) = (Self::task_lines(left), right.lines);
        let out = Parts::new(left.lines * width);
        (0..left.lines.div_ceil(lines)).into_par_iter().for_each(|task| {
            let rows = task * lines..((task + 1) * lines).min(left.lines);
            // SAFETY: each task has its own rows. Zeros in the cache cost little.
            let out = unsafe { out.zeroed(rows.start * width..rows.end * width) };
            Self::rows_of_product(kernel, out, rows, left, right, Into::Overwrite);
        });
        // SAFETY: the tasks' rows are all of them.
        unsafe { out.finish() }
    }

    /// `out = left right` or `out += left right`, likewise.
    pub(crate) fn product_into(kernel: Kernel, out: &mut [f32], left: &Self, right: &Self, into: Into) {
        let (lines, width) = (Self::task_lines(left), right.lines);
        assert_eq!(out.len(), left.lines * width, "result has another shape");
        out.par_chunks_mut((lines * width).max(1)).enumerate().for_each(|(task, out)| {
            Self::rows_of_product(kernel, out, task * lines..((task + 1) * lines).min(left.lines), left, right, into);
        });
    }

    /// Rows of a product's task, whole panels: right ones pass through the second-level cache.
    fn task_lines(left: &Self) -> usize {
        left.lines.div_ceil(PANEL).div_ceil(2 * rayon::current_num_threads()).clamp(1, TASK_PANELS) * PANEL
    }

    fn rows_of_product(kernel: Kernel, out: &mut [f32], rows: Range<usize>, left: &Self, right: &Self, into: Into) {
        assert_eq!(left.terms, right.terms, "inner dimensions differ");
        let width = right.lines;
        let _tiles = (kernel == Kernel::Amx).then(amx::Tiles::configure);
        let blocks = left.terms.div_ceil(DEPTH);
        for start in (0..blocks).step_by(DEPTH_BLOCKS) {
            let some = start..(start + DEPTH_BLOCKS).min(blocks);
            let into = if start > 0 { Into::Add } else { into };
            for pass in passes(rows.start / PANEL..rows.end.div_ceil(PANEL), 0..width.div_ceil(PANEL)) {
                let (row, column) = (pass.row * PANEL, pass.column * PANEL);
                let out = &mut out[(row - rows.start) * width + column..];
                let size = [(rows.end - row).min(PANEL), (width - column).min(PANEL)];
                let next = pass.half(right.panel(pass.next, some.clone()));
                let operands = [left.panel(pass.row, some.clone()), right.panel(pass.column, some.clone()), next];
                kernel.panel(operands, out, width, size, 1.0, into);
            }
        }
    }

    /// `out = left self` or `out += left self` for the given columns and terms of this right operand, on the calling thread. Both
    /// ranges begin at multiples of [`PANEL`] and [`DEPTH`].
    pub(crate) fn multiply(
        &self,
        kernel: Kernel,
        out: &mut [f32],
        out_row_stride: usize,
        left: &Self,
        columns: Range<usize>,
        terms: Range<usize>,
        into: Into,
    ) {
        assert!(columns.start.is_multiple_of(PANEL) && terms.start.is_multiple_of(DEPTH), "ranges begin within a tile");
        assert!(columns.end <= self.lines && terms.end <= self.terms && terms.len() == left.terms);
        if left.lines == 0 || columns.is_empty() {
            return;
        }
        assert!(
            columns.len() <= out_row_stride && (left.lines - 1) * out_row_stride + columns.len() <= out.len(),
            "result leaves its slice"
        );
        let _tiles = (kernel == Kernel::Amx).then(amx::Tiles::configure);
        let (first, blocks) = (terms.start / DEPTH, terms.len().div_ceil(DEPTH));
        for start in (0..blocks).step_by(DEPTH_BLOCKS) {
            let some = start..(start + DEPTH_BLOCKS).min(blocks);
            let into = if start > 0 { Into::Add } else { into };
            let right = |panel: usize| self.panel(panel, first + some.start..first + some.end);
            for pass in passes(0..left.lines.div_ceil(PANEL), columns.start / PANEL..columns.end.div_ceil(PANEL)) {
                let (row, column) = (pass.row * PANEL, pass.column * PANEL);
                let out = &mut out[row * out_row_stride + column - columns.start..];
                let size = [(left.lines - row).min(PANEL), (columns.end - column).min(PANEL)];
                let operands = [left.panel(pass.row, some.clone()), right(pass.column), pass.half(right(pass.next))];
                kernel.panel(operands, out, out_row_stride, size, 1.0, into);
            }
        }
    }
}

//! Operands of many products: rows cut into blocks that stay in a core's second-level cache, and weights packed once for all
//! blocks.
//!
//! A block of rows goes through all of an operation's products on one core before the next begins. So what lies between the
//! products never goes through memory, and threads wait for each other once an operation, not once a product.

use std::{borrow::Cow, ops::Range};

use rayon::prelude::*;

use crate::{
    bf16::{self, Unit, widen_all},
    low_rank::How,
    matmul::{Arithmetic, Into, MatrixRef},
    memory::{Parts, zeros},
    panels::{self, PackedRows, Panels},
    simd,
    tiles::{self, Kernel},
    weight::Weight,
};

/// Rows of a block at least; with what units compute at once, 128 or 132.
const ROWS: usize = 128;
/// Columns of a part of a wide intermediate result, likewise.
const COLUMNS: usize = 384;

/// How the rows of an operation are cut. It depends on shapes alone.
#[derive(Clone, Copy)]
pub(crate) struct Blocks {
    rows: usize,
    /// What multiplies blocks; without it there is one block, whose products use all threads.
    unit: Option<BlockUnit>,
    arithmetic: Arithmetic,
}

/// What multiplies tiles in this arithmetic, where the processor has it.
pub(crate) fn tile_kernel(arithmetic: Arithmetic) -> Option<Kernel> {
    match (arithmetic, bf16::unit()) {
        (Arithmetic::Bf16, Unit::Amx) => Some(Kernel::Amx),
        (Arithmetic::Bf16, Unit::Avx512) => Some(Kernel::Avx512),
        (Arithmetic::F32, _) | (_, Unit::Rounded) => None,
    }
}

fn weight_matrix(elements: &[f32], columns: usize, transposed: bool) -> MatrixRef<'_> {
    let matrix = MatrixRef::new(elements, elements.len() / columns.max(1), columns);
    if transposed { matrix.t() } else { matrix }
}

/// What multiplies a block on one core.
#[derive(Clone, Copy)]
enum BlockUnit {
    Panels,
    Tiles(Kernel),
}

impl Blocks {
    /// For `rows` rows.
    pub(crate) fn new(rows: usize, arithmetic: Arithmetic) -> Self {
        let unit = match arithmetic {
            Arithmetic::F32 => (simd::level() == simd::Level::Avx512).then_some(BlockUnit::Panels),
            Arithmetic::Bf16 => tile_kernel(arithmetic).map(BlockUnit::Tiles),
        };
        Self { rows, unit, arithmetic }
    }

    /// Rows of each block but perhaps the last.
    pub(crate) fn block_size(self) -> usize {
        match self.unit {
            None => self.rows.max(1),
            Some(BlockUnit::Panels) => ROWS.next_multiple_of(panels::ROWS),
            Some(BlockUnit::Tiles(_)) => ROWS.next_multiple_of(tiles::DEPTH),
        }
    }

    /// Runs `work` with every block, on all threads.
    pub(crate) fn each(self, work: impl Fn(Range<usize>) + Sync + Send) {
        self.map(work);
    }

    /// What `work` gives for every block, in order.
    pub(crate) fn map<T: Send>(self, work: impl Fn(Range<usize>) -> T + Sync + Send) -> Vec<T> {
        let size = self.block_size();
        (0..self.rows.div_ceil(size)).into_par_iter().map(|block| work(block * size..((block + 1) * size).min(self.rows))).collect()
    }

    /// Parts of `columns` columns.
    pub(crate) fn parts(self, columns: usize) -> impl Iterator<Item = Range<usize>> {
        let width = if self.unit.is_some() { COLUMNS } else { columns.max(1) };
        (0..columns).step_by(width).map(move |first| first..(first + width).min(columns))
    }

    /// A right operand.
    pub(crate) fn right<'a>(self, matrix: MatrixRef<'a>) -> Right<'a> {
        match self.unit {
            None => Right::Plain(self.arithmetic, matrix),
            Some(BlockUnit::Panels) => Right::Panels(Panels::new(matrix)),
            Some(BlockUnit::Tiles(kernel)) => Right::Tiles(kernel, tiles::Packed::right(matrix)),
        }
    }

    /// A weight of this many columns as a right operand, or its transpose.
    pub(crate) fn weight<'a>(self, weight: Weight<'a>, columns: usize, transposed: bool) -> Right<'a> {
        match (weight, self.unit) {
            (Weight::F32(elements), _) => self.right(weight_matrix(elements, columns, transposed)),
            (Weight::Bf16(elements), Some(BlockUnit::Tiles(kernel))) => {
                Right::Tiles(kernel, tiles::Packed::right_weight(elements, columns, transposed))
            }
            (Weight::Bf16(elements), Some(BlockUnit::Panels)) => {
                Right::Panels(Panels::new(weight_matrix(&widen_all(elements), columns, transposed)))
            }
            (Weight::Bf16(elements), None) => {
                Right::Widened { arithmetic: self.arithmetic, elements: widen_all(elements), columns, transposed }
            }
        }
    }

    /// Rows of the block that begins at row `first_row`, as a left operand.
    pub(crate) fn left<'a>(self, rows: MatrixRef<'a>, first_row: usize) -> Left<'a> {
        let packed = match self.unit {
            None => PackedLeft::Plain,
            Some(BlockUnit::Panels) => PackedLeft::Panels(PackedRows::new(rows)),
            Some(BlockUnit::Tiles(_)) => PackedLeft::Tiles(tiles::Packed::left(rows)),
        };
        Left { rows, first_row, packed }
    }

    /// How small products of a block are computed.
    pub(crate) fn small_products(self) -> How {
        How { arithmetic: self.arithmetic, parallel: self.unit.is_none() }
    }
}

/// Which operand of a weight's gradient `dout^T x` rows are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// `dout`: the gradient of a projection's result.
    Gradient,
    /// `x`: its input.
    Input,
}

/// Rows that blocks leave behind for products over all rows.
pub(crate) enum Keep<'a> {
    Rows(Parts, usize),
    /// They are there already.
    Given(&'a [f32], usize),
    Tiles(Kernel, tiles::Writer),
}

/// What was kept.
pub(crate) enum Kept<'a> {
    Rows(Cow<'a, [f32]>, usize),
    Tiles(Kernel, tiles::Packed),
}

impl Blocks {
    /// For rows of `width`, which may be `given`. With `as_rows` they can be read again.
    pub(crate) fn keep<'a>(self, role: Role, width: usize, given: Option<&'a [f32]>, as_rows: bool) -> Keep<'a> {
        match (self.unit, given) {
            (Some(BlockUnit::Tiles(kernel)), _) if !as_rows => {
                Keep::Tiles(kernel, tiles::Writer::new(width, self.rows, role == Role::Gradient))
            }
            (_, Some(rows)) => Keep::Given(rows, width),
            (_, None) => Keep::Rows(Parts::new(self.rows * width), width),
        }
    }

    /// Elements of f32 that a packed weight of so many takes.
    pub(crate) fn packed_size(self, elements: usize) -> usize {
        match self.unit {
            None => 0,
            Some(BlockUnit::Panels) => elements,
            Some(BlockUnit::Tiles(_)) => elements / 2,
        }
    }

    /// Elements of f32 that [`Self::keep`] takes for rows of `width`, and of `given` more that are given.
    pub(crate) fn kept_size(self, width: usize, given: usize, as_rows: bool) -> usize {
        match self.unit {
            Some(BlockUnit::Tiles(_)) if !as_rows => self.rows * (width + given) / 2,
            _ => self.rows * width,
        }
    }

    /// Elements of what a block has for each row. Those of small blocks are scratch that threads keep in any case.
    pub(crate) fn working_size(self, per_row: usize) -> usize {
        if self.unit.is_some() { 0 } else { self.rows * per_row }
    }

    /// Columns of a part of `columns` columns.
    pub(crate) fn part_size(self, columns: usize) -> usize {
        self.parts(columns).next().map_or(0, |part| part.len())
    }
}

impl<'a> Keep<'a> {
    /// Keeps rows from `first_row` on of columns from `first_column` on.
    ///
    /// # Safety
    /// No other task may put the same elements.
    pub(crate) unsafe fn put(&self, rows: MatrixRef<'_>, first_row: usize, first_column: usize) {
        match self {
            // SAFETY: as the caller promises.
            Self::Tiles(_, writer) => unsafe { writer.put(rows, first_column, first_row) },
            Self::Given(..) => {}
            Self::Rows(parts, width) => {
                (0..rows.rows()).into_par_iter().with_min_len(32).for_each(|row| {
                    // SAFETY: as the caller promises.
                    unsafe { parts.copied((first_row + row) * width + first_column, rows.row(row)) };
                });
            }
        }
    }

    /// # Safety
    /// Every element must have been put.
    pub(crate) unsafe fn finish(self) -> Kept<'a> {
        // SAFETY: as the caller promises.
        unsafe {
            match self {
                Self::Rows(parts, width) => Kept::Rows(parts.finish().into(), width),
                Self::Given(rows, width) => Kept::Rows(rows.into(), width),
                Self::Tiles(kernel, writer) => Kept::Tiles(kernel, writer.finish()),
            }
        }
    }
}

/// [`Keep::put`] of whole rows, where they are kept.
///
/// # Safety
/// As there.
pub(crate) unsafe fn put(keep: &Option<Keep<'_>>, rows: MatrixRef<'_>, first_row: usize) {
    if let Some(keep) = keep {
        // SAFETY: as the caller promises.
        unsafe { keep.put(rows, first_row, 0) };
    }
}

/// [`Keep::finish`], where something is kept.
///
/// # Safety
/// As there.
pub(crate) unsafe fn finish(keep: Option<Keep<'_>>) -> Option<Kept<'_>> {
    // SAFETY: as the caller promises.
    keep.map(|keep| unsafe { keep.finish() })
}

impl Kept<'_> {
    /// The rows, where they were kept as such.
    pub(crate) fn rows(&self) -> Option<&[f32]> {
        match self {
            Self::Rows(rows, _) => Some(rows),
            Self::Tiles(..) => None,
        }
    }

    /// Number of columns.
    fn width(&self) -> usize {
        match self {
            Self::Rows(_, width) => *width,
            Self::Tiles(_, packed) => packed.lines(),
        }
    }

    /// `self^T right`, row-major.
    pub(crate) fn product(&self, right: &Self, arithmetic: Arithmetic) -> Vec<f32> {
        if let (Self::Tiles(kernel, left), Self::Tiles(_, right)) = (self, right) {
            return tiles::Packed::product(*kernel, left, right);
        }
        let mut out = zeros(self.width() * right.width());
        self.product_into(&mut out, right, arithmetic, Into::Overwrite);
        out
    }

    /// `out = self^T right` or `out += self^T right`, row-major, on all threads.
    pub(crate) fn product_into(&self, out: &mut [f32], right: &Self, arithmetic: Arithmetic, into: Into) {
        match (self, right) {
            (Self::Tiles(kernel, left), Self::Tiles(_, right)) => tiles::Packed::product_into(*kernel, out, left, right, into),
            (Self::Rows(left, height), Self::Rows(right, width)) => {
                let rows = left.len() / (*height).max(1);
                let (left, right) = (MatrixRef::new(left, rows, *height), MatrixRef::new(right, rows, *width));
                arithmetic.multiply(out, *width, left.t(), right, into, true);
            }
            _ => unreachable!("operands of one operation are kept alike"),
        }
    }
}

/// The right operand of products with blocks.
pub(crate) enum Right<'a> {
    Panels(Panels),
    Tiles(Kernel, tiles::Packed),
    Plain(Arithmetic, MatrixRef<'a>),
    /// A weight that was held in bfloat16.
    Widened {
        arithmetic: Arithmetic,
        elements: Vec<f32>,
        columns: usize,
        transposed: bool,
    },
}

/// Rows of a block.
pub(crate) struct Left<'a> {
    pub(crate) rows: MatrixRef<'a>,
    /// Number of the first of them.
    pub(crate) first_row: usize,
    packed: PackedLeft,
}

enum PackedLeft {
    Panels(PackedRows),
    Tiles(tiles::Packed),
    Plain,
}

impl Right<'_> {
    /// `out = left self` or `out += left self` for some columns and terms (rows of this operand). The ranges are parts
    /// ([`Blocks::parts`]) or all.
    pub(crate) fn multiply(
        &self,
        out: &mut [f32],
        out_row_stride: usize,
        left: &Left<'_>,
        columns: Range<usize>,
        terms: Range<usize>,
        into: Into,
    ) {
        match (self, &left.packed) {
            (Self::Panels(right), PackedLeft::Panels(left)) => right.multiply(out, out_row_stride, left, columns, terms, into),
            (Self::Tiles(kernel, right), PackedLeft::Tiles(left)) => {
                right.multiply(*kernel, out, out_row_stride, left, columns, terms, into)
            }
            (Self::Plain(arithmetic, right), PackedLeft::Plain) => {
                assert!(columns == (0..right.columns()) && terms == (0..right.rows()), "a plain operand is not cut");
                arithmetic.multiply(out, out_row_stride, left.rows, *right, into, true);
            }
            (Self::Widened { arithmetic, elements, columns: width, transposed }, PackedLeft::Plain) => {
                let right = weight_matrix(elements, *width, *transposed);
                assert!(columns == (0..right.columns()) && terms == (0..right.rows()), "a plain operand is not cut");
                arithmetic.multiply(out, out_row_stride, left.rows, right, into, true);
            }
            _ => unreachable!("operands of one operation are packed alike"),
        }
    }
}

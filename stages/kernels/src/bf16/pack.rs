//! Rounds operands into the order in which tiles take them. Rows, columns and depth beyond the operand are zeros.

use super::{DEPTH, PANEL, round};
use crate::{matmul::MatrixRef, simd::multiversion};

/// Rows or columns of a tile.
const TILE: usize = 16;

multiversion! {
    /// Packs `PANEL` rows from `first` on: for each block of the inner dimension two tiles of 16 rows by 32 elements.
    pub(super) fn left(packed: &mut [u16], matrix: MatrixRef<'_>, first: usize) = left_inner
}

multiversion! {
    /// Packs `PANEL` columns from `first` on: for each block of the inner dimension two tiles of 16 columns, in which row p
    /// holds elements 2p and 2p + 1 of every column side by side.
    pub(super) fn right(packed: &mut [u16], matrix: MatrixRef<'_>, first: usize) = right_inner
}

#[inline(always)]
fn left_inner<const FMA: bool>(packed: &mut [u16], matrix: MatrixRef<'_>, first: usize) {
    let rows = (matrix.rows() - first).min(PANEL);
    for (block, tiles) in packed.chunks_exact_mut(PANEL * DEPTH).enumerate() {
        let start = block * DEPTH;
        let depth = (matrix.columns() - start).min(DEPTH);
        if rows < PANEL || depth < DEPTH {
            tiles.fill(0);
        }
        if let Some(_in_rows) = matrix.row(first, start..start + depth) {
            for (row, tile_row) in tiles.chunks_exact_mut(DEPTH).take(rows).enumerate() {
                let Some(values) = matrix.row(first + row, start..start + depth) else { continue };
                tile_row.iter_mut().zip(values).for_each(|(to, value)| *to = round(*value));
            }
        } else {
            let columns = matrix.t();
            for at in 0..depth {
                let Some(values) = columns.row(start + at, first..first + rows) else { continue };
                values.iter().enumerate().for_each(|(row, value)| tiles[row * DEPTH + at] = round(*value));
            }
        }
    }
}

#[inline(always)]
fn right_inner<const FMA: bool>(packed: &mut [u16], matrix: MatrixRef<'_>, first: usize) {
    let columns = (matrix.columns() - first).min(PANEL);
    for (block, tiles) in packed.chunks_exact_mut(PANEL * DEPTH).enumerate() {
        let start = block * DEPTH;
        let depth = (matrix.rows() - start).min(DEPTH);
        if columns < PANEL || depth < DEPTH {
            tiles.fill(0);
        }
        for (tile, tile_values) in tiles.chunks_exact_mut(TILE * DEPTH).enumerate() {
            let from = first + (tile * TILE).min(columns);
            let to = first + ((tile + 1) * TILE).min(columns);
            if matrix.row(start, from..to).is_some() {
                for at in 0..depth {
                    let Some(values) = matrix.row(start + at, from..to) else { continue };
                    let row = &mut tile_values[(at / 2) * 2 * TILE..(at / 2 + 1) * 2 * TILE];
                    values.iter().enumerate().for_each(|(column, value)| row[2 * column + at % 2] = round(*value));
                }
            } else {
                let rows = matrix.t();
                for column in from..to {
                    let Some(values) = rows.row(column, start..start + depth) else { continue };
                    let place = 2 * (column - from);
                    values.iter().enumerate().for_each(|(at, value)| tile_values[(at / 2) * 2 * TILE + place + at % 2] = round(*value));
                }
            }
        }
    }
}

//! Projections of a few rows, as decoding has them: one row a sequence. Such a product takes as long as reading the weights,
//! so they are read once, where and as they lie; packing them would read them twice.
//!
//! An element's sum has one order (sixteen lanes along the summed dimension, added as a fixed tree), whatever the number of
//! rows and threads.

use std::ops::Range;

use crate::{
    matmul::{self, Into, MatrixRef},
    shared::Shared,
    simd,
    team::Team,
    weight::Weight,
};

/// Columns that a task computes.
const TASK: usize = 64;
/// The same without AVX-512.
const PLAIN_TASK: usize = 256;
/// Columns whose sums are in registers at once, with those of six rows.
const TILE: usize = 4;

/// A projection `out = x weight^T` (or `out += ..`).
pub struct Output<'a> {
    /// `[rows, width]`.
    pub out: &'a mut [f32],
    /// Whether it is added to.
    pub into: Into,
    /// `[width, columns]`.
    pub weight: Weight<'a>,
}

/// Several projections of the same rows in one phase.
///
/// # Shapes
/// - x: `[rows, columns]`
pub fn project<const N: usize>(team: &mut Team<'_, '_>, x: &[f32], rows: usize, outputs: [Output<'_>; N]) {
    if rows == 0 {
        return;
    }
    let columns = x.len() / rows;
    let has_units = simd::level() == simd::Level::Avx512;
    let width_of_task = if has_units { TASK } else { PLAIN_TASK };
    let mut tasks = Vec::new();
    for Output { out, into, weight } in outputs {
        let width = out.len() / rows;
        assert_eq!(weight.len(), width * columns, "a weight has another shape");
        let out = Shared::new(out);
        tasks.extend((0..width).step_by(width_of_task).map(|first| Task { out, into, weight, width, first }));
    }
    if !has_units {
        return team.each(tasks.len(), |task| tasks[task].plain(MatrixRef::new(x, rows, columns)));
    }
    // SAFETY: the level says that the processor has the instructions.
    let x = unsafe { avx512::pack(x, rows, columns) };
    // SAFETY: as above.
    team.each(tasks.len(), |task| unsafe { avx512::run(&tasks[task], &x, rows, columns) });
}

/// Some columns of a projection.
struct Task<'a> {
    out: Shared<'a>,
    into: Into,
    weight: Weight<'a>,
    width: usize,
    first: usize,
}

impl Task<'_> {
    fn lines(&self) -> Range<usize> {
        self.first..(self.first + TASK).min(self.width)
    }

    /// Without AVX-512.
    fn plain(&self, x: MatrixRef<'_>) {
        let lines = self.first..(self.first + PLAIN_TASK).min(self.width);
        let weight = self.weight.rows(&lines, x.columns()).wide();
        // SAFETY: tasks have disjoint columns.
        let out = unsafe { self.out.from(lines.start) };
        matmul::matmul_serial(out, self.width, x, MatrixRef::new(&weight, lines.len(), x.columns()).t(), 1.0, self.into);
    }
}

#[cfg(target_arch = "x86_64")]
mod avx512 {
    use std::arch::x86_64::*;

    use super::{Into, TILE, Task, Weight};
    use crate::{
        bf16::widen,
        scratch::{Scratch, scratch},
        simd::LANES,
    };

    /// Rows whose sums are in registers at once.
    const ROWS: usize = 6;
    /// How many tiles ahead lines are fetched.
    const AHEAD: usize = 4;

    /// Rows in groups of [`ROWS`]. Sixteen terms of a group's rows lie side by side; terms beyond the last are zeros.
    #[target_feature(enable = "avx512f")]
    pub(super) fn pack(x: &[f32], rows: usize, columns: usize) -> Scratch<f32> {
        let stride = columns.next_multiple_of(LANES);
        let mut packed = scratch(rows * stride);
        let groups = packed.chunks_mut((ROWS * stride).max(1)).zip(x.chunks((ROWS * columns).max(1)));
        for (packed, x) in groups {
            let count = packed.len() / stride;
            for (row, x) in x.chunks_exact(columns).enumerate() {
                for (step, x) in x.chunks(LANES).enumerate() {
                    let to = &mut packed[(step * count + row) * LANES..][..LANES];
                    let mask = ((1_u32 << x.len()) - 1) as u16;
                    // SAFETY: the mask keeps the load within `x`; sixteen numbers are written.
                    unsafe { _mm512_storeu_ps(to.as_mut_ptr(), _mm512_maskz_loadu_ps(mask, x.as_ptr())) };
                }
            }
        }
        packed
    }

    /// `x` is packed.
    #[target_feature(enable = "avx512f,avx512dq,avx512vl")]
    pub(super) fn run(task: &Task<'_>, x: &[f32], rows: usize, columns: usize) {
        let stride = columns.next_multiple_of(LANES);
        let mut wide = Vec::new();
        for first in task.lines().step_by(TILE) {
            let count = (task.width - first).min(TILE);
            let elements = first * columns..(first + count) * columns;
            // Widened once for all rows: four lines stay in the first-level cache.
            let weight = match task.weight {
                Weight::F32(weight) => &weight[elements],
                Weight::Bf16(weight) => {
                    wide.resize(count * columns, 0.0);
                    let lines = wide.chunks_mut(2 * LANES).zip(weight[elements].chunks(2 * LANES));
                    for (wide, narrow) in lines {
                        _mm_prefetch::<_MM_HINT_T1>(narrow.as_ptr().wrapping_add(AHEAD * TILE * columns).cast());
                        for (wide, narrow) in wide.iter_mut().zip(narrow) {
                            *wide = widen(narrow.to_bits());
                        }
                    }
                    &wide[..]
                }
            };
            // Lines that are not there are the last one again: their sums are left out.
            let lines = std::array::from_fn(|line| &weight[line.min(count - 1) * columns..][..columns]);
            // The first sums fetch the lines that come later: the processor alone would be late.
            for row in (0..rows).step_by(ROWS) {
                let x = &x[row * stride..(row + ROWS).min(rows) * stride];
                match row / ROWS {
                    // What was widened came from elsewhere.
                    _ if matches!(task.weight, Weight::Bf16(_)) => rows_by_lines::<0>(task, x, lines, row, first, count),
                    0 if rows <= ROWS => rows_by_lines::<0b1111>(task, x, lines, row, first, count),
                    0 => rows_by_lines::<0b0011>(task, x, lines, row, first, count),
                    1 => rows_by_lines::<0b1100>(task, x, lines, row, first, count),
                    _ => rows_by_lines::<0>(task, x, lines, row, first, count),
                }
            }
        }
    }

    /// `FETCH` says after which of the lines to fetch.
    #[target_feature(enable = "avx512f,avx512dq,avx512vl")]
    #[inline]
    fn rows_by_lines<const FETCH: u8>(task: &Task<'_>, x: &[f32], lines: [&[f32]; TILE], row: usize, first: usize, count: usize) {
        match x.len() / lines[0].len().next_multiple_of(LANES) {
            1 => put(task, row, first, count, &tile::<1, FETCH>(x, lines)),
            2 => put(task, row, first, count, &tile::<2, FETCH>(x, lines)),
            3 => put(task, row, first, count, &tile::<3, FETCH>(x, lines)),
            4 => put(task, row, first, count, &tile::<4, FETCH>(x, lines)),
            5 => put(task, row, first, count, &tile::<5, FETCH>(x, lines)),
            _ => put(task, row, first, count, &tile::<ROWS, FETCH>(x, lines)),
        }
    }

    /// Writes or adds the sums of `count` columns from `column` on to rows from `row` on.
    #[target_feature(enable = "avx512f,avx512dq,avx512vl")]
    #[inline]
    fn put(task: &Task<'_>, row: usize, column: usize, count: usize, sums: &[__m128]) {
        let mask = (1_u8 << count) - 1;
        for (index, sums) in sums.iter().enumerate() {
            // SAFETY: tasks have disjoint columns, and the mask keeps to this one's.
            unsafe {
                let to = task.out.from((row + index) * task.width + column);
                assert!(count <= to.len());
                let to = to.as_mut_ptr();
                let sums = match task.into {
                    Into::Overwrite => *sums,
                    Into::Add => _mm_add_ps(_mm_maskz_loadu_ps(mask, to), *sums),
                };
                _mm_mask_storeu_ps(to, mask, sums);
            }
        }
    }

    /// Sums of a group of `ROWS` rows by four lines, each as it would be alone.
    #[target_feature(enable = "avx512f,avx512dq,avx512vl")]
    #[inline]
    fn tile<const ROWS: usize, const FETCH: u8>(x: &[f32], lines: [&[f32]; TILE]) -> [__m128; ROWS] {
        let columns = lines[0].len();
        assert!(x.len() == ROWS * columns.next_multiple_of(LANES) && lines.iter().all(|line| line.len() == columns));
        let mut sums = [[_mm512_setzero_ps(); TILE]; ROWS];
        // Loops, not closures: those would be compiled without the level's instructions.
        let mut weights = [_mm512_setzero_ps(); TILE];
        let whole = columns / LANES * LANES;
        for at in (0..whole).step_by(LANES) {
            for line in 0..TILE {
                let from = lines[line].as_ptr().wrapping_add(at);
                if FETCH >> line & 1 == 1 {
                    _mm_prefetch::<_MM_HINT_T1>(from.wrapping_add(AHEAD * TILE * columns).cast());
                }
                // SAFETY: sixteen numbers from there on are within the line.
                weights[line] = unsafe { _mm512_loadu_ps(from) };
            }
            // SAFETY: the assertion says that there are sixteen of each row.
            unsafe { add(&mut sums, x.as_ptr().add(at * ROWS), weights) };
        }
        if whole < columns {
            let mask = ((1_u32 << (columns - whole)) - 1) as u16;
            for line in 0..TILE {
                // SAFETY: the mask keeps the load within the line.
                weights[line] = unsafe { _mm512_maskz_loadu_ps(mask, lines[line].as_ptr().add(whole)) };
            }
            // SAFETY: as above.
            unsafe { add(&mut sums, x.as_ptr().add(whole * ROWS), weights) };
        }
        let mut out = [_mm_setzero_ps(); ROWS];
        for (out, sums) in out.iter_mut().zip(sums) {
            *out = sum_each(sums);
        }
        out
    }

    /// Adds sixteen terms of each row.
    ///
    /// # Safety
    /// They must be at `x`.
    #[target_feature(enable = "avx512f,avx512dq,avx512vl")]
    #[inline]
    unsafe fn add<const ROWS: usize>(sums: &mut [[__m512; TILE]; ROWS], x: *const f32, weights: [__m512; TILE]) {
        for (row, sums) in sums.iter_mut().enumerate() {
            // SAFETY: as the caller promises.
            let x = unsafe { _mm512_loadu_ps(x.add(row * LANES)) };
            for (sum, weights) in sums.iter_mut().zip(weights) {
                *sum = _mm512_fmadd_ps(x, weights, *sum);
            }
        }
    }

    /// Lane `i` of the result is the sum of the lanes of vector `i`: a tree whose shape is the same for each.
    #[target_feature(enable = "avx512f,avx512dq,avx512vl")]
    #[inline]
    fn sum_each([a, b, c, d]: [__m512; TILE]) -> __m128 {
        // Lanes of a 128-bit part hold that part's sums of the four vectors.
        let ab = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
        let cd = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
        let parts = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
        let halves = _mm256_add_ps(_mm512_castps512_ps256(parts), _mm512_extractf32x8_ps::<1>(parts));
        _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps::<1>(halves))
    }
}

#[cfg(not(target_arch = "x86_64"))]
mod avx512 {
    pub(super) fn pack(_: &[f32], _: usize, _: usize) -> Vec<f32> {
        unreachable!("`project` takes another way without AVX-512")
    }

    pub(super) fn run(_: &super::Task<'_>, _: &[f32], _: usize, _: usize) {
        unreachable!("`project` takes another way without AVX-512")
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    /// Small whole numbers: every sum is exact, in any order.
    fn numbers(len: usize, seed: usize) -> Vec<f32> {
        (0..len).map(|i| ((i * 7 + seed * 3 + i / 5) % 11) as f32 - 5.0).collect()
    }

    #[test]
    fn projections_are_what_their_definition_says() {
        for (rows, columns, width) in [(1, 1, 1), (1, 16, 4), (3, 17, 5), (4, 33, 66), (16, 40, 130), (7, 64, 63)] {
            let (x, weight) = (numbers(rows * columns, 1), numbers(width * columns, 2));
            let narrow: Vec<bf16> = weight.iter().map(|value| bf16::from_f32(*value)).collect();
            let expected = |begin: f32, row: usize, column: usize| {
                begin + (0..columns).map(|at| x[row * columns + at] * weight[column * columns + at]).sum::<f32>()
            };
            let (mut written, mut added) = (vec![f32::NAN; rows * width], vec![1.0; rows * width]);
            let outputs = [
                Output { out: &mut written, into: Into::Overwrite, weight: Weight::F32(&weight) },
                Output { out: &mut added, into: Into::Add, weight: Weight::Bf16(&narrow) },
            ];
            Team::with(|team| project(team, &x, rows, outputs));
            for row in 0..rows {
                for column in 0..width {
                    assert_eq!(written[row * width + column], expected(0.0, row, column), "{rows} {columns} {width}: {row} {column}");
                    assert_eq!(added[row * width + column], expected(1.0, row, column));
                }
            }
        }
    }

    #[test]
    fn a_row_does_not_depend_on_its_neighbours() {
        let (rows, columns, width) = (9, 77, 70);
        let fractions = |len: usize| (0..len).map(|i| ((i * 37 % 101) as f32).sin()).collect::<Vec<f32>>();
        let (x, weight) = (fractions(rows * columns), fractions(width * columns));
        let product = |x: &[f32], rows: usize| {
            let mut out = vec![0.0; rows * width];
            let output = Output { out: &mut out, into: Into::Overwrite, weight: Weight::F32(&weight) };
            Team::with(|team| project(team, x, rows, [output]));
            out
        };
        if simd::level() == simd::Level::Avx512 {
            let all = product(&x, rows);
            for row in 0..rows {
                assert_eq!(product(&x[row * columns..(row + 1) * columns], 1), all[row * width..(row + 1) * width], "row {row}");
            }
        }
    }
}

//! Dot products of AVX-512 BF16.

use std::arch::x86_64::{
    __m512bh, __m512i, _mm512_dpbf16_ps, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_set1_epi32, _mm512_setzero_ps, _mm512_storeu_ps,
};

use super::{BLOCK, DEPTH, Into, PANEL, TILE};

/// Rows whose sums are in registers at once: 8 rows by 2 vectors.
const ROWS: usize = 8;

/// Whether the processor has them.
pub(super) fn is_available() -> bool {
    is_x86_feature_detected!("avx512bf16") && is_x86_feature_detected!("avx512f")
}

/// A panel of rows by a panel of columns.
pub(super) fn panel(left: &[u16], right: &[u16], out: &mut [f32], out_row_stride: usize, into: Into) {
    assert!(is_available() && left.len() == right.len());
    // SAFETY: the processor has the instructions.
    unsafe { rows(left, right, out, out_row_stride, into) }
}

#[target_feature(enable = "avx512f,avx512bf16")]
fn rows(left: &[u16], right: &[u16], out: &mut [f32], out_row_stride: usize, into: Into) {
    for first in (0..PANEL).step_by(ROWS) {
        let mut acc = [[_mm512_setzero_ps(); 2]; ROWS];
        if into == Into::Add {
            for (row, acc) in acc.iter_mut().enumerate() {
                for (half, acc) in acc.iter_mut().enumerate() {
                    let from = &out[(first + row) * out_row_stride + half * TILE..][..TILE];
                    // SAFETY: 16 numbers.
                    *acc = unsafe { _mm512_loadu_ps(from.as_ptr()) };
                }
            }
        }
        for (left, right) in left.chunks_exact(BLOCK).zip(right.chunks_exact(BLOCK)) {
            // Tile, row in it: a pair of numbers each as one 32-bit lane.
            let left = &left[first * DEPTH..(first + ROWS) * DEPTH];
            for pair in 0..DEPTH / 2 {
                let [low, high] = [0, BLOCK / 2].map(|tile| load(&right[tile + pair * DEPTH..][..DEPTH]));
                for (row, acc) in acc.iter_mut().enumerate() {
                    let at = row * DEPTH + 2 * pair;
                    // SAFETY: two of the `ROWS * DEPTH` numbers of `left`, read as one lane.
                    let both = unsafe { left.as_ptr().add(at).cast::<i32>().read_unaligned() };
                    let both = as_bf16(_mm512_set1_epi32(both));
                    acc[0] = _mm512_dpbf16_ps(acc[0], both, low);
                    acc[1] = _mm512_dpbf16_ps(acc[1], both, high);
                }
            }
        }
        for (row, acc) in acc.iter().enumerate() {
            for (half, acc) in acc.iter().enumerate() {
                let out = &mut out[(first + row) * out_row_stride + half * TILE..][..TILE];
                // SAFETY: 16 numbers.
                unsafe { _mm512_storeu_ps(out.as_mut_ptr(), *acc) };
            }
        }
    }
}

#[target_feature(enable = "avx512f")]
fn load(row: &[u16]) -> __m512bh {
    assert!(row.len() == DEPTH);
    // SAFETY: 64 bytes.
    as_bf16(unsafe { _mm512_loadu_si512(row.as_ptr().cast()) })
}

fn as_bf16(bits: __m512i) -> __m512bh {
    // SAFETY: both are 512 bits without invalid values.
    unsafe { std::mem::transmute(bits) }
}

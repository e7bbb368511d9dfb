//! Rounds operands into the order in which tiles take them.

use std::{arch::x86_64::*, mem::MaybeUninit};

use half::bf16;

use super::{BLOCK, DEPTH, TILE};
use crate::{matmul::MatrixRef, simd::transpose, weight::Weight};

/// One side of a product: `lines` (rows of the left, columns of the right operand) along the summed dimension.
#[derive(Clone, Copy)]
pub(super) struct Side<'a> {
    data: Weight<'a>,
    lines: usize,
    line_stride: usize,
    depth: usize,
    depth_stride: usize,
    is_left: bool,
}

impl<'a> Side<'a> {
    pub(super) fn left(matrix: MatrixRef<'a>) -> Self {
        let (data, line_stride, depth_stride) = matrix.parts();
        let data = Weight::F32(data);
        Self { data, lines: matrix.rows(), line_stride, depth: matrix.columns(), depth_stride, is_left: true }
    }

    pub(super) fn right(matrix: MatrixRef<'a>) -> Self {
        let (data, line_stride, depth_stride) = matrix.t().parts();
        let data = Weight::F32(data);
        Self { data, lines: matrix.columns(), line_stride, depth: matrix.rows(), depth_stride, is_left: false }
    }

    /// The columns of a row-major weight, or of its transpose.
    pub(super) fn right_weight(weight: &'a [bf16], columns: usize, transposed: bool) -> Self {
        let (data, rows) = (Weight::Bf16(weight), weight.len() / columns.max(1));
        match transposed {
            false => Self { data, lines: columns, line_stride: 1, depth: rows, depth_stride: columns, is_left: false },
            true => Self { data, lines: rows, line_stride: columns, depth: columns, depth_stride: 1, is_left: false },
        }
    }

    /// Lines and depth.
    pub(super) fn size(&self) -> [usize; 2] {
        [self.lines, self.depth]
    }

    /// Writes all of `packed`: panels of lines from `first` on, each with the depth from `start` on that fills its `panel_len` of `packed`. Lines
    /// and depth beyond the operand are zeros.
    ///
    /// For each block of the depth a panel has two tiles. A tile of the left side has a line a row; in one of the right side row
    /// `p` holds elements `2p` and `2p + 1` of every line side by side.
    pub(super) fn pack(&self, packed: &mut [MaybeUninit<u16>], panel_len: usize, first: usize, start: usize) {
        // SAFETY: tiles are used only where the processor has these features (`bf16::Unit::available`).
        unsafe {
            match self.data {
                Weight::F32(_) => self.pack_panels::<false>(packed, panel_len, first, start),
                Weight::Bf16(_) => self.pack_panels::<true>(packed, panel_len, first, start),
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    fn pack_panels<const NARROW: bool>(&self, packed: &mut [MaybeUninit<u16>], panel_len: usize, first: usize, start: usize) {
        let across = self.line_stride == 1 && self.depth_stride != 1;
        // Panels side by side block after block: so lines that lie across are read along the memory.
        for block in 0..panel_len / BLOCK {
            for (panel, packed) in packed.chunks_exact_mut(panel_len).enumerate() {
                let (tiles, _) = packed[block * BLOCK..].as_chunks_mut::<{ TILE * DEPTH }>();
                for (tile, to) in tiles.iter_mut().take(2).enumerate() {
                    let (line, depth) = (first + (2 * panel + tile) * TILE, start + block * DEPTH);
                    let is_whole = line + TILE <= self.lines && depth + DEPTH <= self.depth;
                    // Each with its own stores: so a tile stays in registers.
                    match (across, is_whole && (across || self.depth_stride == 1)) {
                        (true, true) => self.store(to, self.whole_across::<NARROW>(line, depth), self.is_left),
                        (true, false) => self.store(to, self.across::<NARROW>(line, depth), self.is_left),
                        (false, true) => self.store(to, self.whole_along::<NARROW>(line, depth), !self.is_left),
                        (false, false) => self.store(to, self.along::<NARROW>(line, depth), !self.is_left),
                    }
                }
            }
        }
    }

    /// A line a row: pairs of neighbours in depth.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    fn along<const NARROW: bool>(&self, line: usize, depth: usize) -> [__m512i; TILE] {
        let mut rows = [_mm512_setzero_si512(); TILE];
        for (row, to) in rows.iter_mut().take(self.lines.saturating_sub(line)).enumerate() {
            let from = (line + row) * self.line_stride;
            let low = self.load::<NARROW>(from, self.depth_stride, depth, self.depth);
            let high = self.load::<NARROW>(from, self.depth_stride, depth + TILE, self.depth);
            *to = round(low, high);
        }
        rows
    }

    /// [`Self::along`] for a tile that is all there.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    #[inline]
    fn whole_along<const NARROW: bool>(&self, line: usize, depth: usize) -> [__m512i; TILE] {
        let stride = self.line_stride;
        let elements = line * stride + depth..(line + TILE - 1) * stride + depth + DEPTH;
        let mut rows = [_mm512_setzero_si512(); TILE];
        match self.data {
            Weight::F32(data) if !NARROW => {
                let from = data[elements].as_ptr();
                for (row, to) in rows.iter_mut().enumerate() {
                    // SAFETY: the slice has 32 numbers from the beginning of each line on.
                    unsafe {
                        let from = from.add(row * stride);
                        *to = round(_mm512_loadu_ps(from), _mm512_loadu_ps(from.add(TILE)));
                    }
                }
            }
            Weight::Bf16(data) if NARROW => {
                let from = data[elements].as_ptr();
                for (row, to) in rows.iter_mut().enumerate() {
                    // SAFETY: as above.
                    *to = unsafe { _mm512_loadu_si512(from.add(row * stride).cast()) };
                }
            }
            _ => {}
        }
        rows
    }

    /// A pair of depths a row: both numbers of every line.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    fn across<const NARROW: bool>(&self, line: usize, depth: usize) -> [__m512i; TILE] {
        let alternating = alternating();
        let mut rows = [_mm512_setzero_si512(); TILE];
        for (row, to) in rows.iter_mut().enumerate() {
            let at = depth + 2 * row;
            if at >= self.depth {
                break;
            }
            let even = self.load::<NARROW>(at * self.depth_stride, 1, line, self.lines);
            let odd = match at + 1 < self.depth {
                true => self.load::<NARROW>((at + 1) * self.depth_stride, 1, line, self.lines),
                false => _mm512_setzero_ps(),
            };
            *to = _mm512_permutexvar_epi16(alternating, round(even, odd));
        }
        rows
    }

    /// [`Self::across`] for a tile that is all there.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    #[inline]
    fn whole_across<const NARROW: bool>(&self, line: usize, depth: usize) -> [__m512i; TILE] {
        let (alternating, stride) = (alternating(), self.depth_stride);
        let elements = depth * stride + line..(depth + DEPTH - 1) * stride + line + TILE;
        let mut rows = [_mm512_setzero_si512(); TILE];
        match self.data {
            Weight::F32(data) if !NARROW => {
                let from = data[elements].as_ptr();
                for (row, to) in rows.iter_mut().enumerate() {
                    // SAFETY: the slice has 16 numbers of each of 32 depths.
                    unsafe {
                        let from = from.add(2 * row * stride);
                        *to = _mm512_permutexvar_epi16(alternating, round(_mm512_loadu_ps(from), _mm512_loadu_ps(from.add(stride))));
                    }
                }
            }
            Weight::Bf16(data) if NARROW => {
                let from = data[elements].as_ptr();
                for (row, to) in rows.iter_mut().enumerate() {
                    // SAFETY: as above.
                    unsafe {
                        let from = from.add(2 * row * stride);
                        let [even, odd] = [from, from.add(stride)].map(|from| _mm256_loadu_si256(from.cast()));
                        let both = _mm512_inserti64x4::<1>(_mm512_castsi256_si512(even), odd);
                        *to = _mm512_permutexvar_epi16(alternating, both);
                    }
                }
            }
            _ => {}
        }
        rows
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")]
    #[inline]
    fn store(&self, to: &mut [MaybeUninit<u16>; TILE * DEPTH], mut rows: [__m512i; TILE], transposed: bool) {
        if transposed {
            transpose(&mut rows);
        }
        for (to, row) in to.chunks_exact_mut(DEPTH).zip(rows) {
            // SAFETY: 64 bytes.
            unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), row) };
        }
    }

    /// Sixteen numbers `stride` apart, the first of them number `at` from `from` on; those from `end` on are zeros.
    #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
    #[inline]
    fn load<const NARROW: bool>(&self, from: usize, stride: usize, at: usize, end: usize) -> __m512 {
        match (NARROW, self.data) {
            (false, Weight::F32(data)) => load_wide(data, from, stride, at, end),
            (true, Weight::Bf16(data)) => load_narrow(data, from, stride, at, end),
            _ => _mm512_setzero_ps(),
        }
    }
}

/// [`Side::load`] of f32.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
#[inline]
fn load_wide(data: &[f32], from: usize, stride: usize, at: usize, end: usize) -> __m512 {
    let start = from + at * stride;
    if stride == 1
        && at + TILE <= end
        && let Some(elements) = data.get(start..start + TILE)
    {
        // SAFETY: sixteen numbers.
        return unsafe { _mm512_loadu_ps(elements.as_ptr()) };
    }
    let count = end.saturating_sub(at).min(TILE);
    if count == 0 {
        return _mm512_setzero_ps();
    }
    let elements = &data[start..=start + (count - 1) * stride];
    let mask = ((1_u32 << count) - 1) as u16;
    // SAFETY: the mask keeps the load within `elements`.
    unsafe {
        if stride == 1 {
            return _mm512_maskz_loadu_ps(mask, elements.as_ptr());
        }
        let lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        let offsets = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(stride as i32));
        _mm512_mask_i32gather_ps::<4>(_mm512_setzero_ps(), mask, offsets, elements.as_ptr())
    }
}

/// [`Side::load`] of bfloat16.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
#[inline]
fn load_narrow(data: &[bf16], from: usize, stride: usize, at: usize, end: usize) -> __m512 {
    let start = from + at * stride;
    let count = end.saturating_sub(at).min(TILE);
    if count == 0 {
        return _mm512_setzero_ps();
    }
    let elements = &data[start..=start + (count - 1) * stride];
    let numbers = if stride == 1 {
        // SAFETY: the mask keeps the load within `elements`.
        unsafe { _mm256_maskz_loadu_epi16(((1_u32 << count) - 1) as u16, elements.as_ptr().cast()) }
    } else {
        let mut numbers = [bf16::ZERO; TILE];
        numbers.iter_mut().zip(elements.iter().step_by(stride)).for_each(|(to, from)| *to = *from);
        // SAFETY: sixteen numbers.
        unsafe { _mm256_loadu_si256(numbers.as_ptr().cast()) }
    };
    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(numbers)))
}

/// Numbers rounded to bfloat16, those of `low` first.
#[target_feature(enable = "avx512f,avx512bf16")]
#[inline]
fn round(low: __m512, high: __m512) -> __m512i {
    // SAFETY: both are 512 bits without invalid values.
    unsafe { std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low)) }
}

/// Places that bring number `i` of the first half next to number `i` of the second.
#[target_feature(enable = "avx512f")]
#[inline]
fn alternating() -> __m512i {
    let lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    _mm512_or_si512(lanes, _mm512_slli_epi32::<16>(_mm512_add_epi32(lanes, _mm512_set1_epi32(TILE as i32))))
}

//! SIMD levels chosen at run time, and the lane arithmetic that kernels share.

use std::sync::OnceLock;

/// What the processor offers, as far as the kernels care.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// No fused multiply-add assumed.
    Baseline,
    /// AVX2 with FMA.
    Avx2,
    /// AVX-512 F, VL, BW, DQ.
    Avx512,
}

impl Level {
    /// Name for the numerics profile.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Baseline => "baseline",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
        }
    }
}

/// The level in use. `RLFLOW_SIMD=baseline|avx2` lowers it, for tests.
pub fn level() -> Level {
    static LEVEL: OnceLock<Level> = OnceLock::new();
    *LEVEL.get_or_init(|| {
        let best = detect();
        match std::env::var("RLFLOW_SIMD").as_deref() {
            Ok("baseline") => Level::Baseline,
            Ok("avx2") => best.min(Level::Avx2),
            _ => best,
        }
    })
}

#[cfg(target_arch = "x86_64")]
fn detect() -> Level {
    let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
    let avx512 = is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq");
    match (avx2, avx512) {
        (true, true) => Level::Avx512,
        (true, false) => Level::Avx2,
        _ => Level::Baseline,
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn detect() -> Level {
    Level::Baseline
}

/// Defines `$name`, which runs the always-inlined `$inner::<FMA>` compiled for the level in use.
macro_rules! multiversion {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? = $inner:ident) => {
        $(#[$meta])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name($($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn avx512($($arg: $ty),*) $(-> $ret)? { $inner::<true>($($arg),*) }
                #[target_feature(enable = "avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn avx2($($arg: $ty),*) $(-> $ret)? { $inner::<true>($($arg),*) }
                // SAFETY: `level` says that the processor has these features.
                match $crate::simd::level() {
                    $crate::simd::Level::Avx512 => return unsafe { avx512($($arg),*) },
                    $crate::simd::Level::Avx2 => return unsafe { avx2($($arg),*) },
                    $crate::simd::Level::Baseline => {}
                }
            }
            $inner::<false>($($arg),*)
        }
    };
}
pub(crate) use multiversion;

/// Lanes that reductions are spread over, whatever the hardware's width.
pub const LANES: usize = 16;

/// `a * b + c`, fused where the level has it.
#[inline(always)]
pub fn fmadd<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// Adds lanes as a fixed tree.
#[inline(always)]
pub fn lane_sum(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// Dot product in lanes.
#[inline(always)]
pub fn dot<const FMA: bool>(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0.0; LANES];
    let (a_chunks, a_tail) = a.as_chunks::<LANES>();
    let (b_chunks, b_tail) = b.as_chunks::<LANES>();
    for (a, b) in a_chunks.iter().zip(b_chunks) {
        for lane in 0..LANES {
            lanes[lane] = fmadd::<FMA>(a[lane], b[lane], lanes[lane]);
        }
    }
    let mut sum = lane_sum(lanes);
    for (a, b) in a_tail.iter().zip(b_tail) {
        sum = fmadd::<FMA>(*a, *b, sum);
    }
    sum
}

/// Sum in lanes.
#[inline(always)]
pub fn sum(values: &[f32]) -> f32 {
    let mut lanes = [0.0; LANES];
    let (chunks, tail) = values.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            lanes[lane] += chunk[lane];
        }
    }
    tail.iter().fold(lane_sum(lanes), |sum, value| sum + value)
}

/// Largest value. NaN propagates to a sum later, not here: comparisons skip it.
#[inline(always)]
pub fn max(values: &[f32]) -> f32 {
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, tail) = values.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            lanes[lane] = if chunk[lane] > lanes[lane] { chunk[lane] } else { lanes[lane] };
        }
    }
    lanes.iter().chain(tail).fold(f32::NEG_INFINITY, |max, value| if *value > max { *value } else { max })
}

/// `e^x` within 3e-7 of its value, for any `x`; NaN stays NaN, so that divergence is seen.
///
/// Cody-Waite reduction to `[-ln2/2, ln2/2]` and a degree-6 polynomial, in a form that compilers vectorise.
#[inline(always)]
pub fn exp<const FMA: bool>(x: f32) -> f32 {
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Comparisons are written so that NaN falls through unchanged.
    let x = if x > 88.8 { 88.8 } else { x };
    let clamped = if x < -87.3 { -87.3 } else { x };
    // Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits.
    let shifted = fmadd::<FMA>(clamped, std::f32::consts::LOG2_E, 12_582_912.0);
    let n = shifted - 12_582_912.0;
    let r = fmadd::<FMA>(-n, LN2_LOW, fmadd::<FMA>(-n, LN2_HIGH, clamped));
    let mut p = 1.0 / 720.0;
    p = fmadd::<FMA>(p, r, 1.0 / 120.0);
    p = fmadd::<FMA>(p, r, 1.0 / 24.0);
    p = fmadd::<FMA>(p, r, 1.0 / 6.0);
    p = fmadd::<FMA>(p, r, 0.5);
    p = fmadd::<FMA>(p, r, 1.0);
    p = fmadd::<FMA>(p, r, 1.0);
    // Two factors, because 2^128 alone is not representable.
    // NaN gives any integer here, and `p` is NaN then.
    let n = (shifted.to_bits() as i32).wrapping_sub(0x4B40_0000);
    let half = n >> 1;
    let scale = |e: i32| f32::from_bits((e.wrapping_add(127) as u32) << 23);
    let value = p * scale(half) * scale(n - half);
    if x < -87.3 { 0.0 } else { value }
}

/// `1 / (1 + e^-x)`.
#[inline(always)]
pub fn sigmoid<const FMA: bool>(x: f32) -> f32 {
    1.0 / (1.0 + exp::<FMA>(-x))
}

/// Elements of a partial sum of [`softmax_weights`].
const SOFTMAX_BLOCK: usize = 512;

multiversion!(
    /// Logits `z` become `exp(z * scale - max)`; returns their sums in blocks of equal length, the last of which may be
    /// shorter. What cannot be drawn has the weight 0.
    pub fn softmax_weights(logits: &mut [f32], scale: f32) -> Vec<f64> = softmax_weights_inner
);

#[inline(always)]
fn softmax_weights_inner<const FMA: bool>(logits: &mut [f32], scale: f32) -> Vec<f64> {
    let largest = max(logits) * scale;
    // Blocks of one length, so that their number says where each begins.
    let block = logits.len().div_ceil(logits.len().div_ceil(SOFTMAX_BLOCK).max(1)).max(1);
    let mut sums = Vec::with_capacity(logits.len().div_ceil(block));
    // Loops, not closures: a closure would be compiled without the level's instructions.
    for logits in logits.chunks_mut(block) {
        for logit in logits.iter_mut() {
            *logit = exp::<FMA>(fmadd::<FMA>(*logit, scale, -largest));
        }
        sums.push(f64::from(sum(logits)));
    }
    sums
}

/// Transposes 16 by 16 lanes.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f")]
#[inline]
pub(crate) fn transpose(rows: &mut [std::arch::x86_64::__m512i; LANES]) {
    use std::arch::x86_64::*;

    let mut pairs = [_mm512_setzero_si512(); LANES];
    for i in 0..8 {
        pairs[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
        pairs[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
    }
    // Row `4i + j` of `quads` has columns `j, j + 4, j + 8, j + 12` of rows `4i` to `4i + 3`.
    let mut quads = [_mm512_setzero_si512(); LANES];
    for i in 0..4 {
        for j in 0..2 {
            quads[4 * i + 2 * j] = _mm512_unpacklo_epi64(pairs[4 * i + j], pairs[4 * i + 2 + j]);
            quads[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(pairs[4 * i + j], pairs[4 * i + 2 + j]);
        }
    }
    for j in 0..4 {
        let low = _mm512_shuffle_i32x4::<0b1000_1000>(quads[j], quads[4 + j]);
        let low_odd = _mm512_shuffle_i32x4::<0b1101_1101>(quads[j], quads[4 + j]);
        let high = _mm512_shuffle_i32x4::<0b1000_1000>(quads[8 + j], quads[12 + j]);
        let high_odd = _mm512_shuffle_i32x4::<0b1101_1101>(quads[8 + j], quads[12 + j]);
        rows[j] = _mm512_shuffle_i32x4::<0b1000_1000>(low, high);
        rows[8 + j] = _mm512_shuffle_i32x4::<0b1101_1101>(low, high);
        rows[4 + j] = _mm512_shuffle_i32x4::<0b1000_1000>(low_odd, high_odd);
        rows[12 + j] = _mm512_shuffle_i32x4::<0b1101_1101>(low_odd, high_odd);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_to_the_library_and_keeps_nan() {
        let mut worst: f64 = 0.0;
        for i in -870_000..880_000 {
            let x = i as f32 * 1e-4;
            for value in [exp::<false>(x), exp::<true>(x)] {
                let exact = f64::from(x).exp();
                worst = worst.max(((f64::from(value) - exact) / exact).abs());
            }
        }
        assert!(worst < 3e-7, "{worst}");
        assert!(exp::<true>(f32::NAN).is_nan() && exp::<false>(f32::NAN).is_nan());
        assert_eq!(exp::<true>(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp::<true>(0.0), 1.0);
        assert!(exp::<false>(88.7).is_finite() && exp::<true>(200.0) > 1e38);
    }
}

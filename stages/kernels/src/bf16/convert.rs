//! Between f32 and bfloat16, many numbers at once.

use half::bf16;
use rayon::prelude::*;

use super::{round, widen};
use crate::memory::Parts;

/// Numbers per parallel task.
const BLOCK: usize = 1 << 14;

/// The same numbers as f32: exact.
pub fn widen_all(narrow: &[bf16]) -> Vec<f32> {
    let wide = Parts::new(narrow.len());
    narrow.par_chunks(BLOCK).enumerate().for_each(|(block, narrow)| {
        // SAFETY: each task has its own block.
        let wide = unsafe { wide.unwritten(block * BLOCK..block * BLOCK + narrow.len()) };
        for (wide, narrow) in wide.iter_mut().zip(narrow) {
            wide.write(widen(narrow.to_bits()));
        }
    });
    // SAFETY: the blocks are all numbers.
    unsafe { wide.finish() }
}

/// Rounded as products round their operands.
pub fn round_all(wide: &[f32]) -> Vec<bf16> {
    let narrow = Parts::new(wide.len());
    wide.par_chunks(BLOCK).enumerate().for_each(|(block, wide)| {
        // SAFETY: each task has its own block.
        let narrow = unsafe { narrow.unwritten(block * BLOCK..block * BLOCK + wide.len()) };
        for (narrow, wide) in narrow.iter_mut().zip(wide) {
            narrow.write(bf16::from_bits(round(*wide)));
        }
    });
    // SAFETY: the blocks are all numbers.
    unsafe { narrow.finish() }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Against `half`, over every upper half and the lower halves around ties.
    #[test]
    fn rounding_is_that_of_half() {
        let lows = [0u32, 1, 0x7fff, 0x8000, 0x8001, 0xffff];
        let wide: Vec<f32> = (0..=0xffffu32).flat_map(|high| lows.map(|low| f32::from_bits((high << 16) | low))).collect();
        let ours = round_all(&wide);
        let same = |ours: &bf16, wide: &f32| if wide.is_nan() { ours.is_nan() } else { ours.to_bits() == bf16::from_f32(*wide).to_bits() };
        assert!(ours.iter().zip(&wide).all(|(ours, wide)| same(ours, wide)));
        assert!(widen_all(&ours).iter().zip(&ours).all(|(wide, narrow)| wide.to_bits() >> 16 == u32::from(narrow.to_bits())));
    }
}

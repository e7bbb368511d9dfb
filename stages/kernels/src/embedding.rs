//! Token embedding.

use rayon::prelude::*;

use crate::{bf16::widen, memory::Parts, weight::Weight};

/// Rows that a task copies.
const ROWS: usize = 64;

/// `weight[ids[t]]` for every `t`.
///
/// # Shapes
/// - result: `[tokens, hidden]`; weight: `[vocab, hidden]`; ids: `[tokens]`
pub fn embed(weight: Weight<'_>, ids: &[u32], hidden: usize) -> Vec<f32> {
    let out = Parts::new(ids.len() * hidden);
    ids.par_chunks(ROWS).enumerate().for_each(|(task, ids)| {
        for (row, id) in ids.iter().enumerate() {
            let (at, from) = ((task * ROWS + row) * hidden, *id as usize * hidden..(*id as usize + 1) * hidden);
            // SAFETY: each row is written once, by the task that has it.
            let out = unsafe { out.unwritten(at..at + hidden) };
            match weight {
                Weight::F32(weight) => _ = out.write_copy_of_slice(&weight[from]),
                Weight::Bf16(weight) => out.iter_mut().zip(&weight[from]).for_each(|(out, value)| _ = out.write(widen(value.to_bits()))),
            }
        }
    });
    // SAFETY: the tasks have all rows.
    unsafe { out.finish() }
}

/// `dweight[ids[t]] += dout[t]`, tokens in order, so that a token that stands twice has one sum.
pub fn embed_backward(dweight: &mut [f32], dout: &[f32], ids: &[u32], hidden: usize) {
    // Each task owns a range of vocabulary rows and scans all ids: no two tasks write one row.
    let rows = (dweight.len() / hidden).div_ceil(8).max(1);
    dweight.par_chunks_mut(rows * hidden).enumerate().for_each(|(task, dweight)| {
        let first = task * rows;
        for (dout, id) in dout.chunks_exact(hidden).zip(ids) {
            let Some(row) = (*id as usize).checked_sub(first).filter(|row| (row + 1) * hidden <= dweight.len()) else { continue };
            for (sum, value) in dweight[row * hidden..][..hidden].iter_mut().zip(dout) {
                *sum += value;
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    #[test]
    fn rows_are_those_of_their_ids_in_both_formats() {
        let (vocab, hidden) = (7, 3);
        let table: Vec<f32> = (0..vocab * hidden).map(|i| i as f32).collect();
        let narrow: Vec<bf16> = table.iter().map(|value| bf16::from_f32(*value)).collect();
        let ids: Vec<u32> = (0..2 * ROWS as u32 + 5).map(|i| i * 5 % vocab as u32).collect();
        let expected: Vec<f32> = ids.iter().flat_map(|id| (0..3).map(move |column| (id * 3 + column) as f32)).collect();
        assert_eq!(embed(Weight::F32(&table), &ids, hidden), expected);
        assert_eq!(embed(Weight::Bf16(&narrow), &ids, hidden), expected);
    }
}

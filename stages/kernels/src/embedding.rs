//! Token embedding.

use rayon::prelude::*;

/// `out[t] = weight[ids[t]]`.
///
/// # Shapes
/// - out: `[tokens, hidden]`; weight: `[vocab, hidden]`; ids: `[tokens]`
pub fn embed(out: &mut [f32], weight: &[f32], ids: &[u32], hidden: usize) {
    for (out, id) in out.chunks_exact_mut(hidden).zip(ids) {
        out.copy_from_slice(&weight[*id as usize * hidden..][..hidden]);
    }
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

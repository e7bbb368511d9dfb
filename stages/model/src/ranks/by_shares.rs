use std::{ops::Range, sync::Arc};

use burn::tensor::Tensor;

use super::{Collective, Pending, cut, join};

/// Ranks whose tensors travel to each other, from one device to another: a sum that all want whole is added up in shares, one by
/// each rank, and gathered. So a rank takes in twice what it holds, and not that times the number of ranks. Elements are added in
/// the order of ranks as before, so the bits are the same.
#[derive(Debug)]
pub(super) struct ByShares(pub Arc<dyn Collective>);

impl Collective for ByShares {
    fn rank(&self) -> usize {
        self.0.rank()
    }

    fn ranks(&self) -> usize {
        self.0.ranks()
    }

    fn reduce_scatter(&self, sum: Option<Tensor<2>>, part: Option<Tensor<2>>, shares: &[Range<usize>]) -> Option<Tensor<2>> {
        self.0.reduce_scatter(sum, part, shares)
    }

    fn all_reduce(&self, sum: Option<Tensor<2>>, part: Option<Tensor<2>>) -> Option<Tensor<2>> {
        // A rank without a part learns from the others what shape it would have.
        let dims = part.as_ref().map(|part| part.dims().map(|size| size as f64).to_vec()).unwrap_or_default();
        let told = self.0.all_gather_values(dims).into_iter().find(|dims| !dims.is_empty());
        let Some([rows, columns]) = told.as_deref() else { return sum };
        let dims = [*rows as usize, *columns as usize];
        let (len, count) = (dims[0] * dims[1], self.ranks());
        let shares: Vec<Range<usize>> = (0..count).map(|rank| rank * len / count..(rank + 1) * len / count).collect();
        let device = part.as_ref().or(sum.as_ref()).map(Tensor::device);
        let own = sum.as_ref().map(|sum| cut(sum, shares[self.rank()].clone()));
        drop(sum);
        let own = self.0.reduce_scatter(own, part, &shares)?;
        let device = device.unwrap_or_else(|| own.device());
        Some(join(&self.0.all_gather(own), dims, &device))
    }

    fn all_gather(&self, piece: Tensor<2>) -> Vec<Tensor<2>> {
        self.0.all_gather(piece)
    }

    fn start_all_gather(&self, piece: Tensor<2>) -> Pending {
        self.0.start_all_gather(piece)
    }

    fn all_gather_values(&self, values: Vec<f64>) -> Vec<Vec<f64>> {
        self.0.all_gather_values(values)
    }

    fn broadcast(&self, root: usize, value: Option<Tensor<2>>) -> Option<Tensor<2>> {
        self.0.broadcast(root, value)
    }

    fn barrier(&self) {
        self.0.barrier();
    }

    fn abort(&self, why: &str) {
        self.0.abort(why);
    }

    fn aborted(&self) -> Option<String> {
        self.0.aborted()
    }
}

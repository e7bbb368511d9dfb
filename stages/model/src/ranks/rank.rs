use std::{ops::Range, sync::Arc};

use burn::tensor::{Device, Tensor};
use rlflow_api::ZeroLevel;

use super::{Collective, cut, paste};
use crate::{Decoder, Gradients, Optimizer, OptimizerSettings, optimizer};

/// One rank: a model, or its share of one, on a device, and what trains it.
#[derive(Debug)]
pub struct Rank {
    pub(super) decoder: Decoder,
    pub(super) gradients: Gradients,
    /// Absent for a frozen model.
    pub(super) optimizer: Option<Optimizer>,
    /// The others; absent where there are none.
    world: Option<Arc<dyn Collective>>,
    zero: ZeroLevel,
    /// Elements of each weight by rank.
    shares: Arc<[Vec<Range<usize>>]>,
    /// Weights that are not trained.
    frozen: Arc<[bool]>,
}

impl Rank {
    pub(super) fn new(decoder: Decoder, world: Option<Arc<dyn Collective>>, zero: ZeroLevel, shares: Arc<[Vec<Range<usize>>]>) -> Self {
        let count = decoder.parameters().specs().len();
        Self { decoder, gradients: Gradients::new(count), optimizer: None, world, zero, shares, frozen: vec![false; count].into() }
    }

    /// Another model, frozen, in the same place.
    pub(super) fn with_decoder(&self, decoder: Decoder) -> Self {
        let count = decoder.parameters().specs().len();
        Self::new(decoder, self.world.clone(), self.zero, self.shares[..count].into())
    }

    /// This rank's number.
    pub fn index(&self) -> usize {
        self.world.as_ref().map_or(0, |world| world.rank())
    }

    /// The model; at ZeRO 3 with more ranks than one, its share.
    pub fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    pub(super) fn device(&self) -> &Device {
        self.decoder.device()
    }

    pub(super) fn world(&self) -> Option<&Arc<dyn Collective>> {
        self.world.as_ref()
    }

    /// From now on weights for which `frozen` holds have no gradient and no optimizer state.
    pub(super) fn train(&mut self, settings: OptimizerSettings, frozen: Arc<[bool]>) {
        let rank = self.index();
        // At level 0 every rank updates everything.
        let share = |slot: usize| match (frozen[slot], self.zero) {
            (true, _) => 0..0,
            (false, 0) => 0..self.decoder.parameters().specs()[slot].len(),
            (false, _) => self.shares[slot][rank].clone(),
        };
        let shares = (0..frozen.len()).map(share).collect();
        self.optimizer = Some(Optimizer::of_shares(shares, self.device(), settings));
        self.frozen = frozen;
    }

    /// Takes a micro-batch's gradient of a weight, or that this rank has none: adds it to the sum of which this rank keeps
    /// all (ZeRO 0 and 1) or its share.
    pub(super) fn take(&mut self, slot: usize, gradient: Option<Tensor<2>>) {
        if self.frozen[slot] {
            return;
        }
        let shares = &self.shares[slot];
        match &self.world {
            None => self.gradients.add(slot, gradient),
            Some(world) => self.gradients.change(slot, |sum| match self.zero {
                0 | 1 => world.all_reduce(sum, gradient),
                _ => world.reduce_scatter(sum, gradient, shares),
            }),
        }
    }

    /// One update from the gradients taken, which are forgotten then. Returns their norm before clipping; nothing changes
    /// when that is not finite.
    pub(super) fn update(&mut self, denominator: f64, lr: f64) -> f64 {
        let Some(optimizer) = &mut self.optimizer else { return 0.0 };
        let specs = self.decoder.parameters().specs();
        let own = optimizer.row_squares(specs, &self.gradients);
        let squares = match &self.world {
            // Every rank holds all sums and adds them alike.
            Some(world) if self.zero > 0 => {
                let rows = |slot: usize, rank: usize| match self.gradients.get(slot) {
                    Some(_) => self.shares[slot][rank].len() / specs[slot].row_width().max(1),
                    None => 0,
                };
                let all = world.all_gather_values(own.concat()).into_iter().enumerate();
                all.map(|(rank, values)| by_weight(&values, (0..specs.len()).map(|slot| rows(slot, rank)))).collect()
            }
            _ => vec![own],
        };
        let norm = optimizer::norm(&squares, specs.len()) / denominator;
        optimizer.update(self.decoder.parameters_mut(), &self.gradients, norm, denominator, lr);
        if norm.is_finite() {
            self.exchange_updates();
            self.gradients.clear();
        }
        norm
    }

    /// At ZeRO 1 and 2 each rank has updated its share of weights that all hold.
    fn exchange_updates(&mut self) {
        let (Some(world), 1 | 2) = (&self.world, self.zero) else { return };
        let rank = world.rank();
        for (slot, weight) in self.decoder.parameters_mut().tensors_mut().iter_mut().enumerate() {
            if self.frozen[slot] {
                continue;
            }
            let shares = &self.shares[slot];
            let pieces = world.all_gather(cut(weight, shares[rank].clone()));
            for (owner, (share, piece)) in shares.iter().zip(&pieces).enumerate() {
                if owner != rank {
                    paste(weight, share.clone(), piece);
                }
            }
        }
    }
}

/// Cuts `values` into runs of the given lengths.
fn by_weight(values: &[f64], counts: impl Iterator<Item = usize>) -> Vec<Vec<f64>> {
    let mut rest = values;
    let cut = |count: usize| {
        let (head, tail) = rest.split_at(count);
        rest = tail;
        head.to_vec()
    };
    counts.map(cut).collect()
}

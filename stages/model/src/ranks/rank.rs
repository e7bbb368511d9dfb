use std::{
    borrow::Cow,
    ops::{Deref, Range},
    sync::Arc,
};

use burn::tensor::{Device, Tensor, TensorData};
use rlflow_api::ZeroLevel;

use super::{Collective, cut, join, paste};
use crate::{
    Decoder, Gradients, Optimizer, OptimizerSettings, ParameterSpec,
    ledger::{Held, Ledger, Purpose},
    optimizer,
};

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
    /// Masters of weights that need one, until there is an optimizer.
    masters: Vec<Option<Tensor<2>>>,
    /// Where moments and masters live.
    home: Device,
    /// Whether a frozen model lives in host memory.
    parked: bool,
    pub(super) ledger: Arc<Ledger>,
    held: Held,
    held_by_optimizer: Option<Held>,
    held_by_gradients: Vec<Held>,
}

impl Rank {
    /// `own_bytes` of its weights belong to no other model.
    pub(super) fn new(
        decoder: Decoder,
        own_bytes: u64,
        world: Option<Arc<dyn Collective>>,
        zero: ZeroLevel,
        shares: Arc<[Vec<Range<usize>>]>,
        masters: Vec<Option<Tensor<2>>>,
        home: Device,
        ledger: Arc<Ledger>,
    ) -> Self {
        let count = decoder.parameters().specs().len();
        let held = ledger.hold(Purpose::Parameters, own_bytes);
        let (gradients, frozen) = (Gradients::new(count), vec![false; count].into());
        let (optimizer, held_by_optimizer, held_by_gradients) = (None, None, Vec::new());
        Self {
            decoder,
            gradients,
            optimizer,
            world,
            zero,
            shares,
            frozen,
            masters,
            home,
            parked: false,
            ledger,
            held,
            held_by_optimizer,
            held_by_gradients,
        }
    }

    /// What this rank holds and held.
    pub fn ledger(&self) -> &Arc<Ledger> {
        &self.ledger
    }

    /// Another model, frozen, in the same place, on the tensors of this one. Where it `is_counted`, those that are trained here will not be
    /// shared for long, and count as its own.
    pub(super) fn with_decoder(&self, decoder: Decoder, is_counted: bool) -> Self {
        let count = decoder.parameters().specs().len();
        let (shares, home) = (self.shares[..count].into(), self.home.clone());
        let weights = decoder.parameters().tensors().iter().zip(self.frozen.iter());
        let own: u64 =
            weights.filter(|(_, frozen)| is_counted && !**frozen).map(|(weight, _)| bytes_of(std::slice::from_ref(weight))).sum();
        Self::new(decoder, own, self.world.clone(), self.zero, shares, Vec::new(), home, self.ledger.clone())
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

    /// Where moments and masters live.
    pub(super) fn home(&self) -> &Device {
        &self.home
    }

    /// Moves a frozen model to host memory, where it stays but for its work.
    pub(super) fn park(&mut self) {
        if *self.device() != Device::flex() {
            self.decoder.parameters_mut().move_to(&Device::flex());
            self.held = self.ledger.hold(Purpose::Parameters, 0);
            self.parked = true;
        }
    }

    /// The model where it works: a copy on its device, which goes with what this returns, if it is parked.
    pub(super) fn awake(&self) -> Awake<'_> {
        if !self.parked {
            return Awake { decoder: Cow::Borrowed(&self.decoder), _held: None };
        }
        let mut decoder = self.decoder.clone();
        decoder.parameters_mut().move_to(self.device());
        let held = self.ledger.hold(Purpose::Parameters, bytes_of(decoder.parameters().tensors()));
        Awake { decoder: Cow::Owned(decoder), _held: Some(held) }
    }

    pub(super) fn world(&self) -> Option<&Arc<dyn Collective>> {
        self.world.as_ref()
    }

    /// Elements of a weight that this rank updates: at level 0 all.
    pub(super) fn updated_range(&self, slot: usize) -> Range<usize> {
        if self.zero == 0 { 0..self.decoder.parameters().specs()[slot].len() } else { self.shares[slot][self.index()].clone() }
    }

    /// From now on weights for which `frozen` holds have no gradient and no optimizer state.
    pub(super) fn train(&mut self, settings: OptimizerSettings, frozen: Arc<[bool]>) {
        let shares = (0..frozen.len()).map(|slot| if frozen[slot] { 0..0 } else { self.updated_range(slot) }).collect();
        let mut masters = std::mem::take(&mut self.masters);
        masters.iter_mut().zip(frozen.iter()).filter(|(_, frozen)| **frozen).for_each(|(master, _)| *master = None);
        let kept: u64 = masters.iter().flatten().map(|master| bytes_of(std::slice::from_ref(master))).sum();
        let optimizer = Optimizer::of_shares(shares, masters, &self.home, settings);
        // What lives on the host is not the device's.
        if self.home == *self.device() {
            let (first, second, _) = optimizer.state();
            self.held_by_optimizer = Some(self.ledger.hold(Purpose::Optimizer, kept + bytes_of(first) + bytes_of(second)));
        }
        self.optimizer = Some(optimizer);
        self.frozen = frozen;
    }

    /// This rank's master of a weight, if it has one.
    pub(super) fn master(&self, slot: usize) -> Option<&Tensor<2>> {
        match &self.optimizer {
            Some(optimizer) => optimizer.master(slot),
            None => self.masters.get(slot).and_then(Option::as_ref),
        }
    }

    /// Replaces it.
    pub(super) fn set_master(&mut self, slot: usize, values: &[f32]) {
        let range = self.updated_range(slot);
        let masters = match &mut self.optimizer {
            Some(optimizer) => optimizer.masters_mut(),
            None => &mut self.masters,
        };
        if let Some(Some(master)) = masters.get_mut(slot) {
            let data = TensorData::new(values[range.clone()].to_vec(), [1, range.len()]);
            *master = Tensor::from_data(data, &self.home);
        }
    }

    /// Takes a micro-batch's gradient of a weight, or that this rank has none: adds it to the sum of which this rank keeps
    /// all (ZeRO 0 and 1) or its share.
    pub(super) fn take(&mut self, slot: usize, gradient: Option<Tensor<2>>) {
        if self.frozen[slot] {
            return;
        }
        let shares = &self.shares[slot];
        let is_first = self.gradients.get(slot).is_none();
        match &self.world {
            None => self.gradients.add(slot, gradient),
            Some(world) => self.gradients.change(slot, |sum| match self.zero {
                0 | 1 => world.all_reduce(sum, gradient),
                _ => world.reduce_scatter(sum, gradient, shares),
            }),
        }
        if let Some(sum) = self.gradients.get(slot).filter(|_| is_first) {
            self.held_by_gradients.push(self.ledger.hold(Purpose::Gradients, bytes_of(std::slice::from_ref(sum))));
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
            self.held_by_gradients.clear();
        }
        norm
    }

    /// At ZeRO 1 and 2 each rank has updated its share of weights that all hold.
    fn exchange_updates(&mut self) {
        let (Some(world), Some(optimizer), 1 | 2) = (&self.world, &self.optimizer, self.zero) else { return };
        let rank = world.rank();
        let specs: Vec<[usize; 2]> = self.decoder.parameters().specs().iter().map(ParameterSpec::dims).collect();
        let device = self.decoder.device().clone();
        for (slot, weight) in self.decoder.parameters_mut().tensors_mut().iter_mut().enumerate() {
            if self.frozen[slot] || self.gradients.get(slot).is_none() {
                continue;
            }
            let shares = &self.shares[slot];
            if let Some(master) = optimizer.master(slot) {
                let pieces = world.all_gather(optimizer::copy_of(master, weight));
                *weight = join(&pieces, specs[slot], &device);
                continue;
            }
            let pieces = world.all_gather(cut(weight, shares[rank].clone()));
            for (owner, (share, piece)) in shares.iter().zip(&pieces).enumerate() {
                if owner != rank {
                    paste(weight, share.clone(), piece);
                }
            }
        }
    }
}

pub(super) fn bytes_of(tensors: &[Tensor<2>]) -> u64 {
    let of = |tensor: &Tensor<2>| {
        let [rows, columns] = tensor.dims();
        (tensor.dtype().size() * rows * columns) as u64
    };
    tensors.iter().map(of).sum()
}

/// A model at work.
pub(super) struct Awake<'a> {
    decoder: Cow<'a, Decoder>,
    _held: Option<Held>,
}

impl Deref for Awake<'_> {
    type Target = Decoder;

    fn deref(&self) -> &Decoder {
        &self.decoder
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

use std::{
    any::Any,
    ops::Range,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    thread,
};

use burn::tensor::{Device, Tensor, TensorData};
use rlflow_api::{ModelConfig, StageError, StageResult, ZeroLevel};
use rlflow_kernels::matmul::Arithmetic;

use super::{Aborted, Rank, in_process, share};
use crate::{
    Completion, Decoder, Draws, Gradients, Head, LoraSettings, OptimizerSettings, ParameterSpec, Parameters, Sampling,
    generate::generate,
    parameters::{host, specs},
};

/// Where a model lives.
#[derive(Debug, Clone)]
pub struct Layout {
    /// One device per rank.
    pub devices: Vec<Device>,
    /// ZeRO level; on one rank there is nothing to share out and all are the same.
    pub zero: ZeroLevel,
}

impl Layout {
    /// One rank on `device`.
    pub fn one(device: Device) -> Self {
        Self { devices: vec![device], zero: 0 }
    }
}

/// A model on ranks. Work on it is given as functions of one item (a micro-batch), item `j` to rank `j mod N`; results
/// come back in the order of the items.
#[derive(Debug)]
pub struct Group {
    ranks: Vec<Rank>,
    /// Elements of each weight by rank.
    shares: Arc<[Vec<Range<usize>>]>,
    zero: ZeroLevel,
}

/// Receives each weight's gradient, or that there is none, in the decoder's order.
pub type Take<'a> = &'a mut dyn FnMut(usize, Option<Tensor<2>>);

impl Group {
    /// A model, with an adapter if `lora` is given, of which `data` gives each weight's elements. Each is asked for once and handed to all ranks before the next.
    ///
    /// # Errors
    /// What `data` returns.
    pub fn new(
        config: &ModelConfig,
        head: Head,
        layout: &Layout,
        arithmetic: Arithmetic,
        lora: Option<&LoraSettings>,
        mut data: impl FnMut(&ParameterSpec) -> StageResult<Vec<f32>>,
    ) -> StageResult<Self> {
        let (mut specs, mut slots) = specs(config, head);
        if let Some(lora) = lora {
            lora.extend(&mut specs, &mut slots);
        }
        let count = layout.devices.len();
        let zero = if count > 1 { layout.zero } else { 0 };
        let shares: Arc<[Vec<Range<usize>>]> = specs.iter().map(|spec| (0..count).map(|rank| share(spec, rank, count)).collect()).collect();
        let mut tensors: Vec<Vec<Tensor<2>>> = vec![Vec::with_capacity(specs.len()); count];
        for (spec, shares) in specs.iter().zip(shares.iter()) {
            let values = data(spec)?;
            for ((tensors, device), share) in tensors.iter_mut().zip(&layout.devices).zip(shares) {
                let held = if zero == 3 {
                    TensorData::new(values[share.clone()].to_vec(), [1, share.len()])
                } else {
                    TensorData::new(values.clone(), spec.dims())
                };
                tensors.push(Tensor::from_data(held, device));
            }
        }
        let worlds: Vec<_> = if count > 1 { in_process(count).into_iter().map(Some).collect() } else { vec![None] };
        let ranks = worlds.into_iter().zip(tensors).zip(&layout.devices).map(|((world, tensors), device)| {
            let shared_with = world.clone().filter(|_| zero == 3);
            let parameters = Parameters::from_tensors(specs.clone(), tensors, shared_with);
            let mut decoder = Decoder::new(config.clone(), head, parameters, device.clone());
            decoder.set_arithmetic(arithmetic);
            if let Some(lora) = lora {
                decoder = decoder.with_adapter(lora);
            }
            Rank::new(decoder, world, zero, shares.clone())
        });
        Ok(Self { ranks: ranks.collect(), shares: shares.clone(), zero })
    }

    /// One rank with a decoder that is there.
    pub fn of(decoder: Decoder) -> Self {
        let shares: Arc<[Vec<Range<usize>>]> = decoder.parameters().specs().iter().map(|spec| vec![share(spec, 0, 1)]).collect();
        Self { ranks: vec![Rank::new(decoder, None, 0, shares.clone())], shares, zero: 0 }
    }

    /// Shape of the network.
    pub fn config(&self) -> &ModelConfig {
        self.first().config()
    }

    /// What stands on top.
    pub fn head(&self) -> Head {
        self.first().head()
    }

    /// Names and shapes of the weights.
    pub fn specs(&self) -> &[ParameterSpec] {
        self.first().parameters().specs()
    }

    /// The decoder of the first rank: what it says of the network holds for all.
    pub fn first(&self) -> &Decoder {
        self.ranks[0].decoder()
    }

    /// The ranks.
    pub fn ranks(&self) -> &[Rank] {
        &self.ranks
    }

    /// Prepares training: zero moments, no gradients. Weights that are frozen, because there is an adapter, cost nothing.
    pub fn train(&mut self, settings: OptimizerSettings) {
        let frozen: Arc<[bool]> = (0..self.specs().len()).map(|slot| self.first().is_frozen(slot)).collect();
        self.ranks.iter_mut().for_each(|rank| rank.train(settings, frozen.clone()));
    }

    /// `work` on all items. It must run the decoder's forward pass exactly once.
    ///
    /// # Errors
    /// If a rank fails.
    pub fn map<B: Sync, T: Send>(&self, items: &[B], work: impl Fn(&Decoder, &B) -> T + Sync) -> StageResult<Vec<T>> {
        let count = self.ranks.len();
        let rounds = items.len().div_ceil(count);
        let of_rank = |rank: &Rank| {
            let turn = |round: usize| match items.get(round * count + rank.index()) {
                Some(item) => Some(work(rank.decoder(), item)),
                None => {
                    rank.decoder().attend_evaluate();
                    None
                }
            };
            (0..rounds).map(turn).collect()
        };
        Ok(in_turn(on_ranks(self.ranks.iter().collect(), of_rank)?))
    }

    /// Adds the gradients of all items, in their order, to those that are there. `work` must run the decoder's backward
    /// pass exactly once and hand it what it is given.
    ///
    /// # Errors
    /// If a rank fails.
    pub fn backward<B: Sync, T: Send>(&mut self, items: &[B], work: impl Fn(&Decoder, &B, Take<'_>) -> T + Sync) -> StageResult<Vec<T>> {
        let count = self.ranks.len();
        let rounds = items.len().div_ceil(count);
        let of_rank = |rank: &mut Rank| {
            let turn = |round: usize| {
                let index = rank.index();
                // The decoder is not changed while gradients are taken; a clone shares its weights.
                let decoder = rank.decoder().clone();
                let mut take = |slot: usize, gradient: Option<Tensor<2>>| rank.take(slot, gradient);
                match items.get(round * count + index) {
                    Some(item) => Some(work(&decoder, item, &mut take)),
                    None => {
                        decoder.attend_backward(&mut take);
                        None
                    }
                }
            };
            (0..rounds).map(turn).collect()
        };
        Ok(in_turn(on_ranks(self.ranks.iter_mut().collect(), of_rank)?))
    }

    /// One optimizer step from the gradients that were added, each divided by `denominator`; they are forgotten then.
    /// Returns their norm before clipping. Nothing changes when it is not finite.
    ///
    /// # Errors
    /// If a rank fails.
    pub fn update(&mut self, denominator: f64, lr: f64) -> StageResult<f64> {
        let norms = on_ranks(self.ranks.iter_mut().collect(), |rank: &mut Rank| rank.update(denominator, lr))?;
        Ok(norms.first().copied().unwrap_or(0.0))
    }

    /// First weight whose gradient is not finite, with an offending value.
    pub fn first_non_finite(&self) -> Option<(&ParameterSpec, f32)> {
        let found = self.ranks.iter().filter_map(|rank| Gradients::first_non_finite(&rank.gradients));
        found.min_by_key(|(slot, _)| *slot).map(|(slot, value)| (&self.specs()[slot], value))
    }

    /// Samples answers as [`generate`] does. The first rank does it with all weights; at ZeRO 3 they are gathered for that
    /// once.
    ///
    /// # Errors
    /// If a rank fails.
    pub fn generate(
        &self,
        prompts: &[&[u32]],
        sampling: &Sampling,
        draws: Draws<'_>,
        each: impl FnMut(usize, u32) -> bool + Send,
    ) -> StageResult<Vec<Completion>> {
        if self.zero < 3 {
            return Ok(generate(self.first(), prompts, sampling, draws, each));
        }
        let each = std::sync::Mutex::new(Some(each));
        let answers = on_ranks(self.ranks.iter().collect(), |rank: &Rank| {
            let each = if rank.index() == 0 { each.lock().ok().and_then(|mut each| each.take()) } else { None };
            match each {
                Some(each) => Some(generate(&rank.decoder().whole(), prompts, sampling, draws, each)),
                None => {
                    rank.decoder().attend_whole();
                    None
                }
            }
        })?;
        Ok(answers.into_iter().flatten().next().unwrap_or_default())
    }

    /// All elements of a weight.
    pub fn weight(&self, slot: usize) -> Vec<f32> {
        match self.zero {
            3 => self.ranks.iter().flat_map(|rank| rank.decoder().parameters().host(slot)).collect(),
            _ => self.first().parameters().host(slot),
        }
    }

    /// Replaces all elements of a weight.
    pub fn set_weight(&mut self, slot: usize, values: &[f32]) {
        let zero = self.zero;
        for (rank, share) in self.ranks.iter_mut().zip(&self.shares[slot]) {
            let device = rank.device().clone();
            let parameters = rank.decoder.parameters_mut();
            let (values, dims) =
                if zero == 3 { (&values[share.clone()], [1, share.len()]) } else { (values, parameters.specs()[slot].dims()) };
            parameters.tensors_mut()[slot] = Tensor::from_data(TensorData::new(values.to_vec(), dims), &device);
        }
    }

    /// All elements of the first and second moments of a weight; empty for a frozen one. Without an optimizer, `None`.
    pub fn moments(&self, slot: usize) -> Option<[Vec<f32>; 2]> {
        let mut whole = [Vec::new(), Vec::new()];
        // At level 0 every rank has all.
        let holders = if self.zero == 0 { 1 } else { self.ranks.len() };
        for rank in &self.ranks[..holders] {
            let (first, second, _) = rank.optimizer.as_ref()?.state();
            whole[0].extend(host(&first[slot]));
            whole[1].extend(host(&second[slot]));
        }
        Some(whole)
    }

    /// Replaces all elements of the moments of a weight that is trained.
    pub fn set_moments(&mut self, slot: usize, values: [&[f32]; 2]) {
        let zero = self.zero;
        for (rank, share) in self.ranks.iter_mut().zip(&self.shares[slot]) {
            let device = rank.device().clone();
            let Some(optimizer) = &mut rank.optimizer else { continue };
            for (moments, values) in optimizer.moments_mut().into_iter().zip(values) {
                let held = if zero == 0 { 0..values.len() } else { share.clone() };
                let data = TensorData::new(values[held.clone()].to_vec(), [1, held.len()]);
                moments[slot] = Tensor::from_data(data, &device);
            }
        }
    }

    /// Optimizer steps done.
    pub fn steps(&self) -> u64 {
        self.ranks[0].optimizer.as_ref().map_or(0, |optimizer| optimizer.state().2)
    }

    /// Goes back to `steps` optimizer steps done.
    pub fn set_steps(&mut self, steps: u64) {
        self.ranks.iter_mut().filter_map(|rank| rank.optimizer.as_mut()).for_each(|optimizer| optimizer.set_step(steps));
    }

    /// A frozen copy on the same ranks, which shares its tensors until one of the two changes them.
    pub fn frozen_copy(&self) -> Self {
        self.with_decoders(Decoder::clone)
    }

    /// The model below the adapter on the same ranks, with the same tensors: nothing is copied.
    pub fn without_adapter(&self) -> Self {
        self.with_decoders(Decoder::without_adapter)
    }

    fn with_decoders(&self, decoder: impl Fn(&Decoder) -> Decoder) -> Self {
        let ranks: Vec<Rank> = self.ranks.iter().map(|rank| rank.with_decoder(decoder(rank.decoder()))).collect();
        let count = ranks[0].decoder().parameters().specs().len();
        Self { ranks, shares: self.shares[..count].into(), zero: self.zero }
    }

    /// `self = decay self + (1 - decay) other`, weight by weight of those that are trained; `other` must live on the same ranks.
    pub fn blend(&mut self, other: &Self, decay: f64) {
        let other_frozen = |slot: usize| other.first().is_frozen(slot);
        for (rank, other) in self.ranks.iter_mut().zip(&other.ranks) {
            let others = other.decoder().parameters().tensors();
            for (slot, other) in others.iter().enumerate().filter(|(slot, _)| !other_frozen(*slot)) {
                let weight = &mut rank.decoder.parameters_mut().tensors_mut()[slot];
                *weight = weight.clone() * decay + other.clone() * (1.0 - decay);
            }
        }
    }
}

/// Why a rank ended.
enum Failure {
    /// Another one did.
    Aborted,
    /// It panicked with this message.
    Panicked { rank: usize, message: String },
}

impl Failure {
    fn into_error(self) -> StageError {
        match self {
            Self::Aborted => StageError::invalid("a rank failed without saying why"),
            Self::Panicked { rank, message } => StageError::invalid_with_hint(
                format!("rank {rank} failed: {message}"),
                "all ranks were stopped; the last snapshot is kept, and a run continues from it",
            ),
        }
    }
}

fn failure(rank: usize, world: Option<&dyn super::Collective>, payload: &(dyn Any + Send)) -> Failure {
    if payload.is::<Aborted>() {
        return Failure::Aborted;
    }
    if let Some(world) = world {
        world.abort();
    }
    let text = payload.downcast_ref::<String>().map(String::as_str).or_else(|| payload.downcast_ref::<&str>().copied());
    Failure::Panicked { rank, message: text.unwrap_or("it panicked").to_owned() }
}

/// What the ranks' threads work on: `&Rank` or `&mut Rank`.
trait Handle: Send {
    fn rank(&self) -> &Rank;
}

impl Handle for &Rank {
    fn rank(&self) -> &Rank {
        self
    }
}

impl Handle for &mut Rank {
    fn rank(&self) -> &Rank {
        self
    }
}

/// `work` on all ranks at once, each on a thread of its own; a single one on the caller's. The error is that of the rank
/// that failed, not of those that it took down.
fn on_ranks<H: Handle, T: Send>(mut ranks: Vec<H>, work: impl Fn(H) -> T + Sync) -> StageResult<Vec<T>> {
    if ranks.len() == 1 {
        return Ok(ranks.drain(..).map(work).collect());
    }
    let run = |handle: H| {
        let (index, world) = (handle.rank().index(), handle.rank().world().cloned());
        catch_unwind(AssertUnwindSafe(|| work(handle))).map_err(|payload| failure(index, world.as_deref(), payload.as_ref()))
    };
    let results: Vec<Result<T, Failure>> = thread::scope(|scope| {
        let start = |handle: H| {
            let (index, world) = (handle.rank().index(), handle.rank().world().cloned());
            let thread = thread::Builder::new().name(format!("rank {index}")).spawn_scoped(scope, || run(handle));
            thread.map_err(|error| {
                world.inspect(|world| world.abort());
                Failure::Panicked { rank: index, message: format!("no thread could be started: {error}") }
            })
        };
        let threads: Vec<_> = ranks.into_iter().map(start).collect();
        threads.into_iter().map(|thread| thread?.join().unwrap_or(Err(Failure::Aborted))).collect()
    });
    let (mut values, mut failed) = (Vec::with_capacity(results.len()), None::<Failure>);
    for result in results {
        match result {
            Ok(value) => values.push(value),
            Err(failure) if matches!(failed, None | Some(Failure::Aborted)) => failed = Some(failure),
            Err(_) => {}
        }
    }
    failed.map_or(Ok(values), |failure| Err(failure.into_error()))
}

/// Results of items in their order, from those of each rank's turns.
fn in_turn<T>(of_ranks: Vec<Vec<Option<T>>>) -> Vec<T> {
    let rounds = of_ranks.first().map_or(0, Vec::len);
    let mut of_ranks: Vec<_> = of_ranks.into_iter().map(Vec::into_iter).collect();
    let mut all = Vec::with_capacity(rounds * of_ranks.len());
    for _ in 0..rounds {
        all.extend(of_ranks.iter_mut().filter_map(|results| results.next().flatten()));
    }
    all
}

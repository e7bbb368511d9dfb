use std::{ops::Range, sync::Arc, thread};

use burn::tensor::{DType, Device, FloatDType, Tensor, TensorData};
use rlflow_api::{
    ModelConfig, Portable, Processes, StageError, StageResult, ZeroLevel, ended,
    panics::{self, Panic},
};
use rlflow_kernels::matmul::Arithmetic;

use super::{Aborted, Rank, across, in_process_on, ordered::Ordered, rank::bytes_of, share};
use crate::{
    Completion, Decoder, Draws, Gradients, Head, LoraSettings, Optimizer, OptimizerSettings, ParameterSpec, Parameters, Sampling,
    generate::generate,
    ledger::{Ledger, Purpose},
    lora,
    parameters::{host, specs},
};

/// Where a model lives.
#[derive(Debug, Clone)]
pub struct Layout {
    /// One device per rank of this process. All processes have as many.
    pub devices: Vec<Device>,
    /// Those who hold the model together.
    pub processes: Processes,
    /// ZeRO level; on one rank there is nothing to share out and all are the same.
    pub zero: ZeroLevel,
    /// Whether optimizer state lives in host memory, and a frozen model does while it does not work.
    pub offload: bool,
    /// Each rank's count of bytes. Models that share a device may share it.
    pub ledgers: Vec<Arc<Ledger>>,
}

/// What becomes of a model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Use<'a> {
    /// It is trained, or an adapter on it: what is trained and is held in bfloat16, or updated elsewhere, keeps an f32 master.
    Trained(Option<&'a LoraSettings>),
    /// It stays as it is.
    Frozen,
}

/// How ranks that hold shares of the weights sample: the result is the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gathering {
    /// All weights are gathered once and stay until sampling ends.
    Once,
    /// Those outside of the blocks stay; each block's are gathered before it runs, while the one before it does, at every token.
    ByBlock,
}

impl Gathering {
    /// [`Gathering::Once`] if `once`.
    pub fn of(once: bool) -> Self {
        if once { Self::Once } else { Self::ByBlock }
    }
}

impl Layout {
    /// One rank on `device`.
    pub fn one(device: Device) -> Self {
        Self { devices: vec![device], processes: Processes::alone(), zero: 0, offload: false, ledgers: vec![Arc::default()] }
    }
}

/// A model on ranks. Work on it is given as functions of one item (a micro-batch), item `j` to rank `j mod N`; results
/// come back in the order of the items, in every process that holds ranks of it.
#[derive(Debug)]
pub struct Group {
    /// Those of this process.
    ranks: Vec<Rank>,
    /// Elements of each weight by rank, of all processes.
    shares: Arc<[Vec<Range<usize>>]>,
    zero: ZeroLevel,
    processes: Processes,
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
        usage: Use<'_>,
        mut data: impl FnMut(&ParameterSpec) -> StageResult<Vec<f32>>,
    ) -> StageResult<Self> {
        let (mut specs, mut slots) = specs(config, head);
        let lora = if let Use::Trained(lora) = usage { lora } else { None };
        if let Some(lora) = lora {
            lora.extend(&mut specs, &mut slots);
        }
        let processes = layout.processes.clone();
        let local = layout.devices.len();
        let (first, count) = (processes.index() * local, processes.count() * local);
        let zero = if count > 1 { layout.zero } else { 0 };
        let shares: Arc<[Vec<Range<usize>>]> = specs.iter().map(|spec| (0..count).map(|rank| share(spec, rank, count)).collect()).collect();
        let homes: Vec<Device> = layout.devices.iter().map(|device| if layout.offload { Device::flex() } else { device.clone() }).collect();
        let mut tensors: Vec<Vec<Tensor<2>>> = vec![Vec::with_capacity(specs.len()); local];
        let mut masters: Vec<Vec<Option<Tensor<2>>>> = vec![Vec::with_capacity(specs.len()); local];
        for (spec, shares) in specs.iter().zip(shares.iter()) {
            let values = data(spec)?;
            let dtype = spec.stored_in(arithmetic);
            let part = |range: Range<usize>, device: &Device| -> Tensor<2> {
                let dims = [1, range.len()];
                Tensor::from_data(TensorData::new(values[range].to_vec(), dims), device)
            };
            for (rank, share) in shares[first..first + local].iter().enumerate() {
                let device = &layout.devices[rank];
                let held = if zero == 3 { part(share.clone(), device) } else { part(0..values.len(), device).reshape(spec.dims()) };
                tensors[rank].push(if dtype == FloatDType::F32 { held } else { held.cast(dtype) });
                let is_trained = usage != Use::Frozen && (lora.is_none() || lora::is_trained(&spec.name));
                let needs_master = is_trained && (dtype != FloatDType::F32 || homes[rank] != *device);
                let range = if zero == 0 { 0..values.len() } else { share.clone() };
                masters[rank].push(needs_master.then(|| part(range, &homes[rank])));
            }
        }
        let worlds: Vec<_> = match processes.line() {
            Some(line) if count > 1 => across(&line, local).into_iter().map(Some).collect(),
            _ if count > 1 => in_process_on(&layout.devices).into_iter().map(Some).collect(),
            _ => vec![None],
        };
        let mut ranks = Vec::with_capacity(local);
        for (rank, ((world, tensors), masters)) in worlds.into_iter().zip(tensors).zip(masters).enumerate() {
            let device = layout.devices[rank].clone();
            // Only level 3 has work to do while a collective goes on.
            let world = if zero == 3 { world.map(Ordered::around) } else { world };
            let shared_with = world.clone().filter(|_| zero == 3);
            let parameters = Parameters::from_tensors(specs.clone(), tensors, shared_with);
            let mut decoder = Decoder::new(config.clone(), head, parameters, device);
            decoder.set_arithmetic(arithmetic);
            if let Some(lora) = lora {
                decoder = decoder.with_adapter(lora);
            }
            let bytes = bytes_of(decoder.parameters().tensors());
            let (home, ledger) = (homes[rank].clone(), layout.ledgers[rank].clone());
            let mut rank = Rank::new(decoder, bytes, world, zero, shares.clone(), masters, home, ledger);
            if usage == Use::Frozen && layout.offload {
                rank.park();
            }
            ranks.push(rank);
        }
        Ok(Self { ranks, shares, zero, processes })
    }

    /// One rank with a decoder that is there.
    pub fn of(decoder: Decoder) -> Self {
        let shares: Arc<[Vec<Range<usize>>]> = decoder.parameters().specs().iter().map(|spec| vec![share(spec, 0, 1)]).collect();
        let home = decoder.device().clone();
        let bytes = bytes_of(decoder.parameters().tensors());
        let ranks = vec![Rank::new(decoder, bytes, None, 0, shares.clone(), Vec::new(), home, Arc::default())];
        Self { ranks, shares, zero: 0, processes: Processes::alone() }
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

    /// The ranks of this process.
    pub fn ranks(&self) -> &[Rank] {
        &self.ranks
    }

    /// How many ranks there are, in all processes.
    pub fn world_size(&self) -> usize {
        self.ranks.len() * self.processes.count()
    }

    /// Number of the first rank of this process.
    fn first_rank(&self) -> usize {
        self.ranks.len() * self.processes.index()
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
    pub fn map<B: Sync, T: Send + Portable>(&self, items: &[B], work: impl Fn(&Decoder, &B) -> T + Sync) -> StageResult<Vec<T>> {
        let count = self.world_size();
        let rounds = items.len().div_ceil(count);
        let of_rank = |rank: &Rank| {
            let decoder = rank.awake();
            let turn = |round: usize| match items.get(round * count + rank.index()) {
                Some(item) => Some(work(&decoder, item)),
                None => {
                    decoder.attend_evaluate();
                    None
                }
            };
            (0..rounds).map(turn).collect()
        };
        self.in_turn(on_ranks(self.ranks.iter().collect(), of_rank)?)
    }

    /// Adds the gradients of all items, in their order, to those that are there. `work` must run the decoder's backward
    /// pass exactly once and hand it what it is given.
    ///
    /// # Errors
    /// If a rank fails.
    pub fn backward<B: Sync, T: Send + Portable>(
        &mut self,
        items: &[B],
        work: impl Fn(&Decoder, &B, Take<'_>) -> T + Sync,
    ) -> StageResult<Vec<T>> {
        let count = self.world_size();
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
        let results = on_ranks(self.ranks.iter_mut().collect(), of_rank)?;
        self.in_turn(results)
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

    /// Results of items in their order, from those of each rank's turns here and in the other processes.
    fn in_turn<T: Portable>(&self, of_ranks: Vec<Vec<Option<T>>>) -> StageResult<Vec<T>> {
        Ok(in_turn(self.processes.gather(of_ranks)?.into_iter().flatten().collect()))
    }

    /// First weight whose gradient is not finite, with an offending value.
    ///
    /// # Errors
    /// If another process fails.
    pub fn first_non_finite(&self) -> StageResult<Option<(&ParameterSpec, f32)>> {
        let found = self.ranks.iter().filter_map(|rank| Gradients::first_non_finite(&rank.gradients));
        let found = self.processes.gather(found.min_by_key(|(slot, _)| *slot))?.into_iter().flatten();
        Ok(found.min_by_key(|(slot, _)| *slot).map(|(slot, value)| (&self.specs()[slot], value)))
    }

    /// Samples answers as [`generate`] does. The first rank does it; at ZeRO 3 weights are gathered for that as `gathering` says.
    ///
    /// # Errors
    /// If a rank fails.
    pub fn generate(
        &self,
        prompts: &[&[u32]],
        sampling: &Sampling,
        draws: Draws<'_>,
        gathering: Gathering,
        each: impl FnMut(usize, u32) -> bool + Send,
    ) -> StageResult<Vec<Completion>> {
        if self.zero < 3 {
            let rank = &self.ranks[0];
            let sample = || rank.ledger.during(|| generate(&rank.awake(), prompts, sampling, draws, each));
            return self.processes.agree(|| Ok(rayon::scope(|_| sample())));
        }
        let each = std::sync::Mutex::new(Some(each));
        let answers = on_ranks(self.ranks.iter().collect(), |rank: &Rank| {
            let each = if rank.index() == 0 { each.lock().ok().and_then(|mut each| each.take()) } else { None };
            match (each, gathering) {
                (Some(each), Gathering::Once) => {
                    let whole = rank.decoder().whole();
                    let _gathered = rank.ledger.hold(Purpose::Buffers, bytes_of(whole.parameters().tensors()));
                    Some(generate(&whole, prompts, sampling, draws, each))
                }
                (Some(each), Gathering::ByBlock) => Some(generate(rank.decoder(), prompts, sampling, draws, each)),
                (None, Gathering::Once) => {
                    rank.decoder().attend_whole();
                    None
                }
                (None, Gathering::ByBlock) => {
                    rank.decoder().attend_generate();
                    None
                }
            }
        })?;
        self.processes.agree(|| Ok(answers.into_iter().flatten().next().unwrap_or_default()))
    }

    /// All elements of a weight: its master's, if it has one.
    ///
    /// # Errors
    /// If another process fails.
    pub fn weight(&self, slot: usize) -> StageResult<Vec<f32>> {
        let has_master = self.ranks[0].master(slot).is_some();
        // At level 0 every rank has all of the master, and below 3 all of the weight.
        let is_whole = self.zero == 0 || (!has_master && self.zero < 3);
        self.joined(is_whole, |rank| match rank.master(slot) {
            Some(master) => host(master),
            None => rank.decoder().parameters().host(slot),
        })
    }

    /// What ranks hold, one after the other; that of one of them where each `is_whole`.
    fn joined(&self, is_whole: bool, of: impl Fn(&Rank) -> Vec<f32>) -> StageResult<Vec<f32>> {
        if is_whole {
            return Ok(of(&self.ranks[0]));
        }
        let held = self.ranks.iter().map(of).collect::<Vec<_>>().concat();
        let all = self.processes.gather(held)?;
        Ok(if all.len() == 1 { all.into_iter().flatten().collect() } else { all.concat() })
    }

    /// Replaces all elements of a weight.
    pub fn set_weight(&mut self, slot: usize, values: &[f32]) {
        let (zero, first) = (self.zero, self.first_rank());
        for (rank, share) in self.ranks.iter_mut().zip(&self.shares[slot][first..]) {
            rank.set_master(slot, values);
            let device = rank.device().clone();
            let parameters = rank.decoder.parameters_mut();
            let (values, dims) =
                if zero == 3 { (&values[share.clone()], [1, share.len()]) } else { (values, parameters.specs()[slot].dims()) };
            let held = &mut parameters.tensors_mut()[slot];
            let dtype = held.dtype();
            let tensor = Tensor::from_data(TensorData::new(values.to_vec(), dims), &device);
            *held = if dtype == DType::F32 { tensor } else { tensor.cast(dtype) };
        }
    }

    /// All elements of the first and second moments of a weight; empty for a frozen one, and without an optimizer.
    ///
    /// # Errors
    /// If another process fails.
    pub fn moments(&self, slot: usize) -> StageResult<[Vec<f32>; 2]> {
        // At level 0 every rank has all.
        let is_whole = self.zero == 0;
        let of = |which: fn(&Optimizer) -> &[Tensor<2>]| {
            self.joined(is_whole, |rank| rank.optimizer.as_ref().map(|optimizer| host(&which(optimizer)[slot])).unwrap_or_default())
        };
        Ok([of(|optimizer| optimizer.state().0)?, of(|optimizer| optimizer.state().1)?])
    }

    /// Replaces all elements of the moments of a weight that is trained.
    pub fn set_moments(&mut self, slot: usize, values: [&[f32]; 2]) {
        let (zero, first) = (self.zero, self.first_rank());
        for (rank, share) in self.ranks.iter_mut().zip(&self.shares[slot][first..]) {
            let device = rank.home().clone();
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

    /// A frozen copy on the same ranks. It shares its tensors until one of the two changes them, but for those that are held in
    /// bfloat16: of their masters it has a copy.
    ///
    /// # Errors
    /// As [`Group::new`].
    pub fn frozen_copy(&self) -> StageResult<Self> {
        if (0..self.specs().len()).all(|slot| self.ranks[0].master(slot).is_none()) {
            return Ok(self.with_decoders(Decoder::clone, true));
        }
        let devices = self.ranks.iter().map(|rank| rank.device().clone()).collect();
        let ledgers = self.ranks.iter().map(|rank| rank.ledger.clone()).collect();
        let layout = Layout { devices, processes: self.processes.clone(), zero: self.zero, offload: false, ledgers };
        let mut slot = 0..;
        let weight = |_: &ParameterSpec| self.weight(slot.next().unwrap_or_default());
        Self::new(self.config(), self.head(), &layout, Arithmetic::F32, Use::Trained(self.first().adapter()), weight)
    }

    /// The model below the adapter on the same ranks, with the same tensors: nothing is copied.
    pub fn without_adapter(&self) -> Self {
        self.with_decoders(Decoder::without_adapter, false)
    }

    /// Other models in the same places; `is_counted` where they will not share their tensors for long.
    fn with_decoders(&self, decoder: impl Fn(&Decoder) -> Decoder, is_counted: bool) -> Self {
        let ranks: Vec<Rank> = self.ranks.iter().map(|rank| rank.with_decoder(decoder(rank.decoder()), is_counted)).collect();
        let count = ranks[0].decoder().parameters().specs().len();
        Self { ranks, shares: self.shares[..count].into(), zero: self.zero, processes: self.processes.clone() }
    }

    /// `self = decay self + (1 - decay) other`, weight by weight of those that are trained.
    ///
    /// # Errors
    /// If another process fails.
    pub fn blend(&mut self, other: &Self, decay: f64) -> StageResult<()> {
        let (ours, theirs) = (decay as f32, (1.0 - decay) as f32);
        for slot in (0..self.specs().len()).filter(|slot| !other.first().is_frozen(*slot)) {
            let mut blended = self.weight(slot)?;
            blended.iter_mut().zip(other.weight(slot)?).for_each(|(value, other)| *value = *value * ours + other * theirs);
            self.set_weight(slot, &blended);
        }
        Ok(())
    }
}

impl Portable for Completion {
    fn put(&self, out: &mut Vec<u8>) {
        self.ids.put(out);
        self.logprobs.put(out);
        self.ended.put(out);
    }

    fn take(from: &mut &[u8]) -> Option<Self> {
        Some(Self { ids: Portable::take(from)?, logprobs: Portable::take(from)?, ended: Portable::take(from)? })
    }
}

/// Why a rank ended.
enum Failure {
    /// Another one did; why, if that was in another process.
    Aborted(Option<String>),
    /// It panicked with this message.
    Panicked { rank: usize, message: String },
}

impl Failure {
    fn into_error(self) -> StageError {
        match self {
            Self::Aborted(why) => ended(why.unwrap_or_else(|| "a rank failed without saying why".into())),
            Self::Panicked { rank, message } => ended(format!("rank {rank} failed: {message}")),
        }
    }
}

fn failure(rank: usize, world: Option<&dyn super::Collective>, panic: &Panic) -> Failure {
    if panic.is::<Aborted>() {
        return Failure::Aborted(world.and_then(super::Collective::aborted));
    }
    let message = panic.to_string();
    if let Some(world) = world {
        world.abort(&format!("rank {rank} failed: {message}"));
    }
    Failure::Panicked { rank, message }
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

/// `work` on all ranks at once, each on a thread of its own; a single one on a thread of the pool, where its operations need
/// no handing over. The error is that of the rank that failed, not of those that it took down.
fn on_ranks<H: Handle, T: Send>(mut ranks: Vec<H>, work: impl Fn(H) -> T + Sync) -> StageResult<Vec<T>> {
    let counted = |handle: H| handle.rank().ledger.clone().during(|| work(handle));
    let run = |handle: H| {
        let (index, world) = (handle.rank().index(), handle.rank().world().cloned());
        panics::catch(|| counted(handle)).map_err(|panic| failure(index, world.as_deref(), &panic))
    };
    if ranks.len() == 1 {
        // Alone in its process. Where others wait for it in theirs, and it for them, it must not keep a thread of the pool waiting.
        let is_alone = |handle: &H| handle.rank().world().is_none();
        if ranks.iter().all(is_alone) {
            return Ok(rayon::scope(|_| ranks.drain(..).map(counted).collect()));
        }
        return ranks.drain(..).map(|handle| run(handle).map_err(Failure::into_error)).collect();
    }
    let results: Vec<Result<T, Failure>> = thread::scope(|scope| {
        let start = |handle: H| {
            let (index, world) = (handle.rank().index(), handle.rank().world().cloned());
            let thread = thread::Builder::new().name(format!("rank {index}")).spawn_scoped(scope, || run(handle));
            thread.map_err(|error| {
                let message = format!("no thread could be started: {error}");
                world.inspect(|world| world.abort(&format!("rank {index} failed: {message}")));
                Failure::Panicked { rank: index, message }
            })
        };
        let threads: Vec<_> = ranks.into_iter().map(start).collect();
        threads.into_iter().map(|thread| thread?.join().unwrap_or(Err(Failure::Aborted(None)))).collect()
    });
    let (mut values, mut failed) = (Vec::with_capacity(results.len()), None::<Failure>);
    for result in results {
        match result {
            Ok(value) => values.push(value),
            Err(failure) if matches!(failed, None | Some(Failure::Aborted(_))) => failed = Some(failure),
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

#[cfg(test)]
mod tests {
    use rlflow_api::{Architecture, BlockStyle, Positions};

    use super::*;
    use crate::PackedBatch;

    fn group(ranks: usize, zero: ZeroLevel) -> Group {
        let config = ModelConfig {
            architecture: Architecture::Llama,
            vocab_size: 11,
            hidden_size: 8,
            intermediate_size: 12,
            layers: 2,
            heads: 2,
            kv_heads: 1,
            head_dim: 4,
            context: 8,
            positions: Positions::Rope,
            rope_theta: 10_000.0,
            rope_scaling: None,
            norm_eps: 1e-5,
            tie_embeddings: true,
            style: BlockStyle::default(),
        };
        let ledgers = (0..ranks).map(|_| Arc::default()).collect();
        let layout = Layout { devices: vec![Device::flex(); ranks], processes: Processes::alone(), zero, offload: false, ledgers };
        let fresh = crate::parameters::initial(&config, 1, 0.02);
        Group::new(&config, Head::Language, &layout, Arithmetic::F32, Use::Trained(None), |spec| Ok(fresh(spec))).unwrap()
    }

    /// One rank fails while the others wait for its weights: all end, with its message.
    #[test]
    fn a_rank_that_panics_ends_all() {
        let items = [0, 1, 2, 3, 4];
        let work = |decoder: &Decoder, item: &i32| {
            assert!(*item != 1, "item {item} is bad");
            let ids = [1, 2, 3];
            decoder.evaluate(&PackedBatch::new([ids.as_slice()]), |_| *item)
        };
        let error = group(3, 3).map(&items, work).unwrap_err();
        assert_eq!(error.to_string(), "rank 1 failed: item 1 is bad");
        // Ranks without an item take part all the same.
        assert_eq!(group(3, 3).map(&items[2..], work).unwrap(), [2, 3, 4]);
        assert_eq!(group(4, 3).map(&items[2..], work).unwrap(), [2, 3, 4]);
    }

    #[test]
    fn weights_and_masters_survive_a_round_trip() {
        for zero in 0..=3 {
            let mut group = group(3, zero);
            let values: Vec<f32> = (0..group.specs()[1].len()).map(|index| index as f32).collect();
            group.set_weight(1, &values);
            assert_eq!(group.weight(1).unwrap(), values, "ZeRO {zero}");
            let settings = OptimizerSettings { betas: [0.9, 0.95], eps: 1e-8, weight_decay: 0.0, grad_clip: 0.0 };
            group.train(settings);
            let last = group.specs().iter().rposition(ParameterSpec::is_matrix).unwrap();
            let values: Vec<f32> = (0..group.specs()[last].len()).map(|index| 1.0 + index as f32).collect();
            group.set_moments(last, [&values, &values]);
            assert_eq!(group.moments(last).unwrap(), [values.clone(), values], "ZeRO {zero}");
        }
    }
}

//! What ranks hold: counted by the ledger, predicted by planning, said by the literature, and seen by the allocator. And what checkpoints take
//! on their way in and out.

use std::{
    alloc::{GlobalAlloc, Layout as Block, System},
    collections::BTreeMap,
    fs,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use burn::tensor::Device;
use rlflow_api::{Architecture, BlockStyle, CounterRng, Dtype, ModelConfig, Needs, Positions, testing};
use rlflow_hf::{FileTensor, Role, WantedTensor, Writer, config, names::file_tensors};
use rlflow_kernels::memory::scratch_bytes;
use rlflow_model::{
    Bytes, Completion, Draws, Gathering, Group, Head, Layout, LoraSettings, OptimizerSettings, PackedBatch, Sampling, TokenTargets, Use,
    lora::{self, TargetModules},
    parameters::{initial, specs},
};
use rlflow_stages::{
    export::{ExportOptions, export},
    language::{self, LanguageBatch},
    train::{Pass, Precision, Rollout, Sharding, frozen_needs, sampling_bytes, training_needs},
};

/// Counts what is allocated.
struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: all work is the system allocator's.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, block: Block) -> *mut u8 {
        let live = LIVE.fetch_add(block.size(), Relaxed) + block.size();
        PEAK.fetch_max(live, Relaxed);
        // SAFETY: as the caller promised.
        unsafe { System.alloc(block) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, block: Block) {
        LIVE.fetch_sub(block.size(), Relaxed);
        // SAFETY: as the caller promised.
        unsafe { System.dealloc(pointer, block) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// A model in which no weight dominates.
fn model(tie_embeddings: bool) -> ModelConfig {
    ModelConfig {
        architecture: Architecture::Llama,
        vocab_size: 128,
        hidden_size: 96,
        intermediate_size: 256,
        layers: 6,
        heads: 4,
        kv_heads: 2,
        head_dim: 24,
        context: 64,
        positions: Positions::Rope,
        rope_theta: 10_000.0,
        rope_scaling: None,
        norm_eps: 1e-5,
        tie_embeddings,
        style: BlockStyle::default(),
    }
}

#[derive(Clone, Copy, Debug)]
struct Case {
    ranks: usize,
    zero: u8,
    checkpointing: bool,
    tied: bool,
    precision: Precision,
    /// Of a step.
    micro_batches: usize,
    /// Whether an adapter is trained.
    lora: bool,
}

const BASE: Case =
    Case { ranks: 1, zero: 0, checkpointing: false, tied: true, precision: Precision::Fp32, micro_batches: MICRO_BATCHES, lora: false };

const ROWS: usize = 4;
/// A round of eight ranks and one micro-batch more, in which seven have nothing to do.
const MICRO_BATCHES: usize = 9;

struct Measured {
    /// Of the rank that holds most.
    peak: Bytes,
    /// Of each rank.
    of_ranks: Vec<u64>,
    /// Bytes of all ranks.
    counted: u64,
    /// Bytes that the allocator gave out at its peak, beyond what was there before.
    allocated: u64,
    predicted: Needs,
    /// Weights, to the bit.
    weights: Vec<u32>,
}

/// Two steps.
fn measure(case: Case) -> Measured {
    let Case { ranks, zero, checkpointing, tied, precision, micro_batches, .. } = case;
    let adapter = LoraSettings { target_modules: TargetModules::ALL, ..LoraSettings::default() };
    let adapter = case.lora.then_some(&adapter);
    let config = model(tied);
    let batch = |number: usize| {
        let mut rng = CounterRng::new(1, "memory", number as u64, 0);
        let rows: Vec<Vec<u32>> = (0..ROWS).map(|_| (0..config.context).map(|_| (rng.uniform() * 128.0) as u32).collect()).collect();
        let batch = PackedBatch::new(rows.iter().map(Vec::as_slice));
        let all: Arc<[u32]> = (0..batch.tokens() as u32).collect();
        LanguageBatch { targets: TokenTargets { rows: all, targets: batch.ids.clone(), scale: 1.0 }, batch }
    };
    // The same micro-batches for any number of ranks.
    let batches: Vec<LanguageBatch> = (0..micro_batches).map(batch).collect();
    let layout = layout(ranks, zero);

    let (before, scratch) = (LIVE.load(Relaxed), scratch_bytes());
    PEAK.store(before, Relaxed);
    let fresh = initial(&config, 1, 0.02);
    let mut group = Group::new(&config, Head::Language, &layout, precision.arithmetic(), Use::Trained(adapter), |spec| {
        Ok(if lora::is_factor(&spec.name) { lora::initial(spec, 1) } else { fresh(spec) })
    })
    .unwrap();
    group.train(OptimizerSettings { betas: [0.9, 0.95], eps: 1e-8, weight_decay: 0.1, grad_clip: 1.0 });
    for _ in 0..2 {
        let losses = group.backward(&batches, |decoder, micro, take| language::backward(decoder, micro, checkpointing, take)).unwrap();
        let tokens: f64 = losses.iter().map(|sums| sums[2]).sum();
        assert!(group.update(tokens, 1e-3).unwrap().is_finite());
    }
    // What threads keep for the next operation is nobody's.
    let allocated = (PEAK.load(Relaxed) - before).saturating_sub(scratch_bytes().saturating_sub(scratch)) as u64;

    let peaks: Vec<Bytes> = layout.ledgers.iter().map(|ledger| ledger.peak()).collect();
    let pass = Pass {
        head: Head::Language,
        tokens: (ROWS * config.context) as u64,
        micro_batches: micro_batches as u64,
        checkpointing,
        precision,
    };
    Measured {
        peak: peaks.iter().copied().max_by_key(Bytes::total).unwrap(),
        of_ranks: peaks.iter().map(Bytes::total).collect(),
        counted: peaks.iter().map(Bytes::total).sum(),
        allocated,
        predicted: training_needs(&config, adapter, pass, Sharding { ranks, zero, fused: true }, 0),
        weights: (0..group.specs().len()).flat_map(|slot| group.weight(slot).unwrap()).map(f32::to_bits).collect(),
    }
}

fn layout(ranks: usize, zero: u8) -> Layout {
    Layout {
        devices: vec![Device::flex(); ranks],
        zero,
        ledgers: (0..ranks).map(|_| Arc::default()).collect(),
        ..Layout::one(Device::flex())
    }
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    let precisions = [Precision::Fp32, Precision::Bf16];
    let variants = [(false, false), (true, true), (true, false)];
    for ((tied, checkpointing), precision) in variants.into_iter().flat_map(|variant| precisions.map(|precision| (variant, precision))) {
        cases.push(Case { checkpointing, tied, precision, ..BASE });
        let ranks: &[usize] = match (tied, checkpointing) {
            (true, true) => &[2, 4, 8],
            (false, _) => &[4],
            (true, false) => &[],
        };
        for ranks in ranks {
            cases.extend((0..=3).map(|zero| Case { ranks: *ranks, zero, checkpointing, tied, precision, ..BASE }));
        }
    }
    cases
}

fn within(share: f64, measured: u64, expected: u64) -> bool {
    (measured as f64 / expected as f64 - 1.0).abs() <= share
}

/// With N ranks, levels 0 to 3 hold in fp32 16, 8 + 8/N, 4 + 12/N and 16/N bytes per parameter, and in bf16 with fp32 masters
/// and gradients 18, 6 + 12/N, 2 + 16/N and 18/N (arXiv:1910.02054, section 3.1, with fp32 gradients).
fn what_is_held_is_what_was_planned_and_what_the_formulas_say() {
    let mut first: BTreeMap<(bool, bool), Vec<u32>> = BTreeMap::new();
    for case in cases() {
        let found = measure(case);
        let expected = found.predicted;
        assert!(within(0.1, found.peak.total(), expected.peak_bytes()), "{case:?}: {:?} held, {expected:?} planned", found.peak);
        let count = model(case.tied).parameter_count() as f64;
        let n = case.ranks as f64;
        let bf16 = case.precision == Precision::Bf16;
        let per_parameter = match bf16 {
            false => [16.0, 8.0 + 8.0 / n, 4.0 + 12.0 / n, 16.0 / n],
            true => [18.0, 6.0 + 12.0 / n, 2.0 + 16.0 / n, 18.0 / n],
        }[usize::from(case.zero)];
        let state = found.peak.parameters + found.peak.gradients + found.peak.optimizer;
        assert!(within(0.05, state, (per_parameter * count) as u64), "{case:?}: {} bytes per parameter", state as f64 / count);
        // Recomputation and ranks leave no trace in the weights.
        assert_eq!(first.entry((case.tied, bf16)).or_insert_with(|| found.weights.clone()), &found.weights, "{case:?}");
    }
}

/// What each rank holds where some have no work in any step, and where an adapter is trained.
fn idle_ranks_and_adapters_hold_what_was_planned() {
    let base = Case { micro_batches: 2, ..BASE };
    let idle = (0..=3).map(|zero| Case { ranks: 4, zero, ..base });
    let adapters = [Precision::Fp32, Precision::Bf16].into_iter().flat_map(|precision| {
        let alone = Case { precision, lora: true, ..base };
        [false, true].map(|tied| Case { tied, checkpointing: tied, ..alone }).into_iter().chain([1, 2, 3].map(|zero| Case {
            ranks: 2,
            zero,
            ..alone
        }))
    });
    for case in idle.chain(adapters) {
        let found = measure(case);
        for (rank, held) in found.of_ranks.iter().enumerate() {
            let planned = found.predicted.lasting_bytes() + found.predicted.passing_bytes_of(rank);
            assert!(
                within(0.1, *held, planned),
                "{case:?}, rank {rank}: {held} held ({:?}), {planned} planned ({:?})",
                found.peak,
                found.predicted
            );
        }
    }
}

/// Sampling, and passes of a frozen model: what is planned, the same answers whatever the ranks, and less held where blocks come one
/// by one.
fn sampling_holds_what_was_planned() {
    const PROMPTS: usize = 12;
    let config = model(false);
    let (prompt_tokens, new_tokens) = (40, 24);
    let mut rng = CounterRng::new(1, "prompts", 0, 0);
    let prompts: Vec<Vec<u32>> = (0..PROMPTS).map(|_| (0..prompt_tokens).map(|_| (rng.uniform() * 128.0) as u32).collect()).collect();
    let prompts: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
    let sampling = Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, max_new_tokens: new_tokens, stop_ids: vec![] };
    for precision in [Precision::Fp32, Precision::Bf16] {
        let fresh = initial(&config, 1, 0.02);
        let mut answers: Option<Vec<Completion>> = None;
        let mut sample = |ranks: usize, zero: u8, gathering: Gathering| {
            let layout = layout(ranks, zero);
            let group = Group::new(&config, Head::Language, &layout, precision.arithmetic(), Use::Frozen, |spec| Ok(fresh(spec))).unwrap();
            let draws = Draws { seed: 1, purpose: "memory", step: 0 };
            let found = group.generate(&prompts, &sampling, draws, gathering, |_, _| true).unwrap();
            assert_eq!(answers.get_or_insert_with(|| found.clone()), &found, "{ranks} ranks, ZeRO {zero}, {gathering:?}");
            let sharding = Sharding { ranks, zero, fused: true };
            let rollout = Rollout {
                sequences: PROMPTS as u64,
                prompt_tokens: (PROMPTS * prompt_tokens) as u64,
                new_tokens: new_tokens as u64,
                gathering,
            };
            let pass = Pass { head: Head::Language, tokens: 256, micro_batches: ranks as u64, checkpointing: false, precision };
            let frozen = frozen_needs(&config, pass, sharding);
            let planned = frozen.parameter_bytes + sampling_bytes(&config, rollout, sharding, precision);
            let held = layout.ledgers[0].peak().total();
            assert!(within(0.1, held, planned), "{precision:?}, {ranks} ranks, ZeRO {zero}, {gathering:?}: {held} held, {planned} planned");
            held
        };
        sample(1, 0, Gathering::Once);
        sample(3, 2, Gathering::ByBlock);
        let [whole, by_block] = [Gathering::Once, Gathering::ByBlock].map(|gathering| sample(4, 3, gathering));
        let parameters = config.parameter_count() * if precision == Precision::Bf16 { 2 } else { 4 };
        // Four of six blocks are not there at any time.
        assert!(by_block + parameters / 2 < whole, "{precision:?}: {by_block} by blocks, {whole} at once");

        for (ranks, zero) in [(1, 0), (4, 3)] {
            let layout = layout(ranks, zero);
            let group = Group::new(&config, Head::Language, &layout, precision.arithmetic(), Use::Frozen, |spec| Ok(fresh(spec))).unwrap();
            let rows: Vec<Vec<u32>> = (0..ROWS).map(|_| vec![1; config.context]).collect();
            let batch = PackedBatch::new(rows.iter().map(Vec::as_slice));
            let all: Arc<[u32]> = (0..batch.tokens() as u32).collect();
            let targets = TokenTargets { rows: all, targets: batch.ids.clone(), scale: 1.0 };
            group
                .map(&vec![batch; ranks], |decoder, batch| drop(decoder.evaluate(batch, |head| head.token_stats(targets.clone()))))
                .unwrap();
            let pass = Pass {
                head: Head::Language,
                tokens: (ROWS * config.context) as u64,
                micro_batches: ranks as u64,
                checkpointing: false,
                precision,
            };
            let planned = frozen_needs(&config, pass, Sharding { ranks, zero, fused: true }).peak_bytes();
            let held = layout.ledgers.iter().map(|ledger| ledger.peak().total()).max().unwrap();
            assert!(within(0.1, held, planned), "{precision:?}, {ranks} ranks, frozen: {held} held, {planned} planned");
        }
    }
}

/// The ledger is no formula: the allocator of the process sees the same. Ranks do not peak at one moment, so of several the
/// process holds less than the sum of their peaks.
fn the_allocator_sees_what_the_ledger_counts() {
    // Threads keep their packing buffers from their first product on.
    measure(Case { ranks: 4, ..BASE });
    for checkpointing in [false, true] {
        let found = measure(Case { checkpointing, ..BASE });
        assert!(within(0.1, found.allocated, found.counted), "{} allocated, {} counted", found.allocated, found.counted);
    }
    let of = |zero| measure(Case { ranks: 4, zero, checkpointing: true, ..BASE });
    let levels: Vec<Measured> = (0..=3).map(of).collect();
    for pair in levels.windows(2) {
        assert!(pair[1].allocated < pair[0].allocated, "each level holds less than the one before");
    }
    for level in &levels {
        assert!(level.allocated < level.counted * 11 / 10, "{} allocated, {} counted", level.allocated, level.counted);
    }
}

/// Bytes that the allocator gives out at most during `work`, beyond what was there before.
fn peak<T>(work: impl FnOnce() -> T) -> (u64, T) {
    let before = LIVE.load(Relaxed);
    PEAK.store(before, Relaxed);
    let result = work();
    ((PEAK.load(Relaxed) - before) as u64, result)
}

/// However large a checkpoint is, its largest tensor and a little more are in memory.
fn a_checkpoint_comes_in_and_goes_out_tensor_by_tensor() {
    const LITTLE: u64 = 4 << 20;
    let config = ModelConfig { vocab_size: 600, hidden_size: 512, intermediate_size: 1024, head_dim: 128, ..model(true) };
    let wanted: Vec<WantedTensor> = specs(&config, Head::Language)
        .0
        .into_iter()
        .map(|spec| WantedTensor { name: spec.name, shape: spec.shape.into_iter().map(|size| size as u64).collect() })
        .collect();
    let elements = |tensor: &WantedTensor| tensor.shape.iter().product::<u64>();
    let (largest, all) = (4 * wanted.iter().map(elements).max().unwrap(), 4 * wanted.iter().map(elements).sum::<u64>());
    assert!(all > 8 * (largest + LITTLE), "{largest} of {all}");

    let folder = tempfile::tempdir().unwrap();
    let checkpoint = folder.path().join("checkpoint");
    fs::create_dir(&checkpoint).unwrap();
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/hf_models/llama3");
    for name in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"] {
        fs::copy(fixture.join(name), checkpoint.join(name)).unwrap();
    }
    fs::write(checkpoint.join("config.json"), config::write(&config, Role::Policy, Dtype::F32, &Default::default(), None).unwrap())
        .unwrap();
    let tensors: Vec<(FileTensor, Dtype)> =
        file_tensors(config.architecture, &wanted).into_iter().map(|tensor| (tensor, Dtype::F32)).collect();
    let writer = Writer { folder: &checkpoint, max_shard_bytes: u64::MAX };
    writer.write(&tensors, |tensor, _| Ok(vec![0; 4 * elements(tensor) as usize])).unwrap();

    let bench = testing::Bench::new(folder.path()).unwrap();
    let kind = rlflow_stages::kinds().into_iter().find(|kind| kind.name() == "import").unwrap();
    let stage = kind.parse(&serde_json::json!({ "path": checkpoint.display().to_string() })).unwrap();
    let mut files: Vec<_> = fs::read_dir(&checkpoint).unwrap().map(|entry| testing::data_file(&entry.unwrap().path())).collect();
    files.sort_by(|a, b| a.name.cmp(&b.name));
    let import = || bench.with_context("import", 1, &[], &[files], |context| kind.run(&stage, context)).unwrap();
    let (taken, outputs) = peak(import);
    assert!(taken < largest + LITTLE, "importing {all} bytes took {taken}; the largest tensor has {largest}");
    let options = ExportOptions { dtype: None, max_shard_bytes: u64::MAX, adapter: false };
    let (taken, _) = peak(|| export(&outputs["model"], &folder.path().join("out"), &options).unwrap());
    assert!(taken < 2 * largest + LITTLE, "exporting {all} bytes took {taken}; the largest tensor has {largest}");
}

/// One test: what another allocates meanwhile would be counted too.
#[test]
fn memory_is_what_it_is_said_to_be() {
    the_allocator_sees_what_the_ledger_counts();
    what_is_held_is_what_was_planned_and_what_the_formulas_say();
    a_checkpoint_comes_in_and_goes_out_tensor_by_tensor();
    idle_ranks_and_adapters_hold_what_was_planned();
    sampling_holds_what_was_planned();
}

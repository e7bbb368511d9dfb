//! What a rank holds at each ZeRO level, counted while a model trains, and what the process takes of the machine:
//!
//!     cargo bench --bench zero_memory
//!
//! The table of the README's chapter on ranks is made with it. Each row is a process of its own, so that its peak is its.

use std::{env, fs, process::Command, sync::Arc};

use rlflow_api::{Architecture, BlockStyle, DeviceSpec, ModelConfig, Placement, Positions};
use rlflow_model::{Group, Head, OptimizerSettings, PackedBatch, TokenTargets, Use, parameters::initial};
use rlflow_stages::{
    language::{self, LanguageBatch},
    train::{Memory, Precision},
};

/// 12 million parameters, none of whose tensors dominates.
fn model() -> ModelConfig {
    ModelConfig {
        architecture: Architecture::Llama,
        vocab_size: 512,
        hidden_size: 384,
        intermediate_size: 1024,
        layers: 7,
        heads: 6,
        kv_heads: 3,
        head_dim: 64,
        context: 64,
        positions: Positions::Rope,
        rope_theta: 10_000.0,
        rope_scaling: None,
        norm_eps: 1e-5,
        tie_embeddings: true,
        style: BlockStyle::default(),
    }
}

fn peak_resident_bytes() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or("0 kB");
    1024 * line.trim().trim_end_matches(" kB").parse::<u64>().unwrap_or(0)
}

/// Two steps, then one line: bytes of state per parameter of the rank that holds most, and the process's peak.
fn train(ranks: usize, zero: u8, precision: Precision) {
    let config = model();
    let ids: Vec<u32> = (0..64).collect();
    let batch = PackedBatch::new([ids.as_slice()]);
    let all: Arc<[u32]> = (0..64).collect();
    let micro = LanguageBatch { targets: TokenTargets { rows: all, targets: batch.ids.clone(), scale: 1.0 }, batch };
    let batches: Vec<LanguageBatch> = vec![micro; 2 * ranks];
    let placement = Placement { devices: vec![DeviceSpec::Cpu; ranks], zero, ..Placement::default() };
    let layout = Memory::default().layout(&placement).expect("the CPU");
    let fresh = initial(&config, 1, 0.02);
    let mut group =
        Group::new(&config, Head::Language, &layout, precision.arithmetic(), Use::Trained(None), |spec| Ok(fresh(spec))).expect("a group");
    group.train(OptimizerSettings { betas: [0.9, 0.95], eps: 1e-8, weight_decay: 0.1, grad_clip: 1.0 });
    for _ in 0..2 {
        group.backward(&batches, |decoder, micro, take| language::backward(decoder, micro, true, take)).expect("a backward pass");
        group.update(1.0, 1e-3).expect("an update");
    }
    let state = layout.ledgers.iter().map(|ledger| ledger.peak()).map(|peak| peak.parameters + peak.gradients + peak.optimizer).max();
    println!("{} {}", state.unwrap_or(0) as f64 / config.parameter_count() as f64, peak_resident_bytes());
}

fn main() {
    let arguments: Vec<String> = env::args().skip(1).collect();
    if let [ranks, zero, precision] = arguments.as_slice() {
        let precision = if precision == "bf16" { Precision::Bf16 } else { Precision::Fp32 };
        return train(ranks.parse().expect("ranks"), zero.parse().expect("a ZeRO level"), precision);
    }
    println!("{} parameters\n", model().parameter_count());
    println!("| | ZeRO | N = 1 | N = 2 | N = 4 | N = 8 | process, N = 4 |\n|---|---|---|---|---|---|---|");
    let program = env::current_exe().expect("this program");
    for precision in ["fp32", "bf16"] {
        for zero in 0..=3 {
            let mut cells = Vec::new();
            let mut process = String::new();
            for ranks in [1, 2, 4, 8] {
                let output =
                    Command::new(&program).args([ranks.to_string(), zero.to_string(), precision.into()]).output().expect("a process");
                let text = String::from_utf8_lossy(&output.stdout).into_owned();
                let (state, resident) = text.trim().split_once(' ').expect("two numbers");
                cells.push(format!("{:.2}", state.parse::<f64>().expect("a number")));
                if ranks == 4 {
                    process = format!("{:.0} MiB", resident.parse::<f64>().expect("a number") / f64::from(1 << 20));
                }
            }
            println!("| {precision} | {zero} | {} | {process} |", cells.join(" | "));
        }
    }
}

use std::{fs, time::Instant};

use burn::tensor::Device;
use rlflow_api::StageResult;
use rlflow_model::{Draws, Gathering, Group, Head, Layout, OptimizerSettings, Sampling, Use, parameters::initial};
use rlflow_stages::{
    language::{self, LanguageBatch, LanguageBatchBuilder},
    train::Precision,
};

use super::size::{Size, random_ids};

/// A model with fresh weights.
fn fresh(size: &Size, precision: Precision, usage: Use<'_>) -> StageResult<Group> {
    let weight = initial(&size.config, 1, 0.02);
    Group::new(&size.config, Head::Language, &Layout::one(Device::flex()), precision.arithmetic(), usage, |spec| Ok(weight(spec)))
}

/// Forward, backward, clipping and AdamW on one batch, as the trainers do it; every token is a target.
pub struct Training {
    model: Group,
    batch: [LanguageBatch; 1],
}

impl Training {
    /// Fresh weights, random tokens.
    pub fn new(size: &Size, precision: Precision) -> StageResult<Self> {
        let mut builder = LanguageBatchBuilder::default();
        for ids in random_ids("train", size.config.vocab_size, size.batch, size.length + 1) {
            builder.push(&ids[..size.length], |at| Some(ids[at + 1]));
        }
        let mut model = fresh(size, precision, Use::Trained(None))?;
        model.train(OptimizerSettings { betas: [0.9, 0.95], eps: 1e-8, weight_decay: 0.1, grad_clip: 1.0 });
        Ok(Self { model, batch: [builder.finish()] })
    }

    /// Parameters of the network that is trained.
    pub fn parameters(&self) -> u64 {
        self.model.specs().iter().map(|spec| spec.len() as u64).sum()
    }

    /// Seconds of a step.
    pub fn step(&mut self) -> StageResult<f64> {
        let start = Instant::now();
        self.model.backward(&self.batch, |decoder, micro, take| language::backward(decoder, micro, false, take))?;
        self.model.update(self.batch[0].counted() as f64, 1e-4)?;
        Ok(start.elapsed().as_secs_f64())
    }
}

/// Sampling from the whole vocabulary; nothing ends an answer.
pub struct Generation {
    model: Group,
    prompts: Vec<Vec<u32>>,
    sampling: Sampling,
}

impl Generation {
    /// Fresh weights, random prompts.
    pub fn new(size: &Size, prompts: usize, prompt_len: usize, max_new_tokens: usize) -> StageResult<Self> {
        let sampling = Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, max_new_tokens, stop_ids: vec![] };
        let prompts = random_ids("generate", size.config.vocab_size, prompts, prompt_len);
        Ok(Self { model: fresh(size, Precision::Fp32, Use::Frozen)?, prompts, sampling })
    }

    /// Seconds for all answers.
    pub fn step(&mut self) -> StageResult<f64> {
        let prompts: Vec<&[u32]> = self.prompts.iter().map(Vec::as_slice).collect();
        let start = Instant::now();
        let answers =
            self.model.generate(&prompts, &self.sampling, Draws { seed: 1, purpose: "speed", step: 0 }, Gathering::Once, |_, _| true)?;
        let seconds = start.elapsed().as_secs_f64();
        assert!(answers.iter().all(|answer| answer.ids.len() == self.sampling.max_new_tokens), "an answer ended early");
        Ok(seconds)
    }
}

/// Most bytes that this process has had resident, by the kernel's count.
pub fn peak_resident_bytes() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().trim_end_matches(" kB").parse::<u64>().ok().map(|kilobytes| 1024 * kilobytes)
}

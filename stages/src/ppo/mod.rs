//! `ppo`: proximal policy optimisation against a reward model, with its four roles as stages of their own.
//!
//! One step is one rollout and the updates on it: sample answers, score them, take a per-token KL penalty against the
//! reference, estimate advantages (GAE), and go over them in several epochs of minibatches.
//!
//! Old log-probabilities come from the training forward, in the micro-batches of the first epoch, so that the first
//! minibatch's ratio is exactly 1. The gap to the sampler's log-probabilities is logged.
//!
//! What differs from TRL 1.9: the score stands on the last token of the answer, not after it; answers never have
//! padding, so every mean is over counted tokens; the value function has no extra position.

mod config;
mod experience;
mod ptx;
mod roles;
mod score_moments;
mod update;

use std::{collections::BTreeMap, time::Instant};

use rlflow_api::{
    Artifact, ArtifactMeta, ArtifactType, DescribeContext, Description, InputMeta, InputPort, ModelConfig, Needs, OutputPort, Placement,
    Problem, Retain, RunContext, Sample, Snapshot, StageError, StageEvent, StageKind, StageResult,
};
use rlflow_model::{CheckpointInfo, Group, Head, LoraSettings, Use, checkpoint};
use rlflow_text::{PromptDataset, Split};
use serde_json::json;

pub use config::{KlController, PpoConfig, RoleTrain};
pub use roles::{ActorRole, CriticRole, RefRole, RewardRole, RoleTraining};

use self::{experience::Experience, ptx::Ptx, score_moments::ScoreMoments, update::Updated};
use crate::{
    lora,
    models::{self, LoadedModel},
    train::{Memory, Pass, Precision, RowOrder, Sharding, frozen_needs, sampling_bytes, tokens_of_rows, training_needs},
};

/// See the module.
pub struct Ppo;

impl StageKind for Ppo {
    type Config = PpoConfig;

    const NAME: &'static str = "ppo";
    const VERSION: u32 = 2;
    const SUMMARY: &'static str = "Proximal policy optimisation of a policy against a reward model, held to a reference by a KL penalty.";
    const INPUTS: &'static [InputPort] = &[
        InputPort::one("prompts", &[ArtifactType::Prompts], "Prompts to answer."),
        InputPort::one("actor", &[ArtifactType::Policy], "The policy to optimise.").from_kinds(&["ppo.actor"]),
        InputPort::one("critic", &[ArtifactType::Critic], "The value model.").from_kinds(&["ppo.critic"]),
        InputPort::one("ref", &[ArtifactType::Policy], "The frozen reference.").from_kinds(&["ppo.ref"]),
        InputPort::one("reward", &[ArtifactType::Reward], "The frozen reward model.").from_kinds(&["ppo.reward"]),
        InputPort::one("ptx", &[ArtifactType::Conversations, ArtifactType::Text], "Text to keep predicting, with `ptx_coef`.").optional(),
    ];
    const OUTPUTS: &'static [OutputPort] = &[
        OutputPort { name: "model", types: &[ArtifactType::Policy], doc: "The optimised policy." },
        OutputPort { name: "critic", types: &[ArtifactType::Critic], doc: "The value model that was trained with it." },
        OutputPort { name: "ema", types: &[ArtifactType::Policy], doc: "The policy's moving average with `ema_decay`; else the policy." },
    ];
    const METRICS: &'static [(&'static str, &'static str)] = &[
        ("objective/scores", "mean score of the reward model, after the missing-EOS penalty"),
        ("objective/kl", "mean over answers of the summed log-ratio of policy to reference"),
        ("objective/entropy", "mean entropy of the policy at answer tokens, in nats"),
        ("objective/non_score_reward", "mean over answers of the summed KL penalty"),
        ("objective/rlhf_reward", "mean of score (normalised and clipped, if so set) plus KL penalty"),
        ("objective/kl_coef", "KL coefficient of the step"),
        ("policy/approxkl_avg", "half the mean squared log-ratio of new to old policy"),
        ("policy/clipfrac_avg", "share of tokens whose policy loss was clipped"),
        ("policy/entropy_avg", "mean entropy during the updates, in nats"),
        ("policy/first_ratio_error", "largest distance of the first minibatch's ratio from 1: 0 on the CPU"),
        ("policy/kl_loss", "with kl_in = \"loss\": mean KL estimate per token during the updates"),
        ("policy/grad_norm", "mean gradient norm of the actor before clipping"),
        ("loss/policy_avg", "mean policy loss"),
        ("loss/value_avg", "mean value loss"),
        ("loss/ptx_avg", "mean cross-entropy on the input `ptx`"),
        ("val/clipfrac_avg", "share of tokens whose value loss was clipped"),
        ("val/explained_variance", "share of the returns' variance that the values explain"),
        ("val/ratio", "mean ratio of new to old policy"),
        ("val/ratio_var", "its variance over minibatches"),
        ("val/num_eos_tokens", "answers that ended by themselves"),
        ("val/grad_norm", "mean gradient norm of the critic before clipping"),
        ("response_length/mean", "mean length of the answers, in tokens"),
        ("response_length/max", "longest answer, in tokens"),
        ("sampler/logprob_gap_mean", "mean distance of the sampler's log-probabilities from the training forward's"),
        ("sampler/logprob_gap_max", "largest such distance"),
        ("lr", "learning rate of the actor"),
        ("episode", "answers sampled so far"),
        ("tokens_per_s", "answer tokens sampled and learnt from per second"),
        ("memory/peak_bytes", "bytes of the rank that held most, at its peak"),
        (
            "memory/<device>/<rank>/peak_bytes",
            "bytes of each rank at its peak; likewise parameters_bytes, gradients_bytes, optimizer_bytes, activations_bytes and buffers_bytes then, and now_bytes at the end",
        ),
    ];
    const DRAWS: bool = true;
    const ON_RANKS: bool = true;

    fn normalise(config: &mut PpoConfig) {
        config.normalise();
    }

    fn check(config: &PpoConfig) -> Vec<Problem> {
        config.check()
    }

    fn describe(config: &PpoConfig, context: &DescribeContext<'_>) -> Result<Description, Vec<Problem>> {
        match (config.ptx_coef > 0.0, context.input("ptx").is_some()) {
            (true, false) => {
                let problem = Problem::new("missing_input", "ptx_coef", "`ptx_coef` needs the input `ptx`");
                return Err(vec![problem.hint("connect a corpus or conversations to `inputs.ptx`, or remove `ptx_coef`")]);
            }
            (false, true) => {
                let problem = Problem::new("missing_setting", "inputs.ptx", "the input `ptx` is not used without `ptx_coef`");
                return Err(vec![problem.hint("OpenRLHF's default is ptx_coef = 0.05; or remove the input")]);
            }
            _ => {}
        }
        let actor = context.input("actor").map(|input| &input.meta);
        let model = actor.and_then(|meta| meta.model.as_ref());
        if let Some(model) = model
            && config.max_new_tokens >= model.context
        {
            let message = format!(
                "max_new_tokens = {} leaves no room for a prompt in the model's context of {}",
                config.max_new_tokens, model.context
            );
            let hint = format!("a prompt and its answer share the context: at most {}", model.context - 1);
            return Err(vec![Problem::new("context_too_long", "max_new_tokens", message).hint(hint)]);
        }
        // Beside the roles stands what a rollout takes.
        let sharding = Sharding::in_place(context.input("actor").map_or(&Placement::default(), |actor| &actor.placement));
        let needs = model.map_or_else(Needs::default, |model| Needs {
            buffer_bytes: sampling_bytes(
                model,
                config.rollout(prompt_tokens(config, context, model, config.batch_size)),
                sharding,
                config.precision,
            ),
            tokens: (config.batch_size * model.context) as u64 * config.steps,
            ..Needs::default()
        });
        let meta = |artifact_type| match actor {
            Some(actor) => ArtifactMeta { artifact_type, ..actor.clone() },
            None => ArtifactMeta::new(artifact_type),
        };
        let outputs = [("model", ArtifactType::Policy), ("critic", ArtifactType::Critic), ("ema", ArtifactType::Policy)];
        let outputs = outputs.into_iter().map(|(port, artifact_type)| (port.to_owned(), meta(artifact_type))).collect();
        Ok(Description { outputs, needs, holds: held(config, context) })
    }

    fn horizon(_: &PpoConfig) -> Vec<&'static str> {
        vec!["steps"]
    }

    fn can_continue(config: &PpoConfig, snapshot: &Snapshot) -> bool {
        let number = |name: &str| snapshot.info.get(name).and_then(serde_json::Value::as_u64);
        let (Some(total), Some(stable)) = (number("total_steps"), number("stable_until")) else { return false };
        snapshot.step <= config.steps && (total == config.steps || snapshot.step <= stable)
    }

    fn run(config: &PpoConfig, context: &RunContext<'_>) -> StageResult<BTreeMap<String, Artifact>> {
        let mut ppo = Run::load(config, context)?;
        ppo.train()?;
        ppo.memory.report(context)?;
        ppo.publish()
    }
}

/// Tokens of so many prompts.
fn prompt_tokens(config: &PpoConfig, context: &DescribeContext<'_>, model: &ModelConfig, prompts: usize) -> usize {
    tokens_of_rows(context, "prompts", prompts, model.context.saturating_sub(config.max_new_tokens), config.shuffle)
}

/// The adapter that a role trains, if it does.
fn adapter(role: &InputMeta) -> Option<LoraSettings> {
    role.settings.get("lora").and_then(|lora| serde_json::from_value(lora.clone()).ok())
}

/// Whether a frozen role is what lies below the adapter of a trained one, in the same place: then one copy is both ([`Run::load`]).
fn is_below_adapter(config: &PpoConfig, context: &DescribeContext<'_>, port: &str) -> bool {
    // With a shared trunk the critic gives its head and goes.
    let trained = match port {
        "ref" => context.input("actor"),
        "reward" if !config.share_backbone => context.input("critic"),
        _ => None,
    };
    let (Some(frozen), Some(trained)) = (context.input(port), trained) else { return false };
    frozen.placement == trained.placement && adapter(trained).is_some() && frozen.made_of == trained.made_of
}

/// What the roles hold, per rank of each. A critic that shares the actor's trunk is no model of its own.
fn held(config: &PpoConfig, context: &DescribeContext<'_>) -> Vec<(&'static str, Needs)> {
    let train = |port: &str| -> RoleTrain {
        let settings = context.input(port).and_then(|input| input.settings.get("train").cloned());
        settings.and_then(|settings| serde_json::from_value(settings).ok()).unwrap_or_default()
    };
    let actor_head = if config.share_backbone { Head::LanguageAndScore } else { Head::Language };
    let roles =
        [("actor", actor_head, true), ("ref", Head::Language, false), ("reward", Head::Score, false), ("critic", Head::Score, true)];
    let needs = |(port, head, is_trained): (&'static str, Head, bool)| {
        let input = context.input(port)?;
        let model = input.meta.model.as_ref()?;
        let sharding = Sharding::in_place(&input.placement);
        let pass = |train: &RoleTrain| {
            let answers = train.micro_batch_size.min(config.mini_batch_size());
            train.pass(head, prompt_tokens(config, context, model, answers) + answers * config.max_new_tokens, config)
        };
        if !is_trained {
            // Frozen ones score as many answers at a time as the actor learns from, those of the whole rollout in turn.
            let pass = pass(&train("actor"));
            let micro_batches = pass.micro_batches * config.num_mini_batches as u64;
            let needs = frozen_needs(model, Pass { micro_batches, ..pass }, sharding);
            let parameter_bytes = if is_below_adapter(config, context, port) { 0 } else { needs.parameter_bytes };
            return Some((port, Needs { parameter_bytes, ..needs }));
        }
        let adapter = adapter(input);
        let mut needs = training_needs(model, adapter.as_ref(), pass(&train(port)), sharding, 0);
        if port == "actor" && config.ema_decay.is_some() {
            needs.parameter_bytes += match &adapter {
                // What lies below it is not averaged.
                Some(lora) => 4 * lora.parameter_count(model) / if sharding.zero == 3 { sharding.ranks as u64 } else { 1 },
                // The average is f32.
                None => needs.parameter_bytes * if config.precision == Precision::Bf16 { 2 } else { 1 },
            };
        }
        Some((port, needs))
    };
    roles.into_iter().take(if config.share_backbone { 3 } else { 4 }).filter_map(needs).collect()
}

/// The actor and the critic: two models, or two heads of one.
struct Trained {
    model: Group,
    train: RoleTrain,
    loaded: LoadedModelInfo,
}

struct LoadedModelInfo {
    info: CheckpointInfo,
    artifact: Artifact,
}

impl Trained {
    fn new(loaded: LoadedModel) -> StageResult<Self> {
        let LoadedModel { mut model, info, artifact } = loaded;
        let RoleTraining { train, .. } = RoleTraining::of(&info)?;
        model.train(train.optimizer());
        Ok(Self { model, train, loaded: LoadedModelInfo { info, artifact } })
    }
}

struct Run<'a> {
    config: &'a PpoConfig,
    context: &'a RunContext<'a>,
    prompts: PromptDataset,
    usable: Vec<usize>,
    order: RowOrder,
    actor: Trained,
    /// Absent with a shared backbone.
    critic: Option<Trained>,
    reference: Group,
    reward: Group,
    tokenizer: rlflow_text::ChatTokenizer,
    kl_coef: f64,
    score_moments: ScoreMoments,
    ptx: Option<Ptx>,
    /// Bytes of all roles.
    memory: Memory,
    /// Moving average of the actor, if one is kept.
    average: Option<Group>,
    /// Gradient norms of the newest minibatch: actor, critic.
    last_norms: (f64, f64),
    /// What is dropped of what adapters see: the same in the passes that give old log-probabilities and values and in all updates on
    /// them (arXiv:2202.11818), so that the first ratio is 1.
    dropout: lora::Dropout,
}

impl<'a> Run<'a> {
    fn load(config: &'a PpoConfig, context: &'a RunContext<'a>) -> StageResult<Self> {
        models::check_same_tokenizer(context, &["prompts", "actor", "critic", "ref", "reward"])?;
        let memory = Memory::of(context.processes);
        let load = |port: &str, head: Head, is_trained: bool| -> StageResult<LoadedModel> {
            let role = context.input(port)?;
            let training = RoleTraining::of(&CheckpointInfo::of(&role.artifact)?)?;
            let usage = if is_trained { Use::Trained(training.lora.as_ref()) } else { Use::Frozen };
            models::load_artifact(&role.artifact, head, context.seed, &memory.layout(&role.placement)?, config.precision, usage)
        };
        // What a role is below its adapter, in the same place, is not held a second time.
        let load_frozen = |port: &str, head: Head, above: &str, model: &LoadedModel| -> StageResult<Group> {
            let (role, above) = (context.input(port)?, context.input(above)?);
            let base = if role.placement == above.placement { model.base_as(&role.artifact) } else { None };
            base.map_or_else(|| load(port, head, false).map(|loaded| loaded.model), Ok)
        };
        let actor_head = if config.share_backbone { Head::LanguageAndScore } else { Head::Language };
        let (actor, critic) = (load("actor", actor_head, true)?, load("critic", Head::Score, true)?);
        let reference = load_frozen("ref", Head::Language, "actor", &actor)?;
        // A critic that only gives its head to a shared trunk goes, and takes its count with it.
        let reward = match config.share_backbone {
            true => load("reward", Head::Score, false)?.model,
            false => load_frozen("reward", Head::Score, "critic", &critic)?,
        };
        let (actor, critic) = (Trained::new(actor)?, Trained::new(critic)?);
        let adapters = [&actor, &critic].map(|role| role.model.first().adapter());
        let dropout = lora::Dropout::of(adapters.into_iter().flatten().find(|lora| lora.dropout > 0.0), context.seed);
        let (actor, critic) = if config.share_backbone {
            let mut shared = actor;
            share_score_head(&mut shared.model, &critic.model)?;
            (shared, None)
        } else {
            (actor, Some(critic))
        };
        let tokenizer = models::tokenizer(&actor.loaded.artifact)?;

        let prompts = PromptDataset::load(&context.input("prompts")?.artifact, Split::Train)?;
        let room = actor.model.config().context.min(reward.config().context);
        let usable: Vec<usize> = (0..prompts.len()).filter(|row| prompts.row(*row).ids.len() + config.max_new_tokens <= room).collect();
        let dropped = prompts.len() - usable.len();
        if prompts.is_empty() {
            return Err(StageError::invalid_with_hint(
                "there is no prompt to train on",
                "is everything held out (`heldout` of the prompts)? `rlflow show` shows what they hold",
            ));
        }
        if dropped > 0 {
            context.warning(format!(
                "{dropped} of {} prompts leave no room for {} new tokens and are not used",
                prompts.len(),
                config.max_new_tokens
            ));
        }
        if usable.is_empty() {
            return Err(StageError::invalid_with_hint(
                format!("no prompt leaves room for {} new tokens in a context of {room}", config.max_new_tokens),
                "a smaller `max_new_tokens`, shorter prompts, or a longer `model.context`",
            ));
        }
        let order = RowOrder::new(context.seed, "ppo/prompts", usable.len(), config.shuffle);
        let ptx_batch = config.batch_size.div_ceil(config.num_mini_batches);
        let length = actor.model.config().context;
        let ptx = Ptx::load(context, &tokenizer, length, config.ptx_coef, ptx_batch, actor.train.micro_batch_size)?;
        Ok(Self {
            config,
            context,
            prompts,
            usable,
            order,
            average: config.ema_decay.map(|_| actor.model.frozen_copy()).transpose()?,
            actor,
            critic,
            reference,
            reward,
            tokenizer,
            kl_coef: config.kl_coef,
            score_moments: ScoreMoments::default(),
            memory,
            ptx,
            last_norms: (0.0, 0.0),
            dropout,
        })
    }

    fn train(&mut self) -> StageResult<()> {
        let (config, context) = (self.config, self.context);
        context.snapshots.set_policy(config.snapshots.policy());
        let mut first = 0;
        if let Some((snapshot, state)) = context.resume()? {
            checkpoint::load_state("actor", &state, &mut self.actor.model)?;
            if let Some(critic) = &mut self.critic {
                checkpoint::load_state("critic", &state, &mut critic.model)?;
            }
            let coefficient = state.read("kl_coef")?;
            let bytes = coefficient[..].try_into().map_err(|_| StageError::invalid("snapshot without a KL coefficient"))?;
            self.kl_coef = f64::from_le_bytes(bytes);
            self.score_moments = ScoreMoments::from_bytes(&state.read("score_moments")?)?;
            if let Some(average) = &mut self.average {
                checkpoint::load_weights("average", &state, average)?;
            }
            first = snapshot.step;
        }
        // The roles' schedules come with their artifacts; a snapshot says how long they did not depend on the number of steps.
        let roles = std::iter::once(&self.actor).chain(&self.critic);
        let stable_until = roles.map(|role| role.train.learning_rate(config.steps).stable_until()).min().unwrap_or(0);
        let (start, mut tokens) = (Instant::now(), 0);
        for step in first..config.steps {
            let experience = Experience::collect(self, step)?;
            tokens += experience.response_tokens();
            let kl_coef = self.kl_coef;
            let updated = self.update(&experience, step)?;
            if let (Some(average), Some(decay)) = (&mut self.average, config.ema_decay) {
                average.blend(&self.actor.model, decay)?;
            }
            self.report(step, &experience, &updated, kl_coef)?;
            self.kl_coef = config.kl_controller.next(kl_coef, experience.mean_kl(), experience.samples.len());

            let done = step + 1;
            let seconds = start.elapsed().as_secs_f64();
            context.reporter.report(StageEvent::Progress {
                done,
                total: config.steps,
                unit: "steps".into(),
                rate: Some((done - first) as f64 / seconds),
                tokens_per_s: Some(tokens as f64 / seconds),
                detail: format!("score {:.3}, KL {:.2}", experience.mean_score(), experience.mean_kl()),
            });
            let last = done == config.steps;
            if last || context.is_snapshot_due(done)? {
                let mut state = context.state();
                checkpoint::save_state("actor", &self.actor.model, &mut state)?;
                if let Some(critic) = &self.critic {
                    checkpoint::save_state("critic", &critic.model, &mut state)?;
                }
                state.put("kl_coef", &self.kl_coef.to_le_bytes())?;
                state.put("score_moments", &self.score_moments.to_bytes())?;
                if let Some(average) = &self.average {
                    checkpoint::save_weights("average", average, &mut state)?;
                }
                let retain = if last { Retain::Keep } else { Retain::Latest };
                context.save_snapshot(done, retain, json!({ "total_steps": config.steps, "stable_until": stable_until }), state)?;
            }
            if !last {
                context.check_cancelled()?;
            }
        }
        if tokens > 0 {
            context.measurement("tokens_per_s", tokens as f64 / start.elapsed().as_secs_f64());
        }
        Ok(())
    }

    fn report(&self, step: u64, experience: &Experience, updated: &Updated, kl_coef: f64) -> StageResult<()> {
        let metrics =
            [experience.metrics(kl_coef), updated.metrics(), vec![("episode", ((step + 1) * self.config.batch_size as u64) as f64)]]
                .concat();
        if let Some((name, value)) = metrics.iter().find(|(_, value)| !value.is_finite()) {
            let last_snapshot = self.context.snapshots.last_step();
            return Err(StageError::NonFinite { step: step + 1, tensor: (*name).into(), value: *value as f32, last_snapshot });
        }
        self.context.metrics(step + 1, &metrics);
        if step.is_multiple_of(self.config.sample_every) || step + 1 == self.config.steps {
            for sample in experience.samples.iter().take(2) {
                self.context.sample(Sample {
                    step: step + 1,
                    prompt: self.prompts.row(sample.prompt).text.clone(),
                    response: self.tokenizer.decode(&sample.answered.ids[sample.answered.prompt_len..]),
                    scores: vec![("score".into(), sample.score), ("kl".into(), sample.kl())],
                });
            }
        }
        Ok(())
    }

    fn publish(self) -> StageResult<BTreeMap<String, Artifact>> {
        let context = self.context;
        let without_role = |loaded: &LoadedModelInfo| CheckpointInfo { role: None, ..loaded.info.clone() };
        let publish = |artifact_type, model: &Group, head, loaded: &LoadedModelInfo| {
            models::publish(context, artifact_type, model, head, &without_role(loaded), &loaded.artifact)
        };
        let actor = &self.actor.loaded;
        let model = publish(ArtifactType::Policy, &self.actor.model, Head::Language, actor)?;
        // With a shared backbone both outputs come from the actor, each with its own head.
        let critic = self.critic.as_ref().unwrap_or(&self.actor);
        let critic = publish(ArtifactType::Critic, &critic.model, Head::Score, &critic.loaded)?;
        let ema = match &self.average {
            Some(average) => publish(ArtifactType::Policy, average, Head::Language, actor)?,
            None => model.clone(),
        };
        Ok(BTreeMap::from([("model".into(), model), ("critic".into(), critic), ("ema".into(), ema)]))
    }
}

/// Puts the critic's scalar head on the actor's trunk.
fn share_score_head(actor: &mut Group, critic: &Group) -> StageResult<()> {
    if let (Some(to), Some(from)) = (actor.first().slots().score, critic.first().slots().score) {
        actor.set_weight(to, &critic.weight(from)?);
    }
    Ok(())
}

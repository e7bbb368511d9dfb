use std::time::Instant;

use rlflow_api::{Retain, RunContext, StageError, StageEvent, StageResult};
use rlflow_model::{Decoder, Group, Schedule, checkpoint, ranks::Take};
use serde_json::json;

use super::{TrainExecution, TrainPlan};

/// Sums over a micro-batch that metrics are made of. Merged over micro-batches in their order.
pub type Sums = Vec<f64>;

/// What a trainer does with its data; the loop around it is [`train`].
pub trait Task: Sync {
    /// The sequences of one forward and backward pass.
    type MicroBatch: Sync;

    /// The micro-batches of step `step`, counted from 0.
    fn micro_batches(&mut self, step: u64) -> StageResult<Vec<Self::MicroBatch>>;

    /// What the losses of a step need to know of all its micro-batches under the weights that it starts from.
    ///
    /// # Errors
    /// If a rank fails.
    fn prepare(&self, _model: &Group, _micro_batches: &mut [Self::MicroBatch]) -> StageResult<()> {
        Ok(())
    }

    /// What the step's sums of losses are divided by: its counted tokens, or its pairs.
    fn denominator(&self, micro_batches: &[Self::MicroBatch]) -> f64;

    /// Whether anything of the micro-batch counts in the loss; if not, nothing is computed.
    fn counts(&self, _micro_batch: &Self::MicroBatch) -> bool {
        true
    }

    /// Tokens that the network sees, for speed.
    fn tokens(&self, micro_batch: &Self::MicroBatch) -> u64;

    /// Gradients of the *sum* of losses, handed to `take` as [`Decoder::backward`] does; returns sums for metrics, the loss
    /// first.
    fn backward(&self, model: &Decoder, micro_batch: &Self::MicroBatch, checkpointing: bool, take: Take<'_>) -> Sums;

    /// Adds the sums of the next micro-batch of a step to those before it.
    fn merge(&self, sums: &mut Sums, next: &Sums) {
        sums.iter_mut().zip(next).for_each(|(sum, value)| *sum += value);
    }

    /// Metrics of a step from its sums, the loss first.
    fn metrics(&self, sums: &Sums, denominator: f64) -> Vec<(&'static str, f64)>;

    /// Metrics on held-out data.
    ///
    /// # Errors
    /// If a rank fails.
    fn evaluate(&self, model: &Group) -> StageResult<Vec<(&'static str, f64)>>;
}

const STATE: &str = "model";

/// Trains `model` over all steps of `plan`, from the newest usable snapshot if there is one. What it leaves behind
/// (weights, metrics) is the same as that of an uninterrupted run, to the bit, and on the CPU the same on any ranks.
///
/// # Errors
/// If data cannot be read, a value is not finite, or the user interrupts (after a snapshot).
pub fn train<T: Task>(
    context: &RunContext<'_>,
    plan: &TrainPlan,
    execution: &TrainExecution,
    model: &mut Group,
    task: &mut T,
) -> StageResult<()> {
    let schedule = &plan.learning_rate;
    let needed = schedule.warmup_steps.saturating_add(if schedule.schedule == Schedule::Wsd { schedule.decay_steps } else { 0 });
    if needed > plan.steps {
        context.warning(format!("the schedule's warmup and decay take {needed} steps, but the data give only {}", plan.steps));
    }
    model.train(plan.optimizer);
    context.snapshots.set_policy(execution.snapshots.policy());
    let mut first = 0;
    if let Some((snapshot, state)) = context.resume()? {
        checkpoint::load_state(STATE, &state, model)?;
        first = snapshot.step;
    }
    let stable_until = plan.learning_rate.stable_until();
    let snapshot = |done: u64, retain: Retain, model: &Group| {
        let mut state = context.state();
        checkpoint::save_state(STATE, model, &mut state)?;
        context.save_snapshot(done, retain, json!({ "total_steps": plan.steps, "stable_until": stable_until }), state)
    };
    let (start, mut tokens, mut last_report) = (Instant::now(), 0, None::<Instant>);
    for step in first..plan.steps {
        let mut micro_batches = task.micro_batches(step)?;
        let denominator = task.denominator(&micro_batches);
        if denominator <= 0.0 {
            return Err(StageError::invalid_with_hint(
                format!("step {}: no token of the batch counts in the loss", step + 1),
                "look at the rows with `rlflow show`: are there assistant turns, and do they fit the context?",
            ));
        }
        task.prepare(model, &mut micro_batches)?;
        tokens += micro_batches.iter().map(|micro_batch| task.tokens(micro_batch)).sum::<u64>();
        let counted: Vec<&T::MicroBatch> = micro_batches.iter().filter(|micro_batch| task.counts(micro_batch)).collect();
        let checkpointing = execution.gradient_checkpointing;
        let each = model.backward(&counted, |decoder, micro_batch, take| task.backward(decoder, micro_batch, checkpointing, take))?;
        let mut each = each.into_iter();
        let mut sums = each.next().unwrap_or_default();
        each.for_each(|next| task.merge(&mut sums, &next));
        let lr = plan.learning_rate.at(step);
        let norm = model.update(denominator, lr)?;
        let metrics = task.metrics(&sums, denominator);
        check_finite(step + 1, &metrics, norm, model, context)?;
        context.metrics(step + 1, &[&metrics[..], &[("grad_norm", norm), ("learning_rate", lr)]].concat());

        let done = step + 1;
        let last = done == plan.steps;
        if last || plan.eval_every.is_some_and(|every| done % every == 0) {
            let metrics = task.evaluate(model)?;
            context.metrics(done, &metrics);
        }
        let due = match execution.log_every {
            Some(every) => done % every == 0,
            None => last_report.is_none_or(|at| at.elapsed().as_millis() >= 100),
        };
        if due || last {
            let seconds = start.elapsed().as_secs_f64();
            let detail = metrics.first().map(|(name, value)| format!("{name} {value:.4}")).unwrap_or_default();
            context.reporter.report(StageEvent::Progress {
                done,
                total: plan.steps,
                unit: "steps".into(),
                rate: Some((done - first) as f64 / seconds),
                tokens_per_s: Some(tokens as f64 / seconds),
                detail,
            });
            last_report = Some(Instant::now());
        }
        if last || done == stable_until {
            snapshot(done, Retain::Keep, model)?;
        } else if context.is_snapshot_due(done)? {
            snapshot(done, Retain::Latest, model)?;
        }
        context.check_cancelled()?;
    }
    if tokens > 0 {
        context.measurement("tokens_per_s", tokens as f64 / start.elapsed().as_secs_f64());
    }
    Ok(())
}

fn check_finite(step: u64, metrics: &[(&'static str, f64)], norm: f64, model: &Group, context: &RunContext<'_>) -> StageResult<()> {
    let last_snapshot = context.snapshots.last_step();
    if let Some((name, value)) = metrics.iter().find(|(_, value)| !value.is_finite()) {
        return Err(StageError::NonFinite { step, tensor: (*name).into(), value: *value as f32, last_snapshot });
    }
    if !norm.is_finite() {
        let found = model.first_non_finite()?.map(|(spec, value)| (format!("the gradient of {}", spec.name), value));
        let (tensor, value) = found.unwrap_or_else(|| ("the gradient norm".into(), norm as f32));
        return Err(StageError::NonFinite { step, tensor, value, last_snapshot });
    }
    Ok(())
}

//! Losses and advantage estimators, as functions on tensors and slices that read like the papers.
//!
//! Reductions are named: those here give one value per row or a sum; the division by a batch's count happens in the
//! optimizer, and nowhere else.

use burn::tensor::{
    Tensor,
    activation::{log_sigmoid, relu, sigmoid},
};

/// Bradley-Terry loss of a reward model per pair: `-log sigmoid(chosen - rejected - margin)`, and with
/// `centering` c also `c (chosen + rejected)^2` (arXiv:2203.02155 eq. 1; arXiv:2312.09244 for the centering).
///
/// # Shapes
/// - chosen, rejected, margins: `[pairs]`
/// - returns: `[pairs]`
pub fn pairwise_reward_loss(chosen: Tensor<1>, rejected: Tensor<1>, margins: Tensor<1>, centering: f64) -> Tensor<1> {
    let loss = log_sigmoid(chosen.clone() - rejected.clone() - margins).neg();
    if centering == 0.0 { loss } else { loss + (chosen + rejected).powi_scalar(2) * centering }
}

/// DPO loss per pair, with conservative label smoothing (arXiv:2305.18290 eq. 7; cDPO: Mitchell, 2023):
/// `-(1 - e) log sigmoid(beta d) - e log sigmoid(-beta d)`.
///
/// TRL 1.9 ignores `label_smoothing` for its sigmoid loss; here it is the probability that a label is flipped.
///
/// # Shapes
/// - deltas: `[pairs]`, `(policy - ref)` of chosen minus that of rejected, summed log-probabilities
/// - returns: `[pairs]`
pub fn dpo_sigmoid_loss(deltas: Tensor<1>, beta: f64, label_smoothing: f64) -> Tensor<1> {
    let logits = deltas * beta;
    let loss = log_sigmoid(logits.clone()).neg() * (1.0 - label_smoothing);
    if label_smoothing == 0.0 { loss } else { loss - log_sigmoid(logits.neg()) * label_smoothing }
}

/// Robust DPO loss per pair (arXiv:2403.00409 eq. 12): the estimate of the sigmoid loss that labels flipped with
/// probability e leave unbiased, `(-(1 - e) log sigmoid(beta d) + e log sigmoid(-beta d)) / (1 - 2 e)`. Can be negative.
///
/// # Shapes
/// - deltas: `[pairs]`, as in [`dpo_sigmoid_loss`]
/// - returns: `[pairs]`
pub fn dpo_robust_loss(deltas: Tensor<1>, beta: f64, label_smoothing: f64) -> Tensor<1> {
    let logits = deltas * beta;
    let loss = log_sigmoid(logits.clone()).neg() * (1.0 - label_smoothing) + log_sigmoid(logits.neg()) * label_smoothing;
    loss / (1.0 - 2.0 * label_smoothing)
}

/// Hinge loss per pair (SLiC, arXiv:2305.10425, on DPO's rewards as in arXiv:2309.06657): `max(0, 1 - beta d)`.
///
/// # Shapes
/// - deltas: `[pairs]`, as in [`dpo_sigmoid_loss`]
/// - returns: `[pairs]`
pub fn dpo_hinge_loss(deltas: Tensor<1>, beta: f64) -> Tensor<1> {
    relu(deltas * -beta + 1.0)
}

/// IPO loss per pair (arXiv:2310.12036 eq. 17): `(d - 1 / (2 beta))^2`.
///
/// # Shapes
/// - deltas: `[pairs]`: of summed log-probabilities as in the paper, or of means over tokens as its authors advise and
///   TRL computes
/// - returns: `[pairs]`
pub fn ipo_loss(deltas: Tensor<1>, beta: f64) -> Tensor<1> {
    (deltas - 1.0 / (2.0 * beta)).powi_scalar(2)
}

/// SimPO loss per pair (arXiv:2405.14734 eq. 6): `-log sigmoid(beta (c - r) - gamma)`, without a reference. Label smoothing
/// as in [`dpo_sigmoid_loss`].
///
/// # Shapes
/// - chosen, rejected: `[pairs]`, mean log-probabilities of the answers' tokens
/// - returns: `[pairs]`
pub fn simpo_loss(chosen: Tensor<1>, rejected: Tensor<1>, beta: f64, gamma: f64, label_smoothing: f64) -> Tensor<1> {
    dpo_sigmoid_loss(chosen - rejected - gamma / beta, beta, label_smoothing)
}

/// Log odds ratio of chosen over rejected answers (ORPO, arXiv:2403.07691 eq. 4):
/// `log(p / (1 - p)) - log(q / (1 - q))` with `log p`, `log q` the mean log-probabilities of their tokens.
///
/// # Shapes
/// - chosen, rejected: `[pairs]`, negative
/// - returns: `[pairs]`
pub fn log_odds_ratio(chosen: Tensor<1>, rejected: Tensor<1>) -> Tensor<1> {
    chosen.clone() - rejected.clone() - (log_one_minus_exp(chosen) - log_one_minus_exp(rejected))
}

/// `log(1 - exp(x))` for negative `x`, without loss of digits at either end (Maechler, "Accurately computing
/// log(1 - exp(-|a|))", 2012).
fn log_one_minus_exp(x: Tensor<1>) -> Tensor<1> {
    let exp = x.clone().exp();
    // exp(x) - 1 = tanh(x / 2) (exp(x) + 1) keeps the digits where exp(x) is nearly 1.
    let near_zero = ((x.clone() * 0.5).tanh() * (exp.clone() + 1.0)).neg().log();
    let is_far = x.lower_equal_scalar(-std::f64::consts::LN_2);
    // Clamped, because the branch that is not taken must not give an infinity for its zero gradient to meet.
    near_zero.mask_where(is_far, exp.clamp_max(0.5).neg().log1p())
}

/// KTO loss per answer (arXiv:2402.01306 eq. 7): `1 - sigmoid(beta (ratio - kl))` of a desirable one, and
/// `1 - sigmoid(beta (kl - ratio))` of an undesirable one; weights are the caller's.
///
/// # Shapes
/// - ratios: `[answers]`, policy minus reference, summed log-probabilities
/// - kl: the batch's estimate of the divergence from the reference, at least 0, a constant
/// - returns: `[answers]`
pub fn kto_loss(ratios: Tensor<1>, kl: f64, beta: f64, is_desirable: bool) -> Tensor<1> {
    // 1 - sigmoid(x) = sigmoid(-x).
    let sign = if is_desirable { -beta } else { beta };
    sigmoid((ratios - kl) * sign)
}

/// Where the policy loss stops following the ratio.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PolicyClip {
    /// How far below 1 the ratio counts.
    pub low: f64,
    /// How far above 1 (arXiv:2503.14476 section 3.1 lets it be larger).
    pub high: f64,
    /// Times `-A`, the most that a token with a negative advantage can lose (dual clip, arXiv:1912.09729 eq. 5); above 1.
    pub dual: Option<f64>,
}

impl From<f64> for PolicyClip {
    fn from(range: f64) -> Self {
        Self { low: range, high: range, dual: None }
    }
}

/// Clipped policy loss per token, PPO eq. 7 (arXiv:1707.06347): `max(-A r, -A clip(r, 1 - low, 1 + high))`, and with a dual
/// clip c at most `-A c` where A is negative.
///
/// # Shapes
/// - logprobs, old_logprobs, advantages: `[tokens]`, counted tokens only
/// - returns: `[tokens]`
pub fn clipped_policy_loss(logprobs: Tensor<1>, old_logprobs: Tensor<1>, advantages: Tensor<1>, clip: impl Into<PolicyClip>) -> Tensor<1> {
    let PolicyClip { low, high, dual } = clip.into();
    let ratio = (logprobs - old_logprobs).exp();
    let clipped = ratio.clone().clamp(1.0 - low, 1.0 + high);
    let loss = (advantages.clone() * ratio).neg();
    let clipped_loss = (advantages.clone() * clipped).neg();
    let loss = maximum(loss, clipped_loss);
    let Some(dual) = dual else { return loss };
    // The bound is a constant: where it holds, nothing flows back.
    let bound = advantages.clone() * -dual;
    let is_bounded = advantages.lower_scalar(0.0).bool_and(loss.clone().greater(bound.clone()));
    loss.mask_where(is_bounded, bound)
}

/// Clipped value loss per token: `max((v - R)^2, (clip(v, old - e, old + e) - R)^2) / 2`.
///
/// # Shapes
/// - values, old_values, returns: `[tokens]`, counted tokens only
/// - returns: `[tokens]`
pub fn clipped_value_loss(values: Tensor<1>, old_values: Tensor<1>, returns: Tensor<1>, clip_range: f64) -> Tensor<1> {
    let clipped = old_values.clone() + (values.clone() - old_values).clamp(-clip_range, clip_range);
    let loss = (values - returns.clone()).powi_scalar(2);
    let clipped_loss = (clipped - returns).powi_scalar(2);
    maximum(loss, clipped_loss) * 0.5
}

/// The larger of two tensors, element by element; where they are equal the gradient goes to the first.
fn maximum(a: Tensor<1>, b: Tensor<1>) -> Tensor<1> {
    let first = a.clone().greater_equal(b.clone());
    b.mask_where(first, a)
}

/// Generalised advantage estimation over one response (arXiv:1506.02438 eq. 16): `A_t = d_t + gamma lambda A_(t+1)` with
/// `d_t = r_t + gamma v_(t+1) - v_t`, and 0 after the last token.
///
/// # Shapes
/// - rewards, values, returns: `[response_len]`
pub fn gae(rewards: &[f64], values: &[f64], gamma: f64, lambda: f64) -> Vec<f64> {
    let mut advantages = vec![0.0; rewards.len()];
    let (mut next_advantage, mut next_value) = (0.0, 0.0);
    for t in (0..rewards.len()).rev() {
        let delta = rewards[t] + gamma * next_value - values[t];
        next_advantage = delta + gamma * lambda * next_advantage;
        next_value = values[t];
        advantages[t] = next_advantage;
    }
    advantages
}

/// Shifts to mean 0 and scales to variance 1 (Bessel's correction, plus 1e-8 under the root), in place.
pub fn whiten(values: &mut [f64]) {
    let mean = mean(values);
    let inverse = 1.0 / (variance(values) + 1e-8).sqrt();
    values.iter_mut().for_each(|value| *value = (*value - mean) * inverse);
}

/// Scales to variance 1 and keeps the mean, in place.
pub fn whiten_keeping_mean(values: &mut [f64]) {
    let mean = mean(values);
    whiten(values);
    values.iter_mut().for_each(|value| *value += mean);
}

/// Mean; 0 of nothing.
pub fn mean(values: &[f64]) -> f64 {
    if values.is_empty() { 0.0 } else { values.iter().sum::<f64>() / values.len() as f64 }
}

/// Variance with Bessel's correction; 0 of fewer than two values.
pub fn variance(values: &[f64]) -> f64 {
    if values.len() < 2 {
        return 0.0;
    }
    let mean = mean(values);
    values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (values.len() - 1) as f64
}

/// Share of the returns' variance that the values explain: `1 - Var(R - v) / Var(R)`.
pub fn explained_variance(values: &[f64], returns: &[f64]) -> f64 {
    let residual: Vec<f64> = returns.iter().zip(values).map(|(r, v)| r - v).collect();
    let total = variance(returns);
    if total == 0.0 { 0.0 } else { 1.0 - variance(&residual) / total }
}

/// Estimators of the KL divergence from samples of the policy (Schulman, "Approximating KL divergence", 2020).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum KlEstimator {
    /// `log p - log q`: unbiased.
    #[default]
    K1,
    /// `(log p - log q)^2 / 2`: low variance, biased.
    K2,
    /// `q/p - 1 - log(q/p)`: unbiased and never negative.
    K3,
}

impl KlEstimator {
    /// The estimate from the log-probabilities of one token.
    pub fn estimate(self, logprob: f64, ref_logprob: f64) -> f64 {
        let logratio = logprob - ref_logprob;
        match self {
            Self::K1 => logratio,
            Self::K2 => 0.5 * logratio * logratio,
            Self::K3 => (-logratio).exp() - 1.0 + logratio,
        }
    }

    /// The estimates on the graph, for a KL term in the loss. Only `k2`'s gradient is that of the divergence
    /// (arXiv:2506.09477); `k1`'s has mean 0.
    ///
    /// # Shapes
    /// - logprobs, ref_logprobs: `[tokens]`
    /// - returns: `[tokens]`
    pub fn estimates(self, logprobs: Tensor<1>, ref_logprobs: Tensor<1>) -> Tensor<1> {
        let logratio = logprobs - ref_logprobs;
        match self {
            Self::K1 => logratio,
            Self::K2 => logratio.powi_scalar(2) * 0.5,
            Self::K3 => logratio.clone().neg().exp() - 1.0 + logratio,
        }
    }
}

/// How losses of single tokens become the loss of a minibatch; verl's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LossAggregation {
    /// Mean over all tokens.
    #[default]
    TokenMean,
    /// Mean over answers of the sum over their tokens.
    SeqMeanTokenSum,
    /// Mean over answers of the mean over their tokens.
    SeqMeanTokenMean,
}

impl LossAggregation {
    /// What each token of an answer of `len` tokens weighs, when the weighted sum over a minibatch of `answers` answers with
    /// `tokens` tokens in all is divided by `tokens`.
    pub fn weight(self, len: usize, answers: usize, tokens: usize) -> f64 {
        match self {
            Self::TokenMean => 1.0,
            Self::SeqMeanTokenSum => tokens as f64 / answers as f64,
            Self::SeqMeanTokenMean => tokens as f64 / (answers * len) as f64,
        }
    }
}

use burn::tensor::Tensor;
use rlflow_api::Problem;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::DpoConfig;
use crate::losses::{dpo_hinge_loss, dpo_robust_loss, dpo_sigmoid_loss, ipo_loss, kto_loss, log_odds_ratio, simpo_loss};

/// Which loss of the DPO family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum DpoLoss {
    /// DPO; with `label_smoothing` conservative DPO.
    #[default]
    Sigmoid,
    /// Robust DPO: unbiased when labels are flipped with probability `label_smoothing`.
    Robust,
    /// Hinge (SLiC) on DPO's rewards.
    Hinge,
    /// IPO: a squared distance; see `ipo_norm`.
    Ipo,
    /// DPO on log-ratios per token instead of per answer.
    SigmoidNorm,
    /// SimPO: mean log-probabilities and a margin, without a reference.
    Simpo,
    /// ORPO: odds ratio beside the negative log-likelihood of the chosen conversation, without a reference.
    Orpo,
    /// KTO: each answer is desirable or not by itself, measured against the batch's divergence from the reference.
    Kto,
}

/// What IPO's log-ratios are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum IpoNorm {
    /// Divided by the answer's tokens, as the paper's authors advise and TRL computes.
    Token,
    /// Summed over the answer, as the paper is written.
    Sum,
}

impl DpoLoss {
    /// Its name in workflow files.
    fn name(self) -> &'static str {
        match self {
            Self::Sigmoid => "sigmoid",
            Self::Robust => "robust",
            Self::Hinge => "hinge",
            Self::Ipo => "ipo",
            Self::SigmoidNorm => "sigmoid_norm",
            Self::Simpo => "simpo",
            Self::Orpo => "orpo",
            Self::Kto => "kto",
        }
    }

    /// Whether it compares with a reference.
    pub(super) fn has_reference(self) -> bool {
        !matches!(self, Self::Simpo | Self::Orpo)
    }

    /// Weight of the chosen answers' negative log-likelihood unless set: TRL's `cpo_alpha` for SimPO, 1 in ORPO's paper.
    fn nll_weight(self) -> f64 {
        if self.has_reference() { 0.0 } else { 1.0 }
    }
}

/// One side of the pairs.
pub(super) struct Answers {
    /// Summed log-probabilities, `[pairs]`.
    pub logps: Tensor<1>,
    /// Those minus the reference's; without a reference, the same as `logps`.
    pub ratios: Tensor<1>,
    /// Tokens of each answer, `[pairs]`.
    pub lens: Tensor<1>,
}

impl Answers {
    fn mean_logps(&self) -> Tensor<1> {
        self.logps.clone() / self.lens.clone()
    }

    fn mean_ratios(&self) -> Tensor<1> {
        self.ratios.clone() / self.lens.clone()
    }
}

impl DpoConfig {
    pub(super) fn normalise_loss(&mut self) {
        self.nll_weight.get_or_insert(self.loss.nll_weight());
        match self.loss {
            DpoLoss::Ipo => {
                self.ipo_norm.get_or_insert(IpoNorm::Token);
            }
            DpoLoss::Simpo => {
                self.simpo_gamma.get_or_insert(0.5);
            }
            DpoLoss::Kto => {
                self.desirable_weight.get_or_insert(1.0);
                self.undesirable_weight.get_or_insert(1.0);
            }
            _ => {}
        }
    }

    /// Settings that the chosen loss has no use for.
    pub(super) fn check_loss(&self) -> Vec<Problem> {
        let loss = self.loss;
        let smooths = matches!(loss, DpoLoss::Sigmoid | DpoLoss::Robust | DpoLoss::Simpo);
        let unused = [
            ("label_smoothing", self.label_smoothing != 0.0 && !smooths, "`sigmoid`, `robust` or `simpo`"),
            ("ipo_norm", self.ipo_norm.is_some() && loss != DpoLoss::Ipo, "`ipo`"),
            ("simpo_gamma", self.simpo_gamma.is_some() && loss != DpoLoss::Simpo, "`simpo`"),
            ("desirable_weight", self.desirable_weight.is_some() && loss != DpoLoss::Kto, "`kto`"),
            ("undesirable_weight", self.undesirable_weight.is_some() && loss != DpoLoss::Kto, "`kto`"),
        ];
        let mut problems: Vec<Problem> = unused
            .into_iter()
            .filter(|(_, is_unused, _)| *is_unused)
            .map(|(setting, _, losses)| {
                Problem::new("conflicting_settings", setting, format!("`{setting}` means nothing with loss = \"{}\"", loss.name()))
                    .hint(format!("remove it, or set `loss` to {losses}"))
            })
            .collect();
        if loss == DpoLoss::Robust && self.label_smoothing >= 0.5 {
            problems.push(
                Problem::new("out_of_range", "label_smoothing", "label_smoothing must be below 0.5 with loss = \"robust\"")
                    .hint("at 0.5 labels say nothing"),
            );
        }
        if loss == DpoLoss::Kto && self.train.batch_size < 2 {
            problems.push(
                Problem::new("out_of_range", "train.batch_size", "loss = \"kto\" needs at least 2 pairs per step")
                    .hint("it measures the divergence on prompts with the answers of other prompts"),
            );
        }
        problems
    }

    /// Losses per pair, `[pairs]`, without the negative log-likelihood. `kl` is KTO's.
    pub(super) fn preference_losses(&self, chosen: &Answers, rejected: &Answers, kl: f64) -> Tensor<1> {
        let beta = self.beta;
        let deltas = || chosen.ratios.clone() - rejected.ratios.clone();
        let mean_deltas = || chosen.mean_ratios() - rejected.mean_ratios();
        match self.loss {
            DpoLoss::Sigmoid => dpo_sigmoid_loss(deltas(), beta, self.label_smoothing),
            DpoLoss::Robust => dpo_robust_loss(deltas(), beta, self.label_smoothing),
            DpoLoss::Hinge => dpo_hinge_loss(deltas(), beta),
            DpoLoss::Ipo if self.ipo_norm == Some(IpoNorm::Sum) => ipo_loss(deltas(), beta),
            DpoLoss::Ipo => ipo_loss(mean_deltas(), beta),
            DpoLoss::SigmoidNorm => dpo_sigmoid_loss(mean_deltas(), beta, 0.0),
            DpoLoss::Simpo => {
                let gamma = self.simpo_gamma.unwrap_or(0.5);
                simpo_loss(chosen.mean_logps(), rejected.mean_logps(), beta, gamma, self.label_smoothing)
            }
            DpoLoss::Orpo => dpo_sigmoid_loss(log_odds_ratio(chosen.mean_logps(), rejected.mean_logps()), 1.0, 0.0) * beta,
            // A pair is two answers, and the loss is a mean over answers.
            DpoLoss::Kto => {
                let desirable = kto_loss(chosen.ratios.clone(), kl, beta, true) * self.desirable_weight.unwrap_or(1.0);
                let undesirable = kto_loss(rejected.ratios.clone(), kl, beta, false) * self.undesirable_weight.unwrap_or(1.0);
                (desirable + undesirable) * 0.5
            }
        }
    }

    /// Implicit rewards: what `rewards/*` report. Per token where the loss compares per token and has no reference, as in TRL.
    pub(super) fn rewards(&self, answers: &Answers) -> Tensor<1> {
        let measure = if self.loss.has_reference() { answers.ratios.clone() } else { answers.mean_logps() };
        measure * self.beta
    }
}

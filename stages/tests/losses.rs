//! Losses and estimators against PyTorch, TRL and formulas written out in float64 (`tests/fixtures/make/{losses,ppo}.py`).

mod fixtures;

use burn::tensor::{Device, Tensor, TensorData};
use fixtures::{Fixture, close, number, numbers};
use rlflow_model::parameters::host;
use rlflow_stages::{
    losses::{
        KlEstimator, LossAggregation, PolicyClip, clipped_policy_loss, clipped_value_loss, dpo_hinge_loss, dpo_robust_loss,
        dpo_sigmoid_loss, explained_variance, gae, ipo_loss, kto_loss, log_odds_ratio, mean, pairwise_reward_loss, simpo_loss, whiten,
        whiten_keeping_mean,
    },
    ppo::KlController,
};
use serde_json::Value;

/// Tensors are f32; what the library computes from them differs from float64 by rounding only.
const RELATIVE: f64 = 3e-6;
const ABSOLUTE: f64 = 3e-7;

fn constant(values: &[f64]) -> Tensor<1> {
    let narrow: Vec<f32> = values.iter().map(|value| *value as f32).collect();
    Tensor::from_data(TensorData::new(narrow, [values.len()]), &Device::flex())
}

fn leaf(values: &[f64]) -> Tensor<1> {
    constant(values).autodiff().require_grad()
}

fn wide(tensor: &Tensor<1>) -> Vec<f64> {
    host(tensor).into_iter().map(f64::from).collect()
}

/// Losses per row, and gradients of their mean with respect to `leaves`.
fn differentiate<const N: usize>(losses: Tensor<1>, leaves: [&Tensor<1>; N]) -> (Vec<f64>, [Vec<f64>; N]) {
    let rows = wide(&losses);
    let gradients = losses.sum().backward();
    let of = |leaf: &Tensor<1>| wide(&leaf.grad(&gradients).unwrap()).into_iter().map(|value| value / rows.len() as f64).collect();
    let gradients = leaves.map(of);
    (rows, gradients)
}

#[test]
fn reward_model_loss_and_its_gradients_agree_with_trl() {
    let json = Fixture::open("losses").json;
    let scores = &json["reward_model"]["scores"];
    let cases = json["reward_model"]["cases"].as_object().unwrap();
    assert_eq!(cases.len(), 4);
    for (name, case) in cases {
        let (chosen, rejected) = (leaf(&numbers(&scores["chosen"])), leaf(&numbers(&scores["rejected"])));
        let pairs = chosen.dims()[0];
        let margins = if case["margin"].is_null() { vec![0.0; pairs] } else { numbers(&case["margin"]) };
        let losses = pairwise_reward_loss(chosen.clone(), rejected.clone(), constant(&margins), case["centering"].as_f64().unwrap_or(0.0));
        let (losses, [dchosen, drejected]) = differentiate(losses, [&chosen, &rejected]);
        close(name, &[mean(&losses)], &numbers(&case["loss"]), RELATIVE, 0.0);
        close(name, &dchosen, &numbers(&case["grad_chosen"]), RELATIVE, ABSOLUTE);
        close(name, &drejected, &numbers(&case["grad_rejected"]), RELATIVE, ABSOLUTE);
    }
}

#[test]
fn losses_of_pairs_and_their_gradients_agree_with_trl_or_are_written_out() {
    let json = Fixture::open("losses").json;
    let rows = |name: &str| numbers(&json["dpo"]["rows"][name]);
    let mut compared = 0;
    for (name, case) in json["dpo"]["cases"].as_object().unwrap() {
        let (chosen, rejected) = (leaf(&rows("policy_chosen_logps")), leaf(&rows("policy_rejected_logps")));
        let ratios = [(&chosen, "chosen"), (&rejected, "rejected")].map(|(logps, side)| {
            (logps.clone() - constant(&rows(&format!("ref_{side}_logps"))), constant(&rows(&format!("{side}_lengths"))))
        });
        let [(chosen_ratios, chosen_lens), (rejected_ratios, rejected_lens)] = ratios;
        let deltas = chosen_ratios.clone() - rejected_ratios.clone();
        let mean_deltas = chosen_ratios / chosen_lens - rejected_ratios / rejected_lens;
        let (beta, label_smoothing) = (number(&case["beta"]), number(&case["label_smoothing"]));
        let losses = match case["loss_type"].as_str().unwrap() {
            "sigmoid" => dpo_sigmoid_loss(deltas, beta, 0.0),
            "cdpo" => dpo_sigmoid_loss(deltas, beta, label_smoothing),
            "robust" => dpo_robust_loss(deltas, beta, label_smoothing),
            "hinge" => dpo_hinge_loss(deltas, beta),
            "ipo_sum" => ipo_loss(deltas, beta),
            "ipo" | "ipo_token" => ipo_loss(mean_deltas, beta),
            "sigmoid_norm" => dpo_sigmoid_loss(mean_deltas, beta, 0.0),
            _ => continue,
        };
        let (losses, [dchosen, drejected]) = differentiate(losses, [&chosen, &rejected]);
        close(name, &losses, &numbers(&case["per_row"]), RELATIVE, ABSOLUTE);
        close(name, &[mean(&losses)], &numbers(&case["loss"]), RELATIVE, 0.0);
        close(name, &dchosen, &numbers(&case["grad_policy_chosen_logps"]), RELATIVE, ABSOLUTE);
        close(name, &drejected, &numbers(&case["grad_policy_rejected_logps"]), RELATIVE, ABSOLUTE);
        compared += 1;
    }
    assert_eq!(compared, 9);
}

#[test]
fn losses_of_mean_logprobs_and_their_gradients_agree_with_trl() {
    let json = Fixture::open("losses").json;
    let leaves = |family: &str| ["chosen", "rejected"].map(|side| leaf(&numbers(&json[family]["average_logps"][side])));
    let compare = |name: &str, losses: Tensor<1>, [chosen, rejected]: [&Tensor<1>; 2], case: &Value| {
        let (losses, [dchosen, drejected]) = differentiate(losses, [chosen, rejected]);
        close(name, &losses, &numbers(&case["per_row"]), RELATIVE, ABSOLUTE);
        close(name, &dchosen, &numbers(&case["grad_chosen"]), RELATIVE, ABSOLUTE);
        close(name, &drejected, &numbers(&case["grad_rejected"]), RELATIVE, ABSOLUTE);
    };
    let cases = json["simpo"]["cases"].as_object().unwrap();
    assert_eq!(cases.len(), 3);
    for (name, case) in cases {
        let [chosen, rejected] = leaves("simpo");
        let setting = |name: &str| number(&case[name]);
        let losses = simpo_loss(chosen.clone(), rejected.clone(), setting("beta"), setting("gamma"), setting("label_smoothing"));
        compare(name, losses, [&chosen, &rejected], case);
    }
    // Among the answers is one whose tokens are all but certain: the odds of p = 0.9999 keep their digits in f32, though
    // 1 - p does not.
    let [chosen, rejected] = leaves("orpo");
    let log_odds = log_odds_ratio(chosen.clone(), rejected.clone());
    close("log odds", &[mean(&wide(&log_odds))], &numbers(&json["orpo"]["log_odds_chosen"]), RELATIVE, 0.0);
    let losses = dpo_sigmoid_loss(log_odds, 1.0, 0.0) * number(&json["orpo"]["beta"]);
    compare("orpo", losses, [&chosen, &rejected], &json["orpo"]);
}

#[test]
fn kto_loss_and_its_gradients_agree_with_trl() {
    let json = Fixture::open("losses").json;
    let rows = &json["kto"]["rows"];
    let desirable: Vec<bool> = rows["desirable"].as_array().unwrap().iter().map(|value| value.as_bool().unwrap()).collect();
    for (name, case) in json["kto"]["cases"].as_object().unwrap() {
        let policy = leaf(&numbers(&rows["policy_logps"]));
        let ratios = policy.clone() - constant(&numbers(&rows["ref_logps"]));
        let losses = desirable.iter().enumerate().map(|(row, is_desirable)| {
            let weight = number(&case[if *is_desirable { "desirable_weight" } else { "undesirable_weight" }]);
            kto_loss(ratios.clone().narrow(0, row, 1), number(&case["kl"]), number(&case["beta"]), *is_desirable) * weight
        });
        let (losses, [gradient]) = differentiate(Tensor::cat(losses.collect(), 0), [&policy]);
        // TRL has all desirable answers first.
        let sorted = |values: &[f64]| {
            let of = |side: bool| values.iter().zip(&desirable).filter(move |(_, known)| **known == side).map(|(value, _)| *value);
            of(true).chain(of(false)).collect::<Vec<f64>>()
        };
        close(name, &[mean(&losses)], &numbers(&case["loss"]), RELATIVE, 0.0);
        close(name, &sorted(&losses), &sorted(&numbers(&case["per_row"])), RELATIVE, ABSOLUTE);
        close(name, &sorted(&gradient), &sorted(&numbers(&case["grad_policy_logps"])), RELATIVE, ABSOLUTE);
    }
}

#[test]
fn values_worked_by_hand() {
    let json = Fixture::open("losses").json;
    let golden = &json["golden"];
    let row = |name: &str| number(&golden["row"][name][0]);
    let delta = (row("policy_chosen_logps") - row("ref_chosen_logps")) - (row("policy_rejected_logps") - row("ref_rejected_logps"));
    let dpo = |label_smoothing: f64| wide(&dpo_sigmoid_loss(constant(&[delta]), number(&golden["beta"]), label_smoothing));
    close("sigmoid", &dpo(0.0), &numbers(&golden["dpo"]["sigmoid"]), RELATIVE, 0.0);
    close("cdpo", &dpo(number(&golden["label_smoothing"])), &numbers(&golden["dpo"]["cdpo"]), RELATIVE, 0.0);

    let expected = &golden["reward_model"];
    let pairwise = |margin: f64, centering: f64| {
        let (chosen, rejected) = (constant(&[number(&expected["chosen"])]), constant(&[number(&expected["rejected"])]));
        wide(&pairwise_reward_loss(chosen, rejected, constant(&[margin]), centering))[0]
    };
    close("plain", &[pairwise(0.0, 0.0)], &numbers(&expected["plain"]), RELATIVE, 0.0);
    close("margin", &[pairwise(0.5, 0.0)], &numbers(&expected["margin_0.5"]), RELATIVE, 0.0);
    let term = pairwise(0.0, 0.01) - pairwise(0.0, 0.0);
    close("centering", &[term], &numbers(&expected["centering_term_0.01"]), 0.0, ABSOLUTE);

    let kl = &golden["kl_estimators"];
    for (name, estimator) in [("k1", KlEstimator::K1), ("k2", KlEstimator::K2), ("k3", KlEstimator::K3)] {
        close(name, &[estimator.estimate(number(&kl["logp"]), number(&kl["ref_logp"]))], &numbers(&kl[name]), 1e-12, 0.0);
    }
}

#[test]
fn advantages_and_whitening_worked_by_hand() {
    let json = Fixture::open("ppo_trl").json;
    let golden = &json["golden_gae"];
    let list = |name: &str| numbers(&golden[name]);
    let advantages = gae(&list("rewards"), &list("values"), number(&golden["gamma"]), number(&golden["lam"]));
    close("advantages", &advantages, &list("advantages"), 0.0, 1e-12);
    let returns: Vec<f64> = advantages.iter().zip(list("values")).map(|(advantage, value)| advantage + value).collect();
    close("returns", &returns, &list("returns"), 0.0, 1e-12);
    let changed = |change: fn(&mut [f64])| {
        let mut values = advantages.clone();
        change(&mut values);
        values
    };
    close("whitened", &changed(whiten), &list("whitened"), 0.0, 1e-12);
    close("mean kept", &changed(whiten_keeping_mean), &list("whitened_mean_added_back"), 0.0, 1e-12);
}

#[test]
fn adaptive_kl_coefficient_follows_the_controller_path() {
    let json = Fixture::open("ppo_trl").json;
    let path = &json["adaptive_kl"];
    let controller = KlController::Adaptive { target: number(&path["target"]), horizon: number(&path["horizon"]) };
    let samples = path["batch_size"].as_u64().unwrap() as usize;
    let coefficients: Vec<f64> = numbers(&path["observed_kl"])
        .into_iter()
        .scan(number(&path["initial"]), |coefficient, kl| {
            *coefficient = controller.next(*coefficient, kl, samples);
            Some(*coefficient)
        })
        .collect();
    close("coefficients", &coefficients, &numbers(&path["coefficients"]), 1e-12, 0.0);
}

const LENGTH: usize = 11;

/// Rows of a `[6, 11]` matrix without what `mask` leaves out: our responses have no padding.
fn rows(values: &[f64], mask: &[bool]) -> Vec<Vec<f64>> {
    let kept =
        |(values, mask): (&[f64], &[bool])| values.iter().zip(mask).filter(|(_, counts)| **counts).map(|(value, _)| *value).collect();
    values.chunks(LENGTH).zip(mask.chunks(LENGTH)).map(kept).collect()
}

/// The same, end to end.
fn counted(values: &[f64], mask: &[bool]) -> Vec<f64> {
    rows(values, mask).concat()
}

/// Applies `change` to all rows as if they were one.
fn over_all(rows: &mut [Vec<f64>], change: fn(&mut [f64])) {
    let mut all = rows.concat();
    change(&mut all);
    let mut rest = all.into_iter();
    rows.iter_mut().flatten().for_each(|value| *value = rest.next().unwrap());
}

/// Raw advantages and returns of all rows.
fn estimate(rewards: &[Vec<f64>], values: &[Vec<f64>], settings: &Value) -> (Vec<f64>, Vec<f64>) {
    let each =
        rewards.iter().zip(values).map(|(rewards, values)| gae(rewards, values, number(&settings["gamma"]), number(&settings["lam"])));
    let advantages: Vec<f64> = each.flatten().collect();
    let returns = advantages.iter().zip(values.iter().flatten()).map(|(advantage, value)| advantage + value).collect();
    (advantages, returns)
}

struct Losses {
    mean: f64,
    /// Of the mean.
    gradient: Vec<f64>,
    /// Share of tokens whose loss is larger for the clipping.
    clip_frac: f64,
}

/// `loss` takes the recorded tensor and the clip range. A range that nothing reaches says which tokens were clipped, as in
/// `ppo`'s metrics.
fn clipped(new: &[f64], clip_range: f64, loss: impl Fn(Tensor<1>, f64) -> Tensor<1>) -> Losses {
    let new = leaf(new);
    let (losses, [gradient]) = differentiate(loss(new.clone(), clip_range), [&new]);
    let unclipped = wide(&loss(new, f64::from(f32::MAX)));
    let clipped: Vec<f64> = losses.iter().zip(&unclipped).map(|(loss, unclipped)| f64::from(u8::from(loss > unclipped))).collect();
    Losses { mean: mean(&losses), gradient, clip_frac: mean(&clipped) }
}

/// Rewards, advantages, both losses and their gradients for one recorded rollout.
///
/// TRL puts the score on the position after the last counted token, which has a value but no token; we put it on the last
/// token, and have no such position (`ppo` says so). To compare the same arithmetic, rewards and values here have TRL's
/// extra position. The variant of DeepSpeed-Chat below has our arrangement.
#[test]
fn ppo_agrees_with_trl() {
    let fixture = Fixture::open("ppo_trl");
    let (tokens, with_value) = (fixture.mask("response_mask"), fixture.mask("value_mask"));
    let (logprobs, ref_logprobs) = (rows(&fixture.floats("logprobs"), &tokens), rows(&fixture.floats("ref_logprobs"), &tokens));
    let values = rows(&fixture.floats("values"), &with_value);
    let old_logprobs = logprobs.concat();
    let eos = fixture.json["eos_id"].as_i64().unwrap();
    let ended: Vec<bool> = fixture.integers("truncated_responses").chunks(LENGTH).map(|row| row.contains(&eos)).collect();
    let cases = fixture.json["cases"].as_object().unwrap();
    assert_eq!(cases.len(), 3);
    for (name, case) in cases {
        let (settings, scalars) = (&case["settings"], &case["scalars"]);
        let expected = |tensor: &str, mask: &[bool]| counted(&fixture.floats(&format!("{name}.{tensor}.f64")), mask);
        let scalar =
            |key: &str, actual: f64, relative: f64| close(&format!("{name} {key}"), &[actual], &numbers(&scalars[key]), relative, 1e-7);

        let penalty = settings["missing_eos_penalty"].as_f64().unwrap_or(0.0);
        let scores: Vec<f64> =
            fixture.floats("scores").iter().zip(&ended).map(|(score, ended)| if *ended { *score } else { score - penalty }).collect();
        close(name, &scores, &fixture.floats(&format!("{name}.scores.f64")), 0.0, 1e-12);

        let estimator: KlEstimator = serde_json::from_value(settings["kl_estimator"].clone()).unwrap();
        let kl: Vec<Vec<f64>> = logprobs
            .iter()
            .zip(&ref_logprobs)
            .map(|(policy, reference)| policy.iter().zip(reference).map(|(p, q)| estimator.estimate(*p, *q)).collect())
            .collect();
        close(&format!("{name} kl"), &kl.concat(), &expected("kl", &tokens), 0.0, 1e-12);
        scalar("objective/kl", kl.concat().iter().sum::<f64>() / kl.len() as f64, 1e-9);

        let kl_coef = number(&settings["kl_coef"]);
        let mut rewards: Vec<Vec<f64>> = values.iter().map(|values| vec![0.0; values.len()]).collect();
        for ((rewards, kl), score) in rewards.iter_mut().zip(&kl).zip(&scores) {
            rewards.iter_mut().zip(kl).for_each(|(reward, kl)| *reward = -kl_coef * kl);
            *rewards.last_mut().unwrap() += score;
        }
        if settings["whiten_rewards"] == true {
            over_all(&mut rewards, whiten_keeping_mean);
        }
        close(&format!("{name} rewards"), &rewards.concat(), &expected("rewards", &with_value), 0.0, 1e-10);

        let (raw_advantages, returns) = estimate(&rewards, &values, settings);
        close(&format!("{name} raw advantages"), &raw_advantages, &expected("raw_advantages", &with_value), 0.0, 1e-10);
        close(&format!("{name} returns"), &returns, &expected("returns", &with_value), 0.0, 1e-10);
        // Advantages are whitened over tokens; the extra position is not one.
        let mut at = raw_advantages.iter();
        let mut advantages = Vec::new();
        for (values, logprobs) in values.iter().zip(&logprobs) {
            let row: Vec<f64> = at.by_ref().take(values.len()).copied().collect();
            advantages.extend_from_slice(&row[..logprobs.len()]);
        }
        whiten(&mut advantages);
        close(&format!("{name} advantages"), &advantages, &expected("advantages", &tokens), 0.0, 1e-9);

        let new_logprobs = expected("new_logprobs", &tokens);
        let policy = clipped(&new_logprobs, number(&settings["cliprange"]), |new, clip_range| {
            clipped_policy_loss(new, constant(&old_logprobs), constant(&advantages), clip_range)
        });
        scalar("loss/policy", policy.mean, 1e-5);
        scalar("policy/clipfrac", policy.clip_frac, 0.0);
        close(&format!("{name} policy gradient"), &policy.gradient, &expected("dnew_logprobs", &tokens), 1e-5, 1e-7);

        // TRL logs `approxkl` and `ratio` as means over padding too; ours are over tokens, as `*_counted`.
        let pairs = || new_logprobs.iter().zip(&old_logprobs);
        let over_tokens = |value: &dyn Fn(f64, f64) -> f64| mean(&pairs().map(|(new, old)| value(*new, *old)).collect::<Vec<_>>());
        scalar("policy/approxkl_counted", over_tokens(&|new, old| KlEstimator::K2.estimate(new, old)), 1e-9);
        scalar("policy/approxkl_k3_counted", over_tokens(&|new, old| KlEstimator::K3.estimate(old, new)), 1e-9);

        let value =
            clipped(&counted(&fixture.floats("new_values"), &with_value), number(&settings["cliprange_value"]), |new, clip_range| {
                clipped_value_loss(new, constant(&values.concat()), constant(&returns), clip_range)
            });
        scalar("loss/value", value.mean, 1e-5);
        scalar("val/clipfrac", value.clip_frac, 0.0);
        close(&format!("{name} value gradient"), &value.gradient, &expected("dnew_values", &with_value), 1e-5, 1e-7);
    }
}

/// Score on the last token and no extra position: our arrangement, from recorded log-probabilities to both gradients.
#[test]
fn ppo_agrees_with_deepspeed_chat_where_the_score_is_on_the_last_token() {
    let fixture = Fixture::open("ppo_trl");
    let tokens = fixture.mask("response_mask");
    let input = |name: &str| rows(&fixture.floats(name), &tokens);
    let expected = |name: &str| counted(&fixture.floats(&format!("deepspeed_chat.{name}")), &tokens);
    let (settings, scalars) =
        (&fixture.json["variants"]["deepspeed_chat"]["settings"], &fixture.json["variants"]["deepspeed_chat"]["scalars"]);

    let (kl_coef, bound) = (number(&settings["kl_coef"]), number(&settings["reward_clip"]));
    let mut rewards = input("logprobs");
    for ((rewards, reference), score) in rewards.iter_mut().zip(input("ref_logprobs")).zip(fixture.floats("scores")) {
        rewards.iter_mut().zip(reference).for_each(|(reward, q)| *reward = -kl_coef * KlEstimator::K1.estimate(*reward, q));
        *rewards.last_mut().unwrap() += score.clamp(-bound, bound);
    }
    close("rewards", &rewards.concat(), &expected("rewards"), 1e-6, 1e-7);
    let (advantages, returns) = estimate(&rewards, &input("values"), settings);
    close("advantages", &advantages, &expected("advantages"), 1e-6, 1e-6);
    close("returns", &returns, &expected("returns"), 1e-6, 1e-6);

    let new_logprobs = counted(&fixture.floats("default.new_logprobs.f64"), &tokens);
    let policy = clipped(&new_logprobs, number(&settings["cliprange"]), |new, clip_range| {
        clipped_policy_loss(new, constant(&input("logprobs").concat()), constant(&advantages), clip_range)
    });
    close("actor loss", &[policy.mean], &numbers(&scalars["actor_loss"]), 1e-5, 1e-7);
    close("actor gradient", &policy.gradient, &expected("dnew_logprobs"), 1e-5, 1e-7);
    let value = clipped(&input("new_values").concat(), number(&settings["cliprange_value"]), |new, clip_range| {
        clipped_value_loss(new, constant(&input("values").concat()), constant(&returns), clip_range)
    });
    close("critic loss", &[value.mean], &numbers(&scalars["critic_loss"]), 1e-5, 1e-7);
    close("critic gradient", &value.gradient, &expected("dnew_values"), 1e-5, 1e-7);
}

/// KL estimates on the graph: values as on the host, and the gradients of their formulas.
#[test]
fn kl_estimates_on_the_graph_are_those_of_the_host() {
    let (logprobs, ref_logprobs) = ([-1.0, -0.2, -3.5, -0.7], [-1.3, -0.9, -1.0, -0.7]);
    // d/dp of p - q, (p - q)^2 / 2 and e^(q - p) - 1 + p - q.
    let slopes: [fn(f64) -> f64; 3] = [|_| 1.0, |d| d, |d| 1.0 - (-d).exp()];
    for (estimator, slope) in [KlEstimator::K1, KlEstimator::K2, KlEstimator::K3].into_iter().zip(slopes) {
        let policy = leaf(&logprobs);
        let (estimates, [gradient]) = differentiate(estimator.estimates(policy.clone(), constant(&ref_logprobs)), [&policy]);
        let pairs = || logprobs.iter().zip(&ref_logprobs);
        let expected: Vec<f64> = pairs().map(|(p, q)| estimator.estimate(*p, *q)).collect();
        close("estimates", &estimates, &expected, 1e-5, 1e-6);
        let expected: Vec<f64> = pairs().map(|(p, q)| slope(p - q) / 4.0).collect();
        close("gradients", &gradient, &expected, 1e-5, 1e-6);
    }
}

/// Tokens that do not count, in the middle of a response, are as if they were not there.
#[test]
fn ppo_agrees_with_verl_on_responses_with_uncounted_tokens() {
    let fixture = Fixture::open("ppo_trl");
    let tokens = fixture.mask("verl.response_mask");
    let input = |name: &str| rows(&fixture.floats(name), &tokens);
    let expected = |name: &str| counted(&fixture.floats(&format!("verl.{name}")), &tokens);
    let (settings, scalars) = (&fixture.json["variants"]["verl"]["settings"], &fixture.json["variants"]["verl"]["scalars"]);

    let (mut advantages, returns) = estimate(&input("verl.rewards"), &input("values"), settings);
    close("raw advantages", &advantages, &expected("raw_advantages"), 1e-6, 1e-6);
    close("returns", &returns, &expected("returns"), 1e-6, 1e-6);
    whiten(&mut advantages);
    close("advantages", &advantages, &expected("advantages"), 1e-6, 1e-6);
    let explained = explained_variance(&input("values").concat(), &returns);
    close("explained variance", &[explained], &numbers(&scalars["critic/vf_explained_var"]), 1e-6, 0.0);

    // The policy loss: a wider clip above than below, a second clip, and each way to make one number of it.
    let clip =
        PolicyClip { low: number(&settings["clip_low"]), high: number(&settings["clip_high"]), dual: Some(number(&settings["dual_clip"])) };
    let (old, new) = (input("verl.old_logprobs"), counted(&fixture.floats("default.new_logprobs.f64"), &tokens));
    let (answers, count) = (old.iter().filter(|row| !row.is_empty()).count(), new.len());
    for (name, aggregation) in [
        ("token-mean", LossAggregation::TokenMean),
        ("seq-mean-token-sum", LossAggregation::SeqMeanTokenSum),
        ("seq-mean-token-mean", LossAggregation::SeqMeanTokenMean),
    ] {
        let weights: Vec<f64> = old.iter().flat_map(|row| vec![aggregation.weight(row.len(), answers, count); row.len()]).collect();
        let policy = leaf(&new);
        let losses = clipped_policy_loss(policy.clone(), constant(&old.concat()), constant(&advantages), clip) * constant(&weights);
        let (losses, [gradient]) = differentiate(losses, [&policy]);
        close(name, &[mean(&losses)], &numbers(&scalars[format!("actor/pg_loss.{name}")]), 1e-5, 1e-7);
        close(name, &gradient, &expected(&format!("dnew_logprobs.{name}")), 1e-5, 1e-7);
    }

    let value = clipped(&input("new_values").concat(), number(&settings["value_clip_range"]), |new, clip_range| {
        clipped_value_loss(new, constant(&input("values").concat()), constant(&returns), clip_range)
    });
    close("critic loss", &[value.mean], &numbers(&scalars["critic/vf_loss"]), 1e-5, 1e-7);
    close("critic clip fraction", &[value.clip_frac], &numbers(&scalars["critic/vf_clipfrac"]), 0.0, 1e-7);
    close("critic gradient", &value.gradient, &expected("dnew_values"), 1e-5, 1e-7);
}

//! Every setting of `ppo` does what it says: what it promises is read from the metrics of a run with it and of one without.

use serde_json::Value;

use crate::fixture::{Finished, Fixture};

/// The metrics and outputs of ppo after a run of it under `sets`.
struct Ppo {
    outputs: Value,
    metrics: Value,
    has_run: bool,
}

impl Ppo {
    fn run(fixture: &Fixture, sets: &[&str]) -> Self {
        let finished = Finished::of(fixture.command("store", sets).arg("ppo").output().unwrap()).succeeded();
        let has_run = finished.ran().contains("ppo");
        let outputs = finished.outputs()["ppo"].clone();
        let mut command = fixture.rlflow("store", &["metrics", "--json"], sets);
        let output = command.arg("ppo").output().unwrap();
        let metrics: Value = serde_json::from_slice(&output.stdout).unwrap();
        Self { outputs, metrics: metrics["stages"]["ppo"]["series"].clone(), has_run }
    }

    /// Values of a metric, one per step.
    fn series(&self, name: &str) -> Vec<f64> {
        let series = self.metrics[name].as_array().unwrap_or_else(|| panic!("no metric {name}: {}", self.metrics));
        series.iter().map(|point| point[1].as_f64().unwrap()).collect()
    }

    fn first(&self, name: &str) -> f64 {
        self.series(name)[0]
    }

    fn last(&self, name: &str) -> f64 {
        *self.series(name).last().unwrap()
    }
}

/// In the first step the policy is the reference, and its rollout does not depend on what becomes of the scores.
#[test]
fn settings_have_their_effect() {
    let fixture = Fixture::new();
    let base = Ppo::run(&fixture, &[]);
    assert!(base.has_run);
    let with = |sets: &[&str]| {
        let ppo = Ppo::run(&fixture, sets);
        assert!(ppo.has_run && ppo.outputs != base.outputs, "{sets:?} changes nothing");
        ppo
    };
    let answers = 8.0;

    // Sampling.
    with(&["stage.ppo.top_k=5"]);
    with(&["stage.ppo.top_p=0.5"]);
    let certain = with(&["stage.ppo.top_k=1"]);
    assert!(
        certain.first("response_length/mean") != base.first("response_length/mean")
            || certain.first("objective/scores") != base.first("objective/scores")
    );

    // Scores.
    let penalised = with(&["stage.ppo.missing_eos_penalty=1"]);
    let unended = (answers - base.first("val/num_eos_tokens")) / answers;
    assert!(unended > 0.0);
    assert!((penalised.first("objective/scores") - (base.first("objective/scores") - unended)).abs() < 1e-9);
    let (score, bound) = (base.first("objective/scores"), base.first("objective/scores").abs() / 2.0);
    let clipped = with(&[&format!("stage.ppo.score_clip={bound}")]);
    assert_eq!(clipped.first("objective/scores"), score, "what is logged is what the reward model gave");
    assert!(clipped.first("objective/rlhf_reward").abs() <= bound + 1e-9 && score.abs() > bound);
    let standardised = with(&["stage.ppo.score_normalisation=\"standardise\""]);
    assert!(standardised.first("objective/rlhf_reward").abs() < 1e-9, "a first batch has mean 0 by its own moments");
    let scaled = with(&["stage.ppo.score_normalisation=\"scale\""]);
    assert_eq!(scaled.first("objective/rlhf_reward").signum(), score.signum());

    // KL divergence.
    assert_eq!(base.series("objective/kl_coef"), [1.0; 3]);
    let adaptive = with(&["stage.ppo.kl_controller={ type = \"adaptive\", target = 0.5, horizon = 100 }"]);
    let coefficients = adaptive.series("objective/kl_coef");
    let moved = 1.0 + (adaptive.first("objective/kl") / 0.5 - 1.0).clamp(-0.2, 0.2) * answers / 100.0;
    assert!((coefficients[1] - moved).abs() < 1e-12, "{coefficients:?}");
    let k3 = with(&["stage.ppo.kl_estimator=\"k3\""]);
    assert!(k3.last("objective/non_score_reward") < 0.0, "k3 is never negative, so its penalty is never a gain");
    let k2 = with(&["stage.ppo.kl_estimator=\"k2\""]);
    assert!(k2.last("objective/non_score_reward") < 0.0 && k2.outputs != k3.outputs, "nor is k2, a square");
    let in_loss = with(&["stage.ppo.kl_in=\"loss\"", "stage.ppo.kl_estimator=\"k3\"", "stage.actor.train.lr=1e-3"]);
    assert_eq!(in_loss.series("objective/non_score_reward"), [0.0; 3]);
    assert!(in_loss.series("policy/kl_loss").iter().all(|kl| *kl >= 0.0));
    let held = with(&["stage.ppo.kl_in=\"loss\"", "stage.ppo.kl_estimator=\"k3\"", "stage.actor.train.lr=1e-3", "stage.ppo.kl_coef=100"]);
    assert!(held.last("policy/kl_loss") < in_loss.last("policy/kl_loss"), "a larger coefficient holds the policy closer");

    // Advantages.
    with(&["stage.ppo.whiten_rewards=true"]);
    with(&["stage.ppo.whiten_advantages=false"]);
    with(&["stage.ppo.gae_lambda=0.5"]);
    with(&["stage.ppo.gamma=0.5"]);

    // The loss.
    let tight = with(&["stage.ppo.clip_range=0.0001"]);
    assert!(tight.first("policy/clipfrac_avg") > base.first("policy/clipfrac_avg"));
    let tight_above = with(&["stage.ppo.clip_range_high=0.0001"]);
    assert!(tight_above.first("policy/clipfrac_avg") > base.first("policy/clipfrac_avg"));
    assert!(tight_above.first("policy/clipfrac_avg") < tight.first("policy/clipfrac_avg"), "below 1 it is as wide as before");
    assert!(!Ppo::run(&fixture, &["stage.ppo.clip_range_high=0.2"]).has_run, "that is what it is unless given");
    let far = Ppo::run(&fixture, &["stage.ppo.dual_clip=1e6"]);
    assert!(far.has_run && far.outputs == base.outputs, "a bound that nothing reaches");
    let fast = ["stage.actor.train.lr=1e-2", "stage.ppo.clip_range=10"];
    let bounded = with(&[fast[0], fast[1], "stage.ppo.dual_clip=1.001"]);
    assert!(bounded.first("policy/clipfrac_avg") > with(&fast).first("policy/clipfrac_avg"));
    with(&["stage.ppo.loss_aggregation=\"seq_mean_token_sum\""]);
    with(&["stage.ppo.loss_aggregation=\"seq_mean_token_mean\""]);
    let entropic = with(&["stage.ppo.entropy_coef=10", "stage.actor.train.lr=1e-3"]);
    assert!(entropic.last("objective/entropy") > with(&["stage.actor.train.lr=1e-3"]).last("objective/entropy"));
    with(&["stage.ppo.share_backbone=true"]);

    // Text beside it.
    let ptx = |coefficient: &str, input: &str| {
        let input = format!("stage.ppo.inputs.ptx=\"{input}\"");
        with(&[&input, &format!("stage.ppo.ptx_coef={coefficient}"), "stage.actor.train.lr=1e-3", "stage.ppo.shuffle=false"])
    };
    for input in ["instructions", "corpus"] {
        let (weak, strong) = (ptx("1e-9", input), ptx("100", input));
        assert!(strong.last("loss/ptx_avg") < weak.last("loss/ptx_avg"), "{input}: the more it counts, the better it is learnt");
    }

    // The average.
    assert_eq!(base.outputs["ema"], base.outputs["model"], "without a decay it is the policy");
    let average = with(&["stage.ppo.ema_decay=0.5"]);
    assert_eq!(average.outputs["model"], base.outputs["model"], "training does not see the average");
    assert_ne!(average.outputs["ema"], base.outputs["model"]);
    let immediate = Ppo::run(&fixture, &["stage.ppo.ema_decay=0"]);
    assert!(immediate.has_run && immediate.outputs["ema"] == base.outputs["model"], "that forgets at once");
}

/// Each role has a placement of its own, which the plan shows and `ppo` follows: on the CPU as ranks, whose number changes no result.
#[test]
fn every_role_runs_where_it_says() {
    let fixture = Fixture::new();
    let together = Ppo::run(&fixture, &[]);
    let places = [
        ("actor", 2, "stage.actor.device={ cpu = 2 }"),
        ("critic", 1, "stage.critic.device=\"cpu\""),
        ("ref", 4, "stage.ref.device={ cpu = 4 }"),
        ("reward", 3, "stage.reward.device={ cpu = 3 }"),
    ];
    let mut sets: Vec<&str> = places.iter().map(|(_, _, set)| *set).collect();
    sets.push("stage.ref.zero=3");
    let plan = fixture.rlflow("apart", &["plan", "--json"], &sets).output().unwrap();
    let plan: Value = serde_json::from_slice(&plan.stdout).unwrap();
    for (role, ranks, _) in places {
        let stage = plan["stages"].as_array().unwrap().iter().find(|stage| stage["name"] == role).unwrap();
        assert_eq!(stage["ranks"], ranks, "{role}: {stage}");
    }
    let apart = Finished::of(fixture.command("apart", &sets).arg("ppo").output().unwrap()).succeeded();
    assert_eq!(apart.outputs()["ppo"], together.outputs);
    // A device that is not there is asked for by the role that names it, and by no other.
    let elsewhere = fixture.rlflow("apart", &["run", "--json"], &["stage.reward.device=\"cuda:7\""]).output().unwrap();
    let told = [elsewhere.stdout, elsewhere.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    assert!(!elsewhere.status.success() && told.contains("reward") && told.contains("cuda:7"), "{told}");
}

//! The four roles as stage kinds: each takes a checkpoint and says how and where PPO uses it.

use std::collections::BTreeMap;

use rlflow_api::{
    Artifact, ArtifactType, DescribeContext, Description, Execution, InputPort, Needs, OutputPort, Problem, RunContext, StageKind,
    StageResult,
};
use rlflow_model::{CheckpointInfo, Head};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::config::RoleTrain;
use crate::{models, train::Precision};

/// Settings of a role that is trained.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct TrainedRoleConfig {
    /// How it is trained.
    pub train: RoleTrain,
    /// Where it runs.
    #[serde(flatten)]
    pub execution: Execution,
}

/// Settings of a role that is frozen.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct FrozenRoleConfig {
    /// Where it runs.
    #[serde(flatten)]
    pub execution: Execution,
}

/// Settings of a role.
trait RoleConfig {
    /// How it is trained, if it is.
    fn train(&self) -> Option<&RoleTrain>;
}

impl RoleConfig for TrainedRoleConfig {
    fn train(&self) -> Option<&RoleTrain> {
        Some(&self.train)
    }
}

impl RoleConfig for FrozenRoleConfig {
    fn train(&self) -> Option<&RoleTrain> {
        None
    }
}

/// Four bytes per parameter, and none of what only training needs.
fn frozen_needs(meta: &rlflow_api::ArtifactMeta) -> Needs {
    let parameters = meta.model.as_ref().map_or(0, |model| model.parameter_count());
    Needs { parameter_bytes: 4 * parameters, ..Needs::default() }
}

macro_rules! role {
    ($(#[$doc:meta])* $name:ident, $kind:literal, $config:ty, $summary:literal, takes $takes:expr, gives $gives:expr) => {
        $(#[$doc])*
        pub struct $name;

        impl StageKind for $name {
            type Config = $config;

            const NAME: &'static str = $kind;
            const VERSION: u32 = 1;
            const SUMMARY: &'static str = $summary;
            const INPUTS: &'static [InputPort] = &[InputPort::one("model", $takes, "Checkpoint to begin with.")];
            const OUTPUTS: &'static [OutputPort] = &[OutputPort { name: "model", types: &[$gives], doc: "The role, for `ppo`." }];
            const METRICS: &'static [(&'static str, &'static str)] = &[];
            const DRAWS: bool = $gives as u8 == ArtifactType::Critic as u8;

            fn check(config: &$config) -> Vec<Problem> {
                config.train().map(RoleTrain::check).unwrap_or_default()
            }

            fn describe(_: &$config, context: &DescribeContext<'_>) -> Result<Description, Vec<Problem>> {
                models::describe_from(context, "model", "model", $gives, frozen_needs)
            }

            fn execution(config: &$config) -> Option<&Execution> {
                Some(&config.execution)
            }

            fn run(config: &$config, context: &RunContext<'_>) -> StageResult<BTreeMap<String, Artifact>> {
                let artifact = publish(context, $gives, config.train())?;
                Ok(BTreeMap::from([("model".into(), artifact)]))
            }
        }
    };
}

role!(
    /// The policy that PPO optimises.
    ActorRole, "ppo.actor", TrainedRoleConfig, "PPO's actor: the policy to optimise, how it is trained and where it runs.",
    takes &[ArtifactType::Policy], gives ArtifactType::Policy
);
role!(
    /// The value model that PPO trains beside the policy.
    CriticRole, "ppo.critic", TrainedRoleConfig, "PPO's critic: the value model; a policy gets a fresh scalar head, a reward model keeps its own.",
    takes &[ArtifactType::Policy, ArtifactType::Reward, ArtifactType::Critic], gives ArtifactType::Critic
);
role!(
    /// The frozen policy that the actor is held to.
    RefRole, "ppo.ref", FrozenRoleConfig, "PPO's reference: the frozen policy that the KL penalty is taken against.",
    takes &[ArtifactType::Policy], gives ArtifactType::Policy
);
role!(
    /// The frozen model that scores answers.
    RewardRole, "ppo.reward", FrozenRoleConfig, "PPO's reward model: frozen, scores whole answers.",
    takes &[ArtifactType::Reward], gives ArtifactType::Reward
);

/// The checkpoint as an artifact of the role's type, with the role's settings in its metadata. Tensors are shared with
/// the checkpoint; only a fresh scalar head is new.
fn publish(context: &RunContext<'_>, artifact_type: ArtifactType, train: Option<&RoleTrain>) -> StageResult<Artifact> {
    let source = &context.input("model")?.artifact;
    let info = CheckpointInfo::of(source)?;
    let role = train.map(serde_json::to_value).transpose().map_err(|error| rlflow_api::StageError::invalid(error.to_string()))?;
    let head = if artifact_type == ArtifactType::Policy { Head::Language } else { Head::Score };
    if info.head == head || artifact_type == ArtifactType::Policy {
        let mut builder = context.output(artifact_type);
        for entry in &source.manifest().entries {
            builder.share(entry)?;
        }
        let info = CheckpointInfo { head, role, ..info };
        builder.metadata(serde_json::to_value(info).map_err(|error| rlflow_api::StageError::invalid(error.to_string()))?);
        return Ok(builder.publish()?);
    }
    let loaded = models::load(context, "model", head, Precision::Fp32)?;
    models::publish(context, artifact_type, &loaded.model, head, &CheckpointInfo { role, ..info }, source)
}

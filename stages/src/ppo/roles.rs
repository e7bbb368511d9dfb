//! The four roles as stage kinds: each takes a checkpoint and says how and where PPO uses it.

use std::collections::BTreeMap;

use rlflow_api::{
    Artifact, ArtifactType, DescribeContext, Description, Execution, InputPort, Needs, OutputPort, Problem, RunContext, StageError,
    StageKind, StageResult,
};
use rlflow_model::{CheckpointInfo, Head, LoraSettings, checkpoint};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::config::RoleTrain;
use crate::{lora, models};

/// Settings of a role that is trained.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct TrainedRoleConfig {
    /// How it is trained.
    pub train: RoleTrain,
    /// Trains low-rank adapters instead of the weights, which are shared with the model below: `lora = { rank = 8 }`. A reference (for the
    /// critic: a reward model) that is the model below is then not held a second time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lora: Option<LoraSettings>,
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

/// How a role is trained, as its artifact tells `ppo`.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct RoleTraining {
    /// The `train` table.
    #[serde(flatten)]
    pub train: RoleTrain,
    /// The `lora` table.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lora: Option<LoraSettings>,
}

impl RoleTraining {
    /// Of a role's artifact.
    ///
    /// # Errors
    /// If it says something else.
    pub fn of(info: &CheckpointInfo) -> StageResult<Self> {
        let role = info.role.clone().unwrap_or_else(|| serde_json::json!({}));
        let mut training: Self =
            serde_json::from_value(role).map_err(|error| StageError::invalid(format!("the role's settings: {error}")))?;
        training.train.normalise();
        Ok(training)
    }
}

/// Settings of a role.
trait RoleConfig {
    /// How it is trained, if it is.
    fn training(&self) -> Option<RoleTraining>;

    /// The adapter, if it has one.
    fn lora(&mut self) -> Option<&mut Option<LoraSettings>>;
}

impl RoleConfig for TrainedRoleConfig {
    fn training(&self) -> Option<RoleTraining> {
        Some(RoleTraining { train: self.train.clone(), lora: self.lora.clone() })
    }

    fn lora(&mut self) -> Option<&mut Option<LoraSettings>> {
        Some(&mut self.lora)
    }
}

impl RoleConfig for FrozenRoleConfig {
    fn training(&self) -> Option<RoleTraining> {
        None
    }

    fn lora(&mut self) -> Option<&mut Option<LoraSettings>> {
        None
    }
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

            fn normalise(config: &mut $config) {
                if let Some(lora) = config.lora() {
                    lora::normalise(lora);
                }
            }

            fn check(config: &$config) -> Vec<Problem> {
                let training = config.training().unwrap_or_default();
                [training.train.check(), lora::check(training.lora.as_ref())].concat()
            }

            fn describe(config: &$config, context: &DescribeContext<'_>) -> Result<Description, Vec<Problem>> {
                lora::check_model(config.training().unwrap_or_default().lora.as_ref(), context)?;
                // What the role takes of its devices is `ppo`'s to say: here it only gets its settings.
                models::describe_from(context, "model", "model", $gives, |_| Needs::default())
            }

            fn execution(config: &$config) -> Option<&Execution> {
                Some(&config.execution)
            }

            fn run(config: &$config, context: &RunContext<'_>) -> StageResult<BTreeMap<String, Artifact>> {
                let artifact = publish(context, $gives, config.training())?;
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
fn publish(context: &RunContext<'_>, artifact_type: ArtifactType, training: Option<RoleTraining>) -> StageResult<Artifact> {
    let source = &context.input("model")?.artifact;
    let info = CheckpointInfo::of(source)?;
    let invalid = |error: serde_json::Error| StageError::invalid(error.to_string());
    let role = training.map(serde_json::to_value).transpose().map_err(invalid)?;
    let head = if artifact_type == ArtifactType::Policy { Head::Language } else { Head::Score };
    let mut builder = context.output(artifact_type);
    if info.head == head || artifact_type == ArtifactType::Policy {
        for entry in &source.manifest().entries {
            builder.share(entry)?;
        }
    } else {
        checkpoint::share_under_score_head(source, &info, context.seed, &mut builder)?;
        models::share_files(&mut builder, source)?;
    }
    builder.metadata(serde_json::to_value(CheckpointInfo { head, role, ..info }).map_err(invalid)?);
    Ok(builder.publish()?)
}

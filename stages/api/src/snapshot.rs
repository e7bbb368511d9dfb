use std::{
    cell::Cell,
    time::{Duration, Instant},
};

use serde_json::Value;

use rlflow_store::{Artifact, ArtifactBuilder, Digest, Retain, Snapshot, SnapshotLimit, SnapshotSet};

use crate::StageResult;

/// When to write snapshots, and what of them to keep.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SnapshotPolicy {
    /// After this many steps, if set.
    pub every_steps: Option<u64>,
    /// After this much time, if set.
    pub every: Option<Duration>,
    /// What is kept of those that only serve to continue.
    pub limit: SnapshotLimit,
}

impl Default for SnapshotPolicy {
    fn default() -> Self {
        Self { every_steps: None, every: Some(Duration::from_secs(10)), limit: SnapshotLimit::default() }
    }
}

/// By the clock, writing may take at most one part in this many of the time: a model whose state takes a minute to
/// write is not written every ten seconds.
const TIME_SHARE: u32 = 20;

/// Where a snapshot's `info` names the action that it was made for.
const ACTION: &str = "action";

/// Whether the action `key` that continues from `snapshot` extends a run of other settings.
pub fn extends(snapshot: &Snapshot, key: Option<Digest>) -> bool {
    let made_for = snapshot.info.get(ACTION).and_then(Value::as_str).and_then(|key| key.parse::<Digest>().ok());
    snapshot.retain == Retain::Keep && (made_for.is_none() || made_for != key)
}

/// A stage's own snapshots, as it sees them.
pub struct Snapshots {
    set: SnapshotSet,
    usable: Vec<Snapshot>,
    /// Action key that they are made for.
    key: Option<Digest>,
    policy: Cell<SnapshotPolicy>,
    last: Cell<(Instant, Option<u64>)>,
    /// How long the last one took to write.
    cost: Cell<Duration>,
}

impl Snapshots {
    /// Over `set`; `usable` are those that [`crate::StageKind::can_continue`] accepted, best first.
    pub fn new(set: SnapshotSet, usable: Vec<Snapshot>) -> Self {
        let last = Cell::new((Instant::now(), None));
        Self { set, usable, key: None, policy: Cell::default(), last, cost: Cell::default() }
    }

    /// The same, noting in what is written that it is of the action `key`.
    pub fn of_action(self, key: Digest) -> Self {
        Self { key: Some(key), ..self }
    }

    /// Whether going on from `snapshot` continues another, finished run, rather than this one after an interruption: the
    /// final state of a run that was killed before it published is kept too.
    pub fn extends(&self, snapshot: &Snapshot) -> bool {
        extends(snapshot, self.key)
    }

    /// Sets when to write.
    pub fn set_policy(&self, policy: SnapshotPolicy) {
        self.policy.set(policy);
    }

    /// The snapshot to continue from, opened: most steps first, skipping those that cannot be read.
    pub fn resume(&self) -> Option<(Snapshot, Artifact)> {
        let found = self.usable.iter().find_map(|snapshot| match self.set.open(snapshot) {
            Ok(artifact) => Some((snapshot.clone(), artifact)),
            Err(error) => {
                tracing::warn!(step = snapshot.step, %error, "snapshot cannot be used");
                None
            }
        });
        if let Some((snapshot, _)) = &found {
            self.last.set((Instant::now(), Some(snapshot.step)));
        }
        found
    }

    /// Whether a snapshot should be written now that `step` steps are done.
    pub fn is_due(&self, step: u64) -> bool {
        let (time, last) = self.last.get();
        let policy = self.policy.get();
        policy.every.is_some_and(|every| time.elapsed() >= every.max(self.cost.get() * TIME_SHARE))
            || policy.every_steps.is_some_and(|every| step >= last.unwrap_or(0) + every)
    }

    /// Step of the newest snapshot that this run wrote or resumed from.
    pub fn last_step(&self) -> Option<u64> {
        self.last.get().1
    }

    /// A builder for the state.
    pub fn builder(&self) -> ArtifactBuilder {
        self.set.builder()
    }

    /// Writes a snapshot durably.
    pub fn save(&self, step: u64, retain: Retain, mut info: Value, state: ArtifactBuilder) -> StageResult<()> {
        let start = Instant::now();
        if let (Value::Object(info), Some(key)) = (&mut info, self.key) {
            info.insert(ACTION.to_owned(), key.to_string().into());
        }
        self.set.save(step, retain, info, state, self.policy.get().limit)?;
        self.cost.set(start.elapsed());
        self.last.set((Instant::now(), Some(step)));
        Ok(())
    }
}

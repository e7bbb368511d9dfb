use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use rlflow_api::{
    Artifact, Channel, Input, Message, Order, Peer, PlacedAt, Processes, RunContext, StageError, Wire, Work, WorkInput, ended,
};
use rlflow_store::Digest;

/// Between stages.
pub(crate) const ORDERS: Channel = Channel { attempt: 0, number: 0 };

/// The processes of a run, as the one that leads them has them. The others wait in [`crate::worker::serve`].
#[derive(Debug)]
pub struct Crew {
    wire: Arc<dyn Wire>,
    attempts: AtomicU32,
}

impl PartialEq for Crew {
    fn eq(&self, other: &Self) -> bool {
        self.count() == other.count()
    }
}

impl Crew {
    /// Those on `wire`, of which this process is the first.
    pub fn new(wire: Arc<dyn Wire>) -> Self {
        Self { wire, attempts: AtomicU32::new(1) }
    }

    /// How many processes there are, this one included.
    pub fn count(&self) -> usize {
        self.wire.processes()
    }

    /// Has all processes begin a stage. `context` is that of this one.
    pub(crate) fn begin(
        &self,
        kind: &str,
        settings: &serde_json::Value,
        prefix_key: Digest,
        context: &RunContext<'_>,
    ) -> Result<Joint<'_>, StageError> {
        let attempt = self.attempts.fetch_add(1, Ordering::Relaxed);
        let inputs = |(port, inputs): (&String, &Vec<Input>)| inputs.iter().map(|input| WorkInput::new(port, input)).collect::<Vec<_>>();
        let work = Work {
            attempt,
            stage: context.stage.to_owned(),
            kind: kind.to_owned(),
            settings: settings.clone(),
            seed: context.seed,
            placement: PlacedAt::from(context.placement),
            store: context.store.folder().to_owned(),
            prefix_key,
            inputs: context.inputs.iter().flat_map(inputs).collect(),
            files: context.files.to_vec(),
        };
        self.tell(&Order::Run(Box::new(work))).map_err(ended)?;
        Ok(Joint { processes: Processes::joint(self.wire.clone(), attempt), crew: self, attempt })
    }

    /// Lets the other processes go.
    ///
    /// # Errors
    /// That and which of them is gone already.
    pub fn leave(&self) -> Result<(), String> {
        self.tell(&Order::Leave)
    }

    fn tell(&self, order: &Order) -> Result<(), String> {
        let order = serde_json::to_vec(order).map_err(|error| error.to_string())?;
        let message = Arc::new(Message::of(&[&order]));
        let others = (1..self.count()).map(|process| (Peer { process, lane: 0 }, message.clone()));
        self.wire.exchange(ORDERS, others.collect(), &[]).map(|_| ())
    }
}

/// A stage that all processes run.
pub(crate) struct Joint<'a> {
    pub(crate) processes: Processes,
    crew: &'a Crew,
    attempt: u32,
}

impl Joint<'_> {
    /// The stage ended here. If it failed, the others end it too.
    pub(crate) fn end(self, result: &Result<BTreeMap<String, Artifact>, StageError>) {
        if let Err(error) = result {
            self.crew.wire.abort(self.attempt, &error.to_string(), Duration::ZERO);
        }
    }
}

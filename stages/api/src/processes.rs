use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

use crate::{Channel, Message, Peer, Portable, StageError, StageResult, Wire};

/// The processes that run a stage together, as one of them sees them. All run the same code on the same settings and inputs and make
/// the same calls in the same order; process 0 leads: it alone writes to the store and reports, and what could differ between
/// processes (whether a snapshot is due) is asked of it ([`Processes::agree`]).
#[derive(Debug, Clone, Default)]
pub struct Processes(Option<Arc<Joint>>);

#[derive(Debug)]
struct Joint {
    wire: Arc<dyn Wire>,
    attempt: u32,
    channels: AtomicU32,
}

/// What is said between the processes themselves, rather than between their ranks.
const OWN: u32 = 0;

impl Processes {
    /// This one alone.
    pub fn alone() -> Self {
        Self::default()
    }

    /// Those on `wire`, for the `attempt`th stage that they run together, from 1.
    pub fn joint(wire: Arc<dyn Wire>, attempt: u32) -> Self {
        Self(Some(Arc::new(Joint { wire, attempt, channels: AtomicU32::new(OWN + 1) })))
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.0.as_ref().map_or(1, |joint| joint.wire.processes())
    }

    /// This process, from 0.
    pub fn index(&self) -> usize {
        self.0.as_ref().map_or(0, |joint| joint.wire.process())
    }

    /// Whether this process leads.
    pub fn is_leader(&self) -> bool {
        self.index() == 0
    }

    /// What the leader gives. The others are not asked.
    ///
    /// # Errors
    /// What `value` returns, at the leader; or why the attempt ended.
    pub fn agree<T: Portable>(&self, value: impl FnOnce() -> StageResult<T>) -> StageResult<T> {
        let Some(joint) = &self.0 else { return value() };
        if self.is_leader() {
            let value = value()?;
            let message = Arc::new(encoded(&value));
            joint.exchange((1..self.count()).map(|process| (of_process(process), message.clone())).collect(), &[])?;
            return Ok(value);
        }
        decoded(&joint.exchange(Vec::new(), &[of_process(0)])?[0])
    }

    /// What each process gives, in their order.
    ///
    /// # Errors
    /// Why the attempt ended.
    pub fn gather<T: Portable>(&self, own: T) -> StageResult<Vec<T>> {
        let Some(joint) = &self.0 else { return Ok(vec![own]) };
        let message = Arc::new(encoded(&own));
        let others: Vec<Peer> = (0..self.count()).filter(|process| *process != self.index()).map(of_process).collect();
        let received = joint.exchange(others.iter().map(|peer| (*peer, message.clone())).collect(), &others)?;
        let mut values = received.iter().map(decoded).collect::<StageResult<Vec<T>>>()?;
        values.insert(self.index(), own);
        Ok(values)
    }

    /// The wire, with a channel of its own for a group of ranks; `None` for a process alone.
    pub fn line(&self) -> Option<Line> {
        let joint = self.0.as_ref()?;
        let number = joint.channels.fetch_add(1, Ordering::Relaxed);
        Some(Line { wire: joint.wire.clone(), channel: Channel { attempt: joint.attempt, number } })
    }
}

/// A channel of a wire.
#[derive(Debug, Clone)]
pub struct Line {
    /// The wire.
    pub wire: Arc<dyn Wire>,
    /// The channel.
    pub channel: Channel,
}

impl Joint {
    fn exchange(&self, outgoing: Vec<(Peer, Arc<Message>)>, incoming: &[Peer]) -> StageResult<Vec<Message>> {
        self.wire.exchange(Channel { attempt: self.attempt, number: OWN }, outgoing, incoming).map_err(ended)
    }
}

fn of_process(process: usize) -> Peer {
    Peer { process, lane: 0 }
}

/// The error of a process that another one took down.
pub fn ended(why: String) -> StageError {
    StageError::invalid_with_hint(why, "all ranks were stopped; the last snapshot is kept, and a run continues from it").or_device_trouble()
}

fn encoded<T: Portable>(value: &T) -> Message {
    let mut bytes = Vec::new();
    value.put(&mut bytes);
    Message::of(&[&bytes])
}

fn decoded<T: Portable>(message: &Message) -> StageResult<T> {
    let foreign = || StageError::invalid("another process sent what this one does not expect: do all run the same rlflow?");
    let mut bytes = message.bytes();
    let value = T::take(&mut bytes).ok_or_else(foreign)?;
    if bytes.is_empty() { Ok(value) } else { Err(foreign()) }
}

#[cfg(test)]
mod tests {
    use std::{thread, time::Duration};

    use super::*;
    use crate::testing::wires;

    fn on_processes<T: Send>(count: usize, work: impl Fn(Processes) -> T + Sync) -> Vec<T> {
        let wires = wires(count);
        thread::scope(|scope| {
            let start = |wire: &Arc<dyn Wire>| {
                let processes = Processes::joint(wire.clone(), 1);
                scope.spawn(|| work(processes))
            };
            let threads: Vec<_> = wires.iter().map(start).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    #[test]
    fn the_leader_decides_and_all_give() {
        let told = on_processes(3, |processes| {
            let decided = processes.agree(|| Ok(processes.index() + 7)).unwrap();
            (decided, processes.gather(vec![processes.index() as f32]).unwrap())
        });
        assert_eq!(told, vec![(7, vec![vec![0.0], vec![1.0], vec![2.0]]); 3]);
        let alone = Processes::alone();
        assert_eq!((alone.agree(|| Ok(1_u64)).unwrap(), alone.gather(2_u64).unwrap()), (1, vec![2]));
    }

    #[test]
    fn whoever_waits_is_told_why_the_attempt_ended() {
        let wires = wires(2);
        let processes = Processes::joint(wires[1].clone(), 1);
        let waiting = thread::spawn(move || processes.agree(|| Ok(true)));
        wires[0].abort(1, "the disk is full", Duration::ZERO);
        assert_eq!(waiting.join().unwrap().unwrap_err().to_string(), "the disk is full");
        // The next attempt is another one.
        assert_eq!(wires[1].aborted(2), None);
    }
}

use std::{
    collections::HashMap,
    ffi::c_int,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use rlflow_api::{Channel, Message, Peer, Portable, Wire};

use super::calls::{Calls, Receiving, Sending, is_continued};

/// What is said about attempts that ended before their time.
pub const CONTROL: Channel = Channel { attempt: 0, number: 1 };

/// How many attempts, groups of an attempt and lanes tags tell apart: together they fit what any MPI allows as a tag.
const ATTEMPTS: u32 = 63;
const NUMBERS: u32 = 31;
const LANES: u32 = 1 << 12;

/// Waits are busy at first: most messages come at once.
const BUSY: Duration = Duration::from_micros(200);

/// [`Wire`] over MPI.
#[derive(Debug)]
pub struct MpiWire {
    process: usize,
    processes: usize,
    pub(super) calls: Calls,
    ends: Mutex<Ends>,
}

#[derive(Debug, Default)]
struct Ends {
    /// Why attempts ended, and from when on nobody waits for their messages.
    attempts: HashMap<u32, (String, Instant)>,
    /// What ends all of them.
    all: Option<String>,
}

/// A message that is waited for.
struct Incoming {
    from: usize,
    tag: c_int,
    under_way: Option<Receiving>,
    pieces: Vec<Message>,
    is_done: bool,
}

fn tag(channel: Channel, lane: u32) -> Result<c_int, String> {
    let Channel { attempt, number } = channel;
    if lane >= LANES {
        return Err("at most 64 ranks in each of several processes".into());
    }
    // Several attempts share tags only long after one another; several groups of one attempt take turns.
    let attempt = if attempt == 0 { 0 } else { 1 + attempt % ATTEMPTS };
    let number = if number == 0 || attempt == 0 { number } else { 1 + number % NUMBERS };
    Ok((((attempt << 5) | number) << 12 | lane) as c_int)
}

impl MpiWire {
    /// Between `processes` processes, of which this is number `process`.
    pub fn new(process: usize, processes: usize) -> Self {
        Self { process, processes, calls: Calls::new(), ends: Mutex::default() }
    }

    fn ends(&self) -> MutexGuard<'_, Ends> {
        self.ends.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A process is gone: nothing goes on.
    pub fn lose(&self, why: String) {
        self.ends().all.get_or_insert(why);
    }

    /// Whether one is.
    pub fn is_one_lost(&self) -> bool {
        self.ends().all.is_some()
    }

    /// What another process says of an attempt.
    pub fn control(&self) -> Result<(), String> {
        for from in (0..self.processes).filter(|process| *process != self.process) {
            let Some(mut receiving) = self.calls.receive(from, tag(CONTROL, 0)?)? else { continue };
            let said = loop {
                match self.calls.received(&mut receiving)? {
                    Some(said) => break said,
                    None => thread::yield_now(),
                }
            };
            if let Some((attempt, why, patience)) = Portable::take(&mut said.bytes()) {
                self.end(attempt, why, Duration::from_millis(patience));
            }
        }
        Ok(())
    }

    fn end(&self, attempt: u32, why: String, patience: Duration) {
        self.ends().attempts.entry(attempt).or_insert_with(|| (why, Instant::now() + patience));
    }

    /// Fails if nobody should wait for messages of this channel any longer.
    fn check(&self, channel: Channel) -> Result<(), String> {
        let ends = self.ends();
        if let Some(why) = &ends.all {
            return Err(why.clone());
        }
        match ends.attempts.get(&channel.attempt) {
            Some((why, until)) if Instant::now() >= *until => Err(why.clone()),
            _ => Ok(()),
        }
    }

    /// [`Wire::exchange`], for so long at most.
    pub fn exchange_within(
        &self,
        limit: Option<Duration>,
        channel: Channel,
        outgoing: Vec<(Peer, Arc<Message>)>,
        incoming: &[Peer],
    ) -> Result<Vec<Message>, String> {
        self.check(channel)?;
        let shares_tags = |ended: &u32| *ended != channel.attempt && *ended % ATTEMPTS == channel.attempt % ATTEMPTS;
        if channel.attempt > 0 && self.ends().attempts.keys().any(shares_tags) {
            return Err("too many stages after one that failed: messages of that one may still be under way; run again".into());
        }
        let mut sending = Vec::with_capacity(outgoing.len());
        for (peer, message) in &outgoing {
            sending.extend(self.calls.send(peer.process, tag(channel, peer.lane)?, message)?);
        }
        let mut receiving = Vec::with_capacity(incoming.len());
        for peer in incoming {
            let tag = tag(channel, peer.lane)?;
            receiving.push(Incoming { from: peer.process, tag, under_way: None, pieces: Vec::new(), is_done: false });
        }
        let mut waited = Instant::now();
        let until = limit.map(|limit| waited + limit);
        loop {
            let advanced = self.advance(&mut sending, &mut receiving)?;
            if sending.is_empty() && receiving.iter().all(|incoming| incoming.is_done) {
                break;
            }
            if advanced {
                waited = Instant::now();
                continue;
            }
            self.check(channel)?;
            if until.is_some_and(|until| Instant::now() >= until) {
                return Err("another process does not answer".into());
            }
            wait(waited.elapsed());
        }
        let whole = |mut incoming: Incoming| match incoming.pieces.len() {
            1 => incoming.pieces.swap_remove(0),
            _ => Message::of(&incoming.pieces.iter().map(Message::bytes).collect::<Vec<_>>()),
        };
        Ok(receiving.into_iter().map(whole).collect())
    }

    /// Takes what was sent and what has come off the lists. Whether anything was.
    fn advance(&self, sending: &mut Vec<Sending>, receiving: &mut [Incoming]) -> Result<bool, String> {
        let mut advanced = false;
        let mut at = 0;
        while at < sending.len() {
            if self.calls.is_sent(&mut sending[at])? {
                sending.swap_remove(at);
                advanced = true;
            } else {
                at += 1;
            }
        }
        for incoming in receiving.iter_mut().filter(|incoming| !incoming.is_done) {
            if incoming.under_way.is_none() {
                incoming.under_way = self.calls.receive(incoming.from, incoming.tag)?;
            }
            let Some(under_way) = &mut incoming.under_way else { continue };
            let Some(piece) = self.calls.received(under_way)? else { continue };
            incoming.under_way = None;
            incoming.is_done = !is_continued(&piece);
            incoming.pieces.push(piece);
            advanced = true;
        }
        Ok(advanced)
    }
}

/// A pause in a wait that has lasted this long: short ones keep the processor, long ones leave it to others.
fn wait(waited: Duration) {
    if waited < BUSY {
        thread::yield_now();
    } else {
        thread::sleep((waited / 20).clamp(Duration::from_micros(20), Duration::from_millis(2)));
    }
}

impl Wire for MpiWire {
    fn process(&self) -> usize {
        self.process
    }

    fn processes(&self) -> usize {
        self.processes
    }

    fn exchange(&self, channel: Channel, outgoing: Vec<(Peer, Arc<Message>)>, incoming: &[Peer]) -> Result<Vec<Message>, String> {
        self.exchange_within(None, channel, outgoing, incoming)
    }

    fn abort(&self, attempt: u32, why: &str, patience: Duration) {
        self.end(attempt, why.to_owned(), Duration::ZERO);
        let mut said = Vec::new();
        (attempt, why.to_owned(), patience.as_millis() as u64).put(&mut said);
        let message = Arc::new(Message::of(&[&said]));
        for to in (0..self.processes).filter(|process| *process != self.process) {
            let sent = tag(CONTROL, 0).and_then(|tag| self.calls.send(to, tag, &message));
            // So short a message is on its way by now; nobody waits for it here.
            if let Err(error) = sent {
                tracing::debug!(%error, to, "a process is not told of an end");
            }
        }
    }

    fn aborted(&self, attempt: u32) -> Option<String> {
        let ends = self.ends();
        ends.all.clone().or_else(|| ends.attempts.get(&attempt).map(|(why, _)| why.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_are_apart_and_small() {
        let mut seen = std::collections::BTreeSet::new();
        for (attempt, number, lane) in [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0), (1, 1, 1), (2, 1, 0), (63, 31, 4095)] {
            let tag = tag(Channel { attempt, number }, lane).unwrap();
            assert!((0..1 << 23).contains(&tag) && seen.insert(tag), "{attempt} {number} {lane}: {tag}");
        }
        assert!(tag(CONTROL, 4096).is_err());
    }
}

use std::{fmt::Debug, sync::Arc, time::Duration};

/// Bytes on their way between processes, aligned so that numbers can be read where they lie.
#[derive(Debug, Clone, Default)]
pub struct Message {
    words: Vec<u64>,
    len: usize,
}

impl Message {
    /// Of `len` zeros, to be written to.
    pub fn zeroed(len: usize) -> Self {
        Self { words: vec![0; len.div_ceil(size_of::<u64>())], len }
    }

    /// Of `parts`, one after the other.
    pub fn of(parts: &[&[u8]]) -> Self {
        let mut message = Self::zeroed(parts.iter().map(|part| part.len()).sum());
        let mut rest = message.bytes_mut();
        for part in parts {
            let (head, tail) = rest.split_at_mut(part.len());
            head.copy_from_slice(part);
            rest = tail;
        }
        message
    }

    /// The bytes. The first is aligned for any number.
    pub fn bytes(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.words)[..self.len]
    }

    /// The same, to be changed.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(&mut self.words)[..self.len]
    }
}

/// Which messages belong together. Between two processes, those of one channel and lane arrive in the order in which they were
/// sent; others may overtake them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Channel {
    /// The attempt at a stage, from 1; 0 is for what is said between stages.
    pub attempt: u32,
    /// Counted within the attempt.
    pub number: u32,
}

/// Other end of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Peer {
    /// Its process.
    pub process: usize,
    /// Keeps apart what several ranks of the two processes say to each other.
    pub lane: u32,
}

/// Carries messages between the processes of a run.
pub trait Wire: Debug + Send + Sync {
    /// This process, from 0. Process 0 leads.
    fn process(&self) -> usize;

    /// How many there are.
    fn processes(&self) -> usize;

    /// Sends all of `outgoing`, and waits until they are sent and for one message from each of `incoming`, in that order.
    ///
    /// # Errors
    /// Why the attempt ended, or that and which process is gone.
    fn exchange(&self, channel: Channel, outgoing: Vec<(Peer, Arc<Message>)>, incoming: &[Peer]) -> Result<Vec<Message>, String>;

    /// Ends an attempt here and in all other processes: whoever waits for a message of it is told `why`. Those who wait in other
    /// processes wait on for `patience` first: they may find the same by themselves.
    fn abort(&self, attempt: u32, why: &str, patience: Duration);

    /// Why an attempt ended before its time, if it did.
    fn aborted(&self, attempt: u32) -> Option<String>;
}

use std::{fmt::Debug, ops::Range, sync::mpsc::Receiver};

use burn::tensor::Tensor;

/// What ranks do together. Every rank of a group must make the same calls in the same order; each returns when all ranks
/// have made it.
///
/// When a rank fails ([`Collective::abort`]), calls of the others do not return: they unwind with [`Aborted`], which
/// [`crate::Group`] catches, so that nothing hangs and no code in between has to carry that error.
pub trait Collective: Debug + Send + Sync {
    /// This rank, from 0.
    fn rank(&self) -> usize;

    /// How many there are.
    fn ranks(&self) -> usize;

    /// Adds all ranks' parts, in the order of ranks, onto `sum`, of which this rank holds its share: `shares[rank]`, a range
    /// of a part's elements. A rank without a part adds nothing; `None` where there is neither a sum nor a part.
    fn reduce_scatter(&self, sum: Option<Tensor<2>>, part: Option<Tensor<2>>, shares: &[Range<usize>]) -> Option<Tensor<2>>;

    /// Adds all ranks' parts, in the order of ranks, onto `sum`, which every rank holds whole.
    fn all_reduce(&self, sum: Option<Tensor<2>>, part: Option<Tensor<2>>) -> Option<Tensor<2>>;

    /// All ranks' pieces, in the order of ranks.
    fn all_gather(&self, piece: Tensor<2>) -> Vec<Tensor<2>>;

    /// Starts [`Collective::all_gather`], so that it goes on while this rank does other work, where there is a way to.
    fn start_all_gather(&self, piece: Tensor<2>) -> Pending {
        Pending(State::Done(self.all_gather(piece)))
    }

    /// All ranks' numbers, in the order of ranks.
    fn all_gather_values(&self, values: Vec<f64>) -> Vec<Vec<f64>>;

    /// What rank `root` gives.
    fn broadcast(&self, root: usize, value: Option<Tensor<2>>) -> Option<Tensor<2>>;

    /// Waits for all.
    fn barrier(&self);

    /// This rank cannot go on, and says why: ends the calls of all others, now and from now on.
    fn abort(&self, why: &str);

    /// Why a rank of another process could not go on, if that is known.
    fn aborted(&self) -> Option<String> {
        None
    }
}

/// Pieces that may still be on their way.
#[derive(Debug)]
pub struct Pending(State);

#[derive(Debug)]
enum State {
    Done(Vec<Tensor<2>>),
    Later(Receiver<std::thread::Result<Vec<Tensor<2>>>>),
}

impl Pending {
    /// Pieces that somebody will send.
    pub(super) fn later(pieces: Receiver<std::thread::Result<Vec<Tensor<2>>>>) -> Self {
        Self(State::Later(pieces))
    }

    /// The pieces, once they are there.
    pub fn wait(self) -> Vec<Tensor<2>> {
        match self.0 {
            State::Done(pieces) => pieces,
            State::Later(pieces) => super::ordered::answered(&pieces),
        }
    }
}

/// Payload of the unwinding of a rank whose peer failed.
#[derive(Debug, Clone, Copy)]
pub struct Aborted;

impl Aborted {
    /// Leaves the rank's work without a message: the rank that failed has one.
    pub fn unwind() -> ! {
        std::panic::resume_unwind(Box::new(Self))
    }
}

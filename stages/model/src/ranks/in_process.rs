use std::{
    ops::Range,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
};

use burn::tensor::{Device, Tensor};

use super::{Aborted, Collective, add_range, by_shares::ByShares};

/// Collectives of `ranks` threads of this process, one for each. Tensors are handed over without a copy; each rank adds and
/// joins on its own device.
pub fn in_process(ranks: usize) -> Vec<Arc<dyn Collective>> {
    let board = Arc::new(Board { ranks, round: Mutex::new(Round::new(ranks)), changed: Condvar::new() });
    (0..ranks).map(|rank| Arc::new(InProcess { rank, board: board.clone() }) as Arc<dyn Collective>).collect()
}

/// The same for ranks on `devices`. Where those are several, tensors travel: over NCCL between GPUs.
pub fn in_process_on(devices: &[Device]) -> Vec<Arc<dyn Collective>> {
    let ends = in_process(devices.len());
    if devices.windows(2).all(|pair| pair[0] == pair[1]) {
        return ends;
    }
    ends.into_iter().map(|end| Arc::new(ByShares(end)) as Arc<dyn Collective>).collect()
}

/// What a rank puts on the board.
#[derive(Debug, Clone)]
enum Part {
    Tensor(Option<Box<Tensor<2>>>),
    Values(Vec<f64>),
    Nothing,
}

#[derive(Debug)]
struct Round {
    parts: Vec<Option<Part>>,
    /// All parts are there and not all ranks have taken them.
    complete: bool,
    taken: usize,
    aborted: bool,
}

impl Round {
    fn new(ranks: usize) -> Self {
        Self { parts: vec![None; ranks], complete: false, taken: 0, aborted: false }
    }
}

/// Where ranks meet.
#[derive(Debug)]
struct Board {
    ranks: usize,
    round: Mutex<Round>,
    changed: Condvar,
}

impl Board {
    fn wait<'a>(&'a self, round: MutexGuard<'a, Round>, until: impl Fn(&Round) -> bool) -> MutexGuard<'a, Round> {
        let round = self.changed.wait_while(round, |round| !round.aborted && !until(round)).unwrap_or_else(PoisonError::into_inner);
        if round.aborted {
            drop(round);
            Aborted::unwind();
        }
        round
    }

    /// Every rank's part, once all have come.
    fn exchange(&self, rank: usize, part: Part) -> Vec<Part> {
        let round = self.round.lock().unwrap_or_else(PoisonError::into_inner);
        let mut round = self.wait(round, |round| !round.complete);
        round.parts[rank] = Some(part);
        if round.parts.iter().all(Option::is_some) {
            round.complete = true;
            self.changed.notify_all();
        }
        let mut round = self.wait(round, |round| round.complete);
        let parts = round.parts.iter().flatten().cloned().collect();
        round.taken += 1;
        if round.taken == self.ranks {
            *round = Round::new(self.ranks);
            self.changed.notify_all();
        }
        parts
    }
}

/// One rank's end of the board.
#[derive(Debug)]
struct InProcess {
    rank: usize,
    board: Arc<Board>,
}

impl InProcess {
    fn tensors(&self, part: Option<Tensor<2>>) -> impl Iterator<Item = Option<Tensor<2>>> {
        let parts = self.board.exchange(self.rank, Part::Tensor(part.map(Box::new)));
        parts.into_iter().map(|part| if let Part::Tensor(tensor) = part { tensor.map(|tensor| *tensor) } else { None })
    }
}

impl Collective for InProcess {
    fn rank(&self) -> usize {
        self.rank
    }

    fn ranks(&self) -> usize {
        self.board.ranks
    }

    fn reduce_scatter(&self, sum: Option<Tensor<2>>, part: Option<Tensor<2>>, shares: &[Range<usize>]) -> Option<Tensor<2>> {
        let share = &shares[self.rank];
        self.tensors(part).flatten().fold(sum, |sum, part| Some(add_range(sum, &part, share.clone())))
    }

    fn all_reduce(&self, sum: Option<Tensor<2>>, part: Option<Tensor<2>>) -> Option<Tensor<2>> {
        self.tensors(part).flatten().fold(sum, |sum, part| {
            Some(match sum {
                None => part,
                Some(sum) => {
                    let [rows, columns] = part.dims();
                    add_range(Some(sum), &part, 0..rows * columns)
                }
            })
        })
    }

    fn all_gather(&self, piece: Tensor<2>) -> Vec<Tensor<2>> {
        self.tensors(Some(piece)).flatten().collect()
    }

    fn all_gather_values(&self, values: Vec<f64>) -> Vec<Vec<f64>> {
        let parts = self.board.exchange(self.rank, Part::Values(values));
        parts.into_iter().map(|part| if let Part::Values(values) = part { values } else { Vec::new() }).collect()
    }

    fn broadcast(&self, root: usize, value: Option<Tensor<2>>) -> Option<Tensor<2>> {
        self.tensors(value.filter(|_| self.rank == root)).nth(root).flatten()
    }

    fn barrier(&self) {
        self.board.exchange(self.rank, Part::Nothing);
    }

    fn abort(&self, _: &str) {
        self.board.round.lock().unwrap_or_else(PoisonError::into_inner).aborted = true;
        self.board.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, TensorData};

    use super::*;
    use crate::parameters::host;

    fn tensor(values: &[f32]) -> Tensor<2> {
        Tensor::from_data(TensorData::new(values.to_vec(), [1, values.len()]), &Device::flex())
    }

    fn on_ranks<T: Send>(ranks: usize, work: impl Fn(&dyn Collective) -> T + Sync) -> Vec<std::thread::Result<T>> {
        let ends = in_process(ranks);
        std::thread::scope(|scope| {
            let threads: Vec<_> = ends.iter().map(|end| scope.spawn(|| work(end.as_ref()))).collect();
            threads.into_iter().map(std::thread::ScopedJoinHandle::join).collect()
        })
    }

    #[test]
    fn sums_are_added_in_the_order_of_ranks() {
        // In another order these do not give 1: 1e8 swallows what is added to it.
        let parts = [1e8_f32, -1e8, 1.0];
        let sums = on_ranks(3, |end| {
            let part = tensor(&[parts[end.rank()], end.rank() as f32]);
            let all = end.all_reduce(None, Some(part.clone())).unwrap();
            let own = end.reduce_scatter(Some(tensor(&[0.5])), Some(part), &[0..1, 1..2, 1..2]).unwrap();
            (host(&all), host(&own))
        });
        let sums: Vec<_> = sums.into_iter().map(Result::unwrap).collect();
        assert_eq!(sums, [(vec![1.0, 3.0], vec![1.0]), (vec![1.0, 3.0], vec![3.5]), (vec![1.0, 3.0], vec![3.5])]);
    }

    #[test]
    fn ranks_without_a_part_add_nothing() {
        let sums = on_ranks(2, |end| {
            let part = (end.rank() == 1).then(|| tensor(&[2.0]));
            let nothing = end.all_reduce(None, None).is_none();
            (host(&end.all_reduce(None, part).unwrap()), nothing, host(&end.broadcast(1, Some(tensor(&[end.rank() as f32]))).unwrap()))
        });
        for sum in sums {
            assert_eq!(sum.unwrap(), (vec![2.0], true, vec![1.0]));
        }
    }

    #[test]
    fn many_rounds_keep_apart() {
        let all = on_ranks(4, |end| {
            for round in 0..500 {
                let expected: Vec<Vec<f64>> = (0..4).map(|rank| vec![f64::from(round * 4 + rank)]).collect();
                assert_eq!(end.all_gather_values(vec![f64::from(round * 4 + end.rank() as i32)]), expected);
            }
        });
        assert!(all.iter().all(Result::is_ok));
    }

    #[test]
    fn a_rank_that_fails_frees_those_that_wait() {
        let results = on_ranks(3, |end| {
            if end.rank() == 1 {
                end.abort("");
            } else {
                end.barrier();
            }
        });
        let aborted = |result: &std::thread::Result<()>| result.as_ref().is_err_and(|payload| payload.is::<Aborted>());
        assert_eq!(results.iter().map(aborted).collect::<Vec<_>>(), [true, false, true]);
    }
}

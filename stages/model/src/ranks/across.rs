use std::{ops::Range, sync::Arc, time::Duration};

use burn::{
    backend::Flex,
    tensor::{Device, Tensor, TensorData},
};
use burn_flex::FlexTensor;
use half::bf16;
use rlflow_api::{Line, Message, Peer};

use super::{Aborted, Collective, add_range, cut, join};
use crate::parameters::{flex_narrow_view, flex_view};

/// Collectives of ranks in several processes, each of which holds `local` of them: the ends of this process. Rank `r` is the
/// `r mod local`th of process `r div local`.
///
/// Every rank sends its parts to every other rank; whoever owns a sum adds them in the order of ranks. So a sum has the bits that
/// it has in one process, and a rank sends and receives as much as in a ring.
pub fn across(line: &Line, local: usize) -> Vec<Arc<dyn Collective>> {
    let first = line.wire.process() * local;
    (first..first + local).map(|rank| Arc::new(Across { rank, local, line: line.clone() }) as Arc<dyn Collective>).collect()
}

#[derive(Debug)]
struct Across {
    rank: usize,
    local: usize,
    line: Line,
}

/// What stands before a tensor's elements.
const HEAD: usize = 4 * size_of::<u64>();

/// Kinds of elements.
const ABSENT: u64 = 0;
const SINGLE: u64 = 1;
const HALF: u64 = 2;

impl Across {
    fn others(&self) -> impl Iterator<Item = usize> {
        (0..self.ranks()).filter(|rank| *rank != self.rank)
    }

    /// Where messages of rank `from` to rank `to` go, or come from, seen from the one that is here.
    fn peer(&self, other: usize, from: usize, to: usize) -> Peer {
        Peer { process: other / self.local, lane: (from % self.local * self.local + to % self.local) as u32 }
    }

    /// Gives every other rank a message, and returns theirs in the order of ranks, with `None` for this one's own.
    fn exchange(&self, message: impl Fn(usize) -> Arc<Message>) -> Vec<Option<Message>> {
        let outgoing = self.others().map(|to| (self.peer(to, self.rank, to), message(to))).collect();
        let incoming: Vec<Peer> = self.others().map(|from| self.peer(from, from, self.rank)).collect();
        let received = self.line.wire.exchange(self.line.channel, outgoing, &incoming).unwrap_or_else(|_| Aborted::unwind());
        let mut all: Vec<Option<Message>> = received.into_iter().map(Some).collect();
        all.insert(self.rank, None);
        all
    }
}

/// A tensor as it is sent.
fn message(dims: [usize; 2], elements: Option<(u64, &[u8])>) -> Message {
    let (kind, bytes) = elements.unwrap_or((ABSENT, &[]));
    let head = [kind, dims[0] as u64, dims[1] as u64, 0];
    Message::of(&[bytemuck::cast_slice(&head), bytes])
}

/// The elements of `tensor` in `range`.
fn message_of(tensor: &Tensor<2>, range: Option<Range<usize>>) -> Message {
    let held = tensor.clone().to_device(&Device::flex());
    let dims = tensor.dims();
    let range = range.unwrap_or(0..dims[0] * dims[1]);
    if let Some(view) = flex_narrow_view(&held) {
        let values: &[bf16] = view.as_slice().expect("views are contiguous bfloat16");
        return message(dims, Some((HALF, bytemuck::cast_slice(&values[range]))));
    }
    let view = flex_view(&held).expect("ranks exchange f32 and bfloat16");
    let values: &[f32] = view.as_slice().expect("views are contiguous f32");
    message(dims, Some((SINGLE, bytemuck::cast_slice(&values[range]))))
}

fn head(message: &Message) -> [u64; 4] {
    let head = message.bytes().get(..HEAD).map(|head| bytemuck::cast_slice(head).try_into().expect("four words"));
    // What is no tensor comes from a process that runs something else.
    head.unwrap_or_else(|| panic!("another process sent what no rank of this rlflow sends"))
}

/// A piece with the message's elements, or `None` if it has no tensor.
fn tensor_of(message: &Message, device: &Device) -> Option<Tensor<2>> {
    let bytes = &message.bytes()[HEAD.min(message.bytes().len())..];
    match head(message)[0] {
        ABSENT => None,
        HALF => {
            let values: Vec<bf16> = bytemuck::cast_slice(bytes).to_vec();
            let dims = [1, values.len()];
            let tensor = Tensor::from_primitive::<Flex>(FlexTensor::from_data(TensorData::new(values, dims)));
            Some(tensor.to_device(device))
        }
        _ => {
            let values: Vec<f32> = bytemuck::cast_slice(bytes).to_vec();
            let dims = [1, values.len()];
            Some(Tensor::from_data(TensorData::new(values, dims), device))
        }
    }
}

impl Collective for Across {
    fn rank(&self) -> usize {
        self.rank
    }

    fn ranks(&self) -> usize {
        self.local * self.line.wire.processes()
    }

    fn reduce_scatter(&self, mut sum: Option<Tensor<2>>, part: Option<Tensor<2>>, shares: &[Range<usize>]) -> Option<Tensor<2>> {
        let device = part.as_ref().or(sum.as_ref()).map_or_else(Device::flex, Tensor::device);
        let received = self.exchange(|to| {
            Arc::new(part.as_ref().map_or_else(|| message([0, 0], None), |part| message_of(part, Some(shares[to].clone()))))
        });
        let share = &shares[self.rank];
        for theirs in received {
            let (part, range) = match theirs {
                None => (part.clone(), share.clone()),
                Some(message) => (tensor_of(&message, &device), 0..share.len()),
            };
            if let Some(part) = part {
                sum = Some(add_range(sum, &part, range));
            }
        }
        sum
    }

    fn all_reduce(&self, sum: Option<Tensor<2>>, part: Option<Tensor<2>>) -> Option<Tensor<2>> {
        let (rank, count) = (self.rank, self.ranks());
        let known = part.as_ref().or(sum.as_ref());
        let device = known.map_or_else(Device::flex, Tensor::device);
        // A rank without a part learns from the others how long it would be; those with one have cut theirs already.
        let shares_of = |dims: [usize; 2]| -> Vec<Range<usize>> {
            let len = dims[0] * dims[1];
            (0..count).map(|rank| rank * len / count..(rank + 1) * len / count).collect()
        };
        let shares = known.map(|tensor| shares_of(tensor.dims()));
        let received = self.exchange(|to| {
            let share = |part: &Tensor<2>| message_of(part, shares.as_ref().map(|shares| shares[to].clone()));
            Arc::new(part.as_ref().map_or_else(|| message([0, 0], None), share))
        });
        let told = received.iter().flatten().map(head).find(|head| head[0] != ABSENT);
        let Some(dims) = known.map(Tensor::dims).or_else(|| told.map(|head| [head[1] as usize, head[2] as usize])) else { return sum };
        let shares = shares_of(dims);
        let mut own = sum.as_ref().map(|sum| cut(sum, shares[rank].clone()));
        let mut is_changed = false;
        for theirs in received {
            let (part, range) = match theirs {
                None => (part.clone(), shares[rank].clone()),
                Some(message) => (tensor_of(&message, &device), 0..shares[rank].len()),
            };
            if let Some(part) = part {
                own = Some(add_range(own, &part, range));
                is_changed = true;
            }
        }
        match own {
            Some(own) if is_changed => Some(join(&self.all_gather(own), dims, &device)),
            _ => sum,
        }
    }

    fn all_gather(&self, piece: Tensor<2>) -> Vec<Tensor<2>> {
        let message = Arc::new(message_of(&piece, None));
        let received = self.exchange(|_| message.clone());
        let device = piece.device();
        received
            .into_iter()
            .map(|theirs| theirs.and_then(|message| tensor_of(&message, &device)).unwrap_or_else(|| piece.clone()))
            .collect()
    }

    fn all_gather_values(&self, values: Vec<f64>) -> Vec<Vec<f64>> {
        let message = Arc::new(Message::of(&[bytemuck::cast_slice(&values)]));
        let received = self.exchange(|_| message.clone());
        let theirs =
            |message: Option<Message>| message.map_or_else(|| values.clone(), |message| bytemuck::cast_slice(message.bytes()).to_vec());
        received.into_iter().map(theirs).collect()
    }

    fn broadcast(&self, root: usize, value: Option<Tensor<2>>) -> Option<Tensor<2>> {
        let mine = value.filter(|_| self.rank == root);
        let device = mine.as_ref().map_or_else(Device::flex, Tensor::device);
        let outgoing = Arc::new(mine.as_ref().map_or_else(|| message([0, 0], None), |value| message_of(value, None)));
        let mut received = self.exchange(|_| outgoing.clone());
        match received.swap_remove(root) {
            None => mine,
            Some(message) => {
                let [_, rows, columns, _] = head(&message);
                Some(tensor_of(&message, &device)?.reshape([rows as usize, columns as usize]))
            }
        }
    }

    fn barrier(&self) {
        let nothing = Arc::new(Message::default());
        self.exchange(|_| nothing.clone());
    }

    fn abort(&self, why: &str) {
        self.line.wire.abort(self.line.channel.attempt, why, Duration::ZERO);
    }

    fn aborted(&self) -> Option<String> {
        self.line.wire.aborted(self.line.channel.attempt)
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use rlflow_api::{Processes, testing::wires};

    use super::*;
    use crate::{
        parameters::host,
        ranks::{by_shares::ByShares, in_process},
    };

    fn tensor(values: &[f32]) -> Tensor<2> {
        Tensor::from_data(TensorData::new(values.to_vec(), [1, values.len()]), &Device::flex())
    }

    fn on(ends: &[Arc<dyn Collective>], work: impl Fn(&dyn Collective) -> Vec<Option<Vec<f32>>> + Sync) -> Vec<Vec<Option<Vec<f32>>>> {
        thread::scope(|scope| {
            let threads: Vec<_> = ends.iter().map(|end| scope.spawn(|| work(end.as_ref()))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    /// Ranks in one process, by shares, in as many processes as ranks, and two in each of two: the same bits. Numbers that another order of
    /// adding would change, ranks without a part, uneven shares, bfloat16.
    #[test]
    fn processes_compute_what_threads_do() {
        let work = |end: &dyn Collective| {
            let rank = end.rank();
            let part =
                |seed: f32| tensor(&[1e8, -1e8, 0.3, 7e-4, 1.0 + seed, -3e5, seed].map(|value| value * [1.0, -1.0, 0.7, 0.1][rank] + seed));
            let shares = [0..1, 1..1, 1..4, 4..7];
            let narrow = part(0.3).cast(burn::tensor::FloatDType::BF16);
            let gathered = join(&end.all_gather(narrow), [4, 7], &Device::flex());
            let mut results = vec![
                end.all_reduce(None, Some(part(0.1))),
                // What is there before is the same on all ranks.
                end.all_reduce(Some(tensor(&[1e8, -1e8, 0.3, 7e-4, 1.0, -3e5, 0.5])), (rank != 2).then(|| part(0.2))),
                end.all_reduce(None, (rank == 3).then(|| part(0.2))),
                end.all_reduce(None, None),
                end.reduce_scatter(None, Some(part(0.1)), &shares),
                end.reduce_scatter(Some(cut(&part(0.5), shares[rank].clone())), rank.is_multiple_of(2).then(|| part(0.2)), &shares),
                end.reduce_scatter(None, None, &shares),
                end.broadcast(2, Some(part(0.4).reshape([7, 1]))),
                Some(gathered),
            ];
            end.barrier();
            results.extend(end.all_gather(tensor(&vec![rank as f32; rank])).into_iter().map(Some));
            let values = end.all_gather_values(vec![0.1; rank + 1]).concat();
            results.push(Some(tensor(&values.iter().map(|value| *value as f32).collect::<Vec<_>>())));
            results.iter().map(|result| result.as_ref().map(host)).collect()
        };
        let expected = on(&in_process(4), work);
        let by_shares: Vec<_> = in_process(4).into_iter().map(|end| Arc::new(ByShares(end)) as Arc<dyn Collective>).collect();
        assert_eq!(on(&by_shares, work), expected, "as between GPUs");
        for local in [1, 2] {
            let ends: Vec<_> =
                wires(4 / local).into_iter().flat_map(|wire| across(&Processes::joint(wire, 1).line().unwrap(), local)).collect();
            assert_eq!(on(&ends, work), expected, "{local} ranks in each process");
        }
    }

    #[test]
    fn a_rank_that_fails_ends_those_of_other_processes() {
        let ends: Vec<_> = wires(2).into_iter().flat_map(|wire| across(&Processes::joint(wire, 1).line().unwrap(), 1)).collect();
        let end = ends[1].clone();
        let waiting = thread::spawn(move || end.barrier());
        ends[0].abort("rank 0 failed: why not");
        assert!(waiting.join().is_err_and(|payload| payload.is::<Aborted>()));
        assert_eq!(ends[1].aborted().as_deref(), Some("rank 0 failed: why not"));
    }
}

use std::{
    ops::Range,
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    sync::{
        Arc,
        mpsc::{Receiver, Sender, channel},
    },
    thread,
};

use burn::tensor::Tensor;

use super::{Aborted, Collective, collective::Pending};

type Job = Box<dyn FnOnce(&dyn Collective) + Send>;

/// A rank's collectives on a thread of their own, in the order in which the rank asks for them, so that one can go on while
/// the rank computes ([`Collective::start_all_gather`]).
#[derive(Debug)]
pub(super) struct Ordered {
    inner: Arc<dyn Collective>,
    jobs: Sender<Job>,
}

impl Ordered {
    /// Around `inner`, which nobody else may call from now on. Without threads to be had, `inner` itself.
    pub(super) fn around(inner: Arc<dyn Collective>) -> Arc<dyn Collective> {
        let (jobs, queue) = channel::<Job>();
        let end = inner.clone();
        let work = move || queue.into_iter().for_each(|job| job(end.as_ref()));
        match thread::Builder::new().name(format!("rank {} exchange", inner.rank())).spawn(work) {
            Ok(_) => Arc::new(Self { inner, jobs }),
            Err(_) => inner,
        }
    }

    fn start<T: Send + 'static>(&self, work: impl FnOnce(&dyn Collective) -> T + Send + 'static) -> Receiver<thread::Result<T>> {
        let (answer, result) = channel();
        let job: Job = Box::new(move |inner| {
            // What unwinds here, goes on where it is waited for.
            let _ = answer.send(catch_unwind(AssertUnwindSafe(|| work(inner))));
        });
        let _ = self.jobs.send(job);
        result
    }

    fn call<T: Send + 'static>(&self, work: impl FnOnce(&dyn Collective) -> T + Send + 'static) -> T {
        answered(&self.start(work))
    }
}

/// What a thread that exchanges sent, or what it died of.
pub(super) fn answered<T>(result: &Receiver<thread::Result<T>>) -> T {
    match result.recv() {
        Ok(Ok(value)) => value,
        Ok(Err(payload)) => resume_unwind(payload),
        Err(_) => Aborted::unwind(),
    }
}

impl Collective for Ordered {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn ranks(&self) -> usize {
        self.inner.ranks()
    }

    fn reduce_scatter(&self, sum: Option<Tensor<2>>, part: Option<Tensor<2>>, shares: &[Range<usize>]) -> Option<Tensor<2>> {
        let shares = shares.to_vec();
        self.call(move |inner| inner.reduce_scatter(sum, part, &shares))
    }

    fn all_reduce(&self, sum: Option<Tensor<2>>, part: Option<Tensor<2>>) -> Option<Tensor<2>> {
        self.call(move |inner| inner.all_reduce(sum, part))
    }

    fn all_gather(&self, piece: Tensor<2>) -> Vec<Tensor<2>> {
        self.call(move |inner| inner.all_gather(piece))
    }

    fn start_all_gather(&self, piece: Tensor<2>) -> Pending {
        Pending::later(self.start(move |inner| inner.all_gather(piece)))
    }

    fn all_gather_values(&self, values: Vec<f64>) -> Vec<Vec<f64>> {
        self.call(move |inner| inner.all_gather_values(values))
    }

    fn broadcast(&self, root: usize, value: Option<Tensor<2>>) -> Option<Tensor<2>> {
        self.call(move |inner| inner.broadcast(root, value))
    }

    fn barrier(&self) {
        self.call(|inner| inner.barrier());
    }

    fn abort(&self, why: &str) {
        self.inner.abort(why);
    }

    fn aborted(&self) -> Option<String> {
        self.inner.aborted()
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::{Device, TensorData};

    use super::*;
    use crate::{parameters::host, ranks::in_process};

    /// A rank that has not come yet holds up nobody who only started: the work between is done before the answer is there.
    #[test]
    fn a_gather_goes_on_while_its_rank_works() {
        let ends: Vec<_> = in_process(2).into_iter().map(Ordered::around).collect();
        let piece = |value: f32| Tensor::<2>::from_data(TensorData::new(vec![value], [1, 1]), &Device::flex());
        let started = ends[0].start_all_gather(piece(1.0));
        // On this one thread, a call that waited would wait for ever.
        let other = ends[1].start_all_gather(piece(2.0));
        let values = |pieces: Vec<Tensor<2>>| pieces.iter().flat_map(host).collect::<Vec<f32>>();
        assert_eq!([values(started.wait()), values(other.wait())], [[1.0, 2.0], [1.0, 2.0]]);
    }

    #[test]
    fn an_abort_frees_who_waits() {
        let ends: Vec<_> = in_process(2).into_iter().map(Ordered::around).collect();
        let end = ends[0].clone();
        let waiting = thread::spawn(move || end.barrier());
        ends[1].abort("");
        assert!(waiting.join().is_err_and(|payload| payload.is::<Aborted>()));
    }
}

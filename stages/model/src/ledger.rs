//! Bytes that a rank holds on its device, by what they are for.
//!
//! Whoever keeps a buffer holds its bytes ([`hold`]) for as long as the buffer lives, in the ledger of the rank that its
//! thread works for. Counted are the buffers of models and their training that grow with the model or the batch; what a
//! kernel needs while it runs is told by its operation.

use std::{
    cell::RefCell,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use serde::Serialize;

/// What bytes are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Weights.
    Parameters,
    /// Sums of gradients over micro-batches.
    Gradients,
    /// Moments.
    Optimizer,
    /// What the forward pass keeps for the backward pass.
    Activations,
    /// All that lives shorter: weights that were gathered, gradients before they are added, chunks of logits, caches.
    Buffers,
}

/// Bytes by what they are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Bytes {
    /// Weights.
    pub parameters: u64,
    /// Sums of gradients over micro-batches.
    pub gradients: u64,
    /// Moments.
    pub optimizer: u64,
    /// What the forward pass keeps for the backward pass.
    pub activations: u64,
    /// All that lives shorter.
    pub buffers: u64,
}

impl Bytes {
    /// Sum of all.
    pub fn total(&self) -> u64 {
        self.parameters + self.gradients + self.optimizer + self.activations + self.buffers
    }

    /// Names and values.
    pub fn parts(&self) -> [(&'static str, u64); 5] {
        [
            ("parameters", self.parameters),
            ("gradients", self.gradients),
            ("optimizer", self.optimizer),
            ("activations", self.activations),
            ("buffers", self.buffers),
        ]
    }

    fn of(&mut self, purpose: Purpose) -> &mut u64 {
        match purpose {
            Purpose::Parameters => &mut self.parameters,
            Purpose::Gradients => &mut self.gradients,
            Purpose::Optimizer => &mut self.optimizer,
            Purpose::Activations => &mut self.activations,
            Purpose::Buffers => &mut self.buffers,
        }
    }
}

/// One rank's count.
#[derive(Debug, Default)]
pub struct Ledger(Mutex<Count>);

#[derive(Debug, Default, Clone, Copy)]
struct Count {
    now: Bytes,
    peak: Bytes,
}

thread_local! {
    static CURRENT: RefCell<Option<Arc<Ledger>>> = const { RefCell::new(None) };
}

impl Ledger {
    /// What is held now.
    pub fn now(&self) -> Bytes {
        self.count().now
    }

    /// What was held when it was most in all.
    pub fn peak(&self) -> Bytes {
        self.count().peak
    }

    /// Calls `work` with this as the ledger of the calling thread.
    pub fn during<T>(self: &Arc<Self>, work: impl FnOnce() -> T) -> T {
        /// Puts back what was there, whatever happens to `work`.
        struct Before(Option<Arc<Ledger>>);
        impl Drop for Before {
            fn drop(&mut self) {
                CURRENT.set(self.0.take());
            }
        }
        let _before = Before(CURRENT.replace(Some(self.clone())));
        work()
    }

    /// Holds `bytes` until what this returns is dropped.
    pub fn hold(self: &Arc<Self>, purpose: Purpose, bytes: u64) -> Held {
        let mut count = self.count();
        *count.now.of(purpose) += bytes;
        if count.now.total() > count.peak.total() {
            count.peak = count.now;
        }
        Held { ledger: self.clone(), purpose, bytes }
    }

    fn count(&self) -> MutexGuard<'_, Count> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Bytes that are held while this lives.
#[derive(Debug)]
pub struct Held {
    ledger: Arc<Ledger>,
    purpose: Purpose,
    bytes: u64,
}

impl Drop for Held {
    fn drop(&mut self) {
        *self.ledger.count().now.of(self.purpose) -= self.bytes;
    }
}

/// Holds `elements` f32 numbers in the ledger of the calling thread, if it has one.
pub fn hold(purpose: Purpose, elements: usize) -> Option<Held> {
    hold_bytes(purpose, 4 * elements)
}

/// Holds `bytes` in the ledger of the calling thread, if it has one.
pub fn hold_bytes(purpose: Purpose, bytes: usize) -> Option<Held> {
    CURRENT.with_borrow(|ledger| ledger.as_ref().map(|ledger| ledger.hold(purpose, bytes as u64)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peak_is_of_all_together() {
        let ledger = Arc::new(Ledger::default());
        let weights = ledger.hold(Purpose::Parameters, 100);
        ledger.during(|| {
            let activations = hold(Purpose::Activations, 10);
            drop(activations);
            let _buffers = hold(Purpose::Buffers, 20);
        });
        assert!(hold(Purpose::Buffers, 1).is_none(), "no rank works on this thread any more");
        drop(weights);
        assert_eq!(ledger.now(), Bytes::default());
        assert_eq!(ledger.peak(), Bytes { parameters: 100, buffers: 80, ..Bytes::default() });
    }
}

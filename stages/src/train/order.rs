use rlflow_api::CounterRng;

/// In which order rows are visited: each epoch a permutation of its own, drawn by counter, so that row `n` of a run is
/// the same whatever came before it in this process.
#[derive(Debug)]
pub struct RowOrder {
    seed: u64,
    purpose: &'static str,
    rows: usize,
    shuffle: bool,
    epoch: Option<(u64, Vec<u32>)>,
}

impl RowOrder {
    /// Over `rows` rows. `purpose` keeps stages that share a seed apart.
    pub fn new(seed: u64, purpose: &'static str, rows: usize, shuffle: bool) -> Self {
        Self { seed, purpose, rows, shuffle, epoch: None }
    }

    /// The row that the run visits as its `visit`th, counted from 0 over all epochs.
    pub fn row(&mut self, visit: u64) -> usize {
        let (epoch, at) = (visit / self.rows as u64, (visit % self.rows as u64) as usize);
        if !self.shuffle {
            return at;
        }
        let (seed, purpose, rows) = (self.seed, self.purpose, self.rows);
        if self.epoch.as_ref().is_none_or(|(known, _)| *known != epoch) {
            self.epoch = Some((epoch, CounterRng::new(seed, purpose, epoch, 0).permutation(rows)));
        }
        self.epoch.as_ref().map_or(at, |(_, order)| order[at] as usize)
    }

    /// Rows of the batch of step `step`, counted from 0.
    pub fn batch(&mut self, step: u64, batch_size: usize) -> Vec<usize> {
        (0..batch_size as u64).map(|at| self.row(step * batch_size as u64 + at)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_epoch_visits_every_row_once_in_an_order_of_its_own() {
        let mut order = RowOrder::new(1, "test", 10, true);
        let first: Vec<usize> = (0..10).map(|visit| order.row(visit)).collect();
        let second: Vec<usize> = (10..20).map(|visit| order.row(visit)).collect();
        assert_ne!(first, second);
        for epoch in [&first, &second] {
            let mut sorted = epoch.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..10).collect::<Vec<_>>());
        }
        // Going straight to a later visit gives what walking there gives.
        assert_eq!(RowOrder::new(1, "test", 10, true).row(17), second[7]);
        assert_eq!(RowOrder::new(1, "test", 10, false).batch(3, 4), [2, 3, 4, 5]);
    }
}

use serde::{Deserialize, Serialize};

/// Tokens of the rows of a data set.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct RowTokens {
    /// Of the longest.
    pub longest: f64,
    /// Mean.
    pub mean: f64,
    /// Standard deviation.
    pub deviation: f64,
}

impl RowTokens {
    /// Metrics under which kinds that make rows report these, in the order of the fields.
    pub const METRICS: [&str; 3] = ["longest_row", "mean_row", "row_deviation"];

    /// As metrics.
    pub fn metrics(&self) -> [(&'static str, f64); 3] {
        let [longest, mean, deviation] = Self::METRICS;
        [(longest, self.longest), (mean, self.mean), (deviation, self.deviation)]
    }

    /// From metrics. Results of earlier versions know the longest only.
    pub fn from_metrics(metric: impl Fn(&str) -> Option<f64>) -> Option<Self> {
        let longest = metric(Self::METRICS[0])?;
        Some(Self { longest, mean: metric(Self::METRICS[1]).unwrap_or(longest), deviation: metric(Self::METRICS[2]).unwrap_or(0.0) })
    }

    /// Tokens that `rows` rows take together, each cut to `limit`: of rows in an order that was drawn (`is_drawn`) what one group in tens of
    /// thousands passes, four standard deviations above the mean; else as if all were the longest.
    pub fn of_group(&self, rows: usize, limit: usize, is_drawn: bool) -> usize {
        let rows = rows as f64;
        let most = rows * self.longest.min(limit as f64);
        let likely = if is_drawn { rows * self.mean + 4.0 * self.deviation * rows.sqrt() } else { most };
        most.min(likely).ceil() as usize
    }
}

/// Lengths of rows as they are made.
#[derive(Debug, Clone, Copy, Default)]
pub struct RowLengths {
    rows: u64,
    sum: u64,
    squares: u128,
    longest: u64,
}

impl RowLengths {
    /// One more row.
    pub fn add(&mut self, tokens: u64) {
        self.rows += 1;
        self.sum += tokens;
        self.squares += u128::from(tokens) * u128::from(tokens);
        self.longest = self.longest.max(tokens);
    }

    /// Of all of them.
    pub fn tokens(&self) -> RowTokens {
        let count = self.rows.max(1) as f64;
        let mean = self.sum as f64 / count;
        RowTokens { longest: self.longest as f64, mean, deviation: (self.squares as f64 / count - mean * mean).max(0.0).sqrt() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows of 2, 4, 4 and 6 tokens: mean 4, variance 2.
    #[test]
    fn groups_of_rows_are_as_long_as_four_deviations_say() {
        let mut lengths = RowLengths::default();
        [2, 4, 4, 6].into_iter().for_each(|tokens| lengths.add(tokens));
        let rows = lengths.tokens();
        assert_eq!((rows.longest, rows.mean), (6.0, 4.0));
        assert!((rows.deviation - 2f64.sqrt()).abs() < 1e-12);
        // 400 + 4 * 10 * 1.41 = 456.6, and not 600.
        assert_eq!((rows.of_group(100, 10, true), rows.of_group(100, 10, false)), (457, 600));
        // No row is longer than the longest, or than the limit.
        assert_eq!((rows.of_group(1, 10, true), rows.of_group(1, 3, true)), (6, 3));
        assert_eq!(
            RowTokens::from_metrics(|name| rows.metrics().into_iter().find(|(known, _)| *known == name).map(|(_, value)| value)),
            Some(rows)
        );
        let longest_only = RowTokens::from_metrics(|name| (name == "longest_row").then_some(6.0)).unwrap();
        assert_eq!(longest_only.of_group(100, 10, true), 600);
    }
}

use rlflow_store::Hasher;

/// Random numbers from counters: what a draw gives depends on (seed, purpose, step, sample, index) and on nothing
/// else, so that resumed, extended, renamed and re-partitioned runs draw the same numbers.
///
/// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), keyed by a hash of the coordinates.
#[derive(Debug, Clone)]
pub struct CounterRng {
    key: [u32; 2],
    block: u64,
    words: [u32; 4],
    used: usize,
}

impl CounterRng {
    /// The stream of these coordinates. `purpose` names what is drawn, such as `pretrain/shuffle`.
    pub fn new(seed: u64, purpose: &str, step: u64, sample: u64) -> Self {
        let mut hasher = Hasher::new();
        hasher.update(&seed.to_le_bytes()).update(&step.to_le_bytes()).update(&sample.to_le_bytes()).update(purpose.as_bytes());
        let digest = hasher.finish();
        let word = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|byte| digest.as_bytes()[at + byte]));
        Self { key: [word(0), word(4)], block: 0, words: [0; 4], used: 4 }
    }

    /// The next 32 bits.
    pub fn next_u32(&mut self) -> u32 {
        if self.used == 4 {
            self.words = philox([self.block as u32, (self.block >> 32) as u32, 0, 0], self.key);
            self.block += 1;
            self.used = 0;
        }
        self.used += 1;
        self.words[self.used - 1]
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        u64::from(self.next_u32()) | u64::from(self.next_u32()) << 32
    }

    /// Uniform in `[0, 1)`, 53 bits.
    pub fn uniform(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }

    /// Uniform in `0..bound`, without bias. `bound` must not be 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        // Lemire's multiplication method (arXiv:1805.10941).
        let threshold = bound.wrapping_neg() % bound;
        loop {
            let product = u128::from(self.next_u64()) * u128::from(bound);
            if product as u64 >= threshold {
                return (product >> 64) as u64;
            }
        }
    }

    /// Standard normal (Box-Muller).
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }

    /// A permutation of `0..count` (Fisher-Yates).
    pub fn permutation(&mut self, count: usize) -> Vec<u32> {
        let mut order: Vec<u32> = (0..count as u32).collect();
        for last in (1..count).rev() {
            order.swap(last, self.below(last as u64 + 1) as usize);
        }
        order
    }
}

fn philox(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for round in 0..10 {
        if round > 0 {
            key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
        }
        let first = u64::from(counter[0]) * 0xD251_1F53;
        let second = u64::from(counter[2]) * 0xCD9E_8D57;
        counter = [(second >> 32) as u32 ^ counter[1] ^ key[0], second as u32, (first >> 32) as u32 ^ counter[3] ^ key[1], first as u32];
    }
    counter
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers from the authors' Random123 distribution (`kat_vectors`, philox4x32 10).
    #[test]
    fn philox_gives_the_published_vectors() {
        assert_eq!(philox([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        assert_eq!(
            philox([0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344], [0xa409_3822, 0x299f_31d0]),
            [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]
        );
    }

    #[test]
    fn draws_depend_on_every_coordinate_and_have_the_right_moments() {
        let first = |seed, purpose: &str, step, sample| CounterRng::new(seed, purpose, step, sample).next_u64();
        let base = first(1, "a", 2, 3);
        assert_eq!(base, first(1, "a", 2, 3));
        for other in [first(2, "a", 2, 3), first(1, "b", 2, 3), first(1, "a", 3, 3), first(1, "a", 2, 4)] {
            assert_ne!(base, other);
        }
        let mut rng = CounterRng::new(7, "moments", 0, 0);
        let draws: Vec<f64> = (0..100_000).map(|_| rng.normal()).collect();
        let mean = draws.iter().sum::<f64>() / 1e5;
        let variance = draws.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / 1e5;
        assert!(mean.abs() < 0.02 && (variance - 1.0).abs() < 0.03, "{mean} {variance}");
        let mut counts = [0u32; 7];
        (0..70_000).for_each(|_| counts[rng.below(7) as usize] += 1);
        assert!(counts.iter().all(|count| (9_500..10_500).contains(count)), "{counts:?}");
        let mut order = rng.permutation(1_000);
        order.sort_unstable();
        assert!(order.iter().enumerate().all(|(i, x)| i as u32 == *x));
    }
}

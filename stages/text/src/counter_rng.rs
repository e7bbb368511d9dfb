use rlflow_store::Hasher;

/// Philox4x32 with 10 rounds (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011): four random
/// words from a counter and a key, with no state between calls.
pub const fn philox4x32_10(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let [mut x0, mut x1, mut x2, mut x3] = counter;
    let [mut k0, mut k1] = key;
    let mut round = 0;
    while round < 10 {
        let p0 = 0xD251_1F53u64 * x0 as u64;
        let p1 = 0xCD9E_8D57u64 * x2 as u64;
        (x0, x1, x2, x3) = ((p1 >> 32) as u32 ^ x1 ^ k0, p1 as u32, (p0 >> 32) as u32 ^ x3 ^ k1, p0 as u32);
        (k0, k1) = (k0.wrapping_add(0x9E37_79B9), k1.wrapping_add(0xBB67_AE85));
        round += 1;
    }
    [x0, x1, x2, x3]
}

/// Random numbers by counter: what is drawn depends on the seed, what it is for, the step, the sample and the number
/// of the draw, and on nothing that was drawn before. A resumed, extended or re-partitioned run draws the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CounterRng {
    key: [u32; 2],
}

impl CounterRng {
    /// The numbers for `purpose` (`"corpus/mixture"`, `"ppo/rollout"`, ...) under `seed`.
    pub fn new(seed: u64, purpose: &str) -> Self {
        let digest = Hasher::new().update(b"rlflow counter rng 1\0").update(&seed.to_le_bytes()).update(purpose.as_bytes()).finish();
        let word = |at: usize| u32::from_le_bytes(digest.as_bytes()[at..at + 4].try_into().expect("a digest has 32 bytes"));
        Self { key: [word(0), word(4)] }
    }

    /// The four words at (step, sample, draw).
    pub const fn words(&self, step: u64, sample: u32, draw: u32) -> [u32; 4] {
        philox4x32_10([draw, sample, step as u32, (step >> 32) as u32], self.key)
    }

    /// A random 64-bit number.
    pub const fn next_u64(&self, step: u64, sample: u32, draw: u32) -> u64 {
        let [low, high, ..] = self.words(step, sample, draw);
        (high as u64) << 32 | low as u64
    }

    /// Uniform in [0, 1), 53 bits.
    pub const fn uniform(&self, step: u64, sample: u32, draw: u32) -> f64 {
        (self.next_u64(step, sample, draw) >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Uniform in `0..bound`, with a bias below `bound` / 2^64; 0 if `bound` is 0.
    pub const fn below(&self, bound: u64, step: u64, sample: u32, draw: u32) -> u64 {
        ((self.next_u64(step, sample, draw) as u128 * bound as u128) >> 64) as u64
    }

    /// Two independent standard normal numbers (Box-Muller).
    pub fn normal_pair(&self, step: u64, sample: u32, draw: u32) -> [f64; 2] {
        let [a, b, c, d] = self.words(step, sample, draw);
        let unit = |high: u32, low: u32| ((((high as u64) << 32 | low as u64) >> 11) as f64 + 0.5) / (1u64 << 53) as f64;
        let radius = (-2.0 * unit(a, b).ln()).sqrt();
        let (sin, cos) = (std::f64::consts::TAU * unit(c, d)).sin_cos();
        [radius * cos, radius * sin]
    }

    /// A random order of `0..len` for pass number `pass` (Fisher-Yates).
    pub fn permutation(&self, len: usize, pass: u64) -> Vec<u64> {
        let mut order: Vec<u64> = (0..len as u64).collect();
        for last in (1..len).rev() {
            let other = self.below(last as u64 + 1, pass, (last as u64 >> 32) as u32, last as u32);
            order.swap(last, other as usize);
        }
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers of Random123 1.14, `tests/kat_vectors`, lines `philox4x32 10`.
    #[test]
    fn known_answers() {
        assert_eq!(philox4x32_10([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox4x32_10([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        let pi = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
        assert_eq!(philox4x32_10(pi, [0xa409_3822, 0x299f_31d0]), [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]);
    }

    #[test]
    fn every_coordinate_and_the_purpose_matter() {
        let rng = CounterRng::new(7, "test");
        let base = rng.next_u64(1, 2, 3);
        let others = [
            rng.next_u64(2, 2, 3),
            rng.next_u64(1 + (1 << 32), 2, 3),
            rng.next_u64(1, 3, 3),
            rng.next_u64(1, 2, 4),
            CounterRng::new(8, "test").next_u64(1, 2, 3),
            CounterRng::new(7, "text").next_u64(1, 2, 3),
        ];
        assert!(others.iter().all(|other| *other != base));
        assert_eq!(base, CounterRng::new(7, "test").next_u64(1, 2, 3));
    }

    #[test]
    fn uniform_and_normal_have_their_moments() {
        let rng = CounterRng::new(1, "moments");
        let draws = 100_000u32;
        let mean = (0..draws).map(|draw| rng.uniform(0, 0, draw)).sum::<f64>() / f64::from(draws);
        assert!((mean - 0.5).abs() < 0.005, "{mean}");
        let normals: Vec<f64> = (0..draws).flat_map(|draw| rng.normal_pair(0, 0, draw)).collect();
        let mean = normals.iter().sum::<f64>() / normals.len() as f64;
        let variance = normals.iter().map(|x| x * x).sum::<f64>() / normals.len() as f64;
        assert!(mean.abs() < 0.015 && (variance - 1.0).abs() < 0.02, "{mean} {variance}");
    }

    #[test]
    fn permutations_hold_everything_once_and_differ_by_pass() {
        let rng = CounterRng::new(3, "order");
        let (first, second) = (rng.permutation(1000, 0), rng.permutation(1000, 1));
        let mut sorted = first.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..1000).collect::<Vec<_>>());
        assert_ne!(first, second);
        assert_eq!((rng.permutation(0, 0), rng.permutation(1, 0)), (vec![], vec![0]));
    }
}

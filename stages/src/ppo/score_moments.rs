use rlflow_api::{StageError, StageResult};

use super::config::{PpoConfig, ScoreNormalisation};

/// Moments of all scores so far, merged batch by batch (Chan, Golub and LeVeque, 1979).
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct ScoreMoments {
    count: f64,
    mean: f64,
    /// Sum of squared distances from the mean.
    squares: f64,
}

impl ScoreMoments {
    /// Takes in the scores of one step.
    pub fn update(&mut self, scores: &[f64]) {
        if scores.is_empty() {
            return;
        }
        let count = scores.len() as f64;
        let mean = crate::losses::mean(scores);
        let squares: f64 = scores.iter().map(|score| (score - mean).powi(2)).sum();
        let (total, distance) = (self.count + count, mean - self.mean);
        self.squares += squares + distance * distance * self.count * count / total;
        self.mean += distance * count / total;
        self.count = total;
    }

    /// Standard deviation with Bessel's correction; 1 while there is none.
    fn std(&self) -> f64 {
        let variance = if self.count > 1.0 { self.squares / (self.count - 1.0) } else { 0.0 };
        if variance > 0.0 { variance.sqrt() } else { 1.0 }
    }

    /// A score as it enters the reward, before the missing-EOS penalty.
    pub fn apply(&self, score: f64, config: &PpoConfig) -> f64 {
        let score = match config.score_normalisation {
            ScoreNormalisation::None => score,
            ScoreNormalisation::Scale => score / self.std(),
            ScoreNormalisation::Standardise => (score - self.mean) / self.std(),
        };
        config.score_clip.map_or(score, |bound| score.clamp(-bound, bound))
    }

    /// For a snapshot.
    pub fn to_bytes(self) -> Vec<u8> {
        [self.count, self.mean, self.squares].iter().flat_map(|value| value.to_le_bytes()).collect()
    }

    /// From a snapshot.
    ///
    /// # Errors
    /// If these are not such bytes.
    pub fn from_bytes(bytes: &[u8]) -> StageResult<Self> {
        let values: Vec<f64> = bytes.chunks_exact(8).map(|bytes| f64::from_le_bytes(bytes.try_into().unwrap_or_default())).collect();
        let [count, mean, squares] = values[..] else { return Err(StageError::invalid("snapshot without moments of scores")) };
        Ok(Self { count, mean, squares })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(settings: serde_json::Value) -> PpoConfig {
        let mut all = serde_json::json!({ "steps": 1 });
        all.as_object_mut().unwrap().extend(settings.as_object().unwrap().clone());
        serde_json::from_value(all).unwrap()
    }

    /// By hand: 1, 2, 3, 4, 10 have mean 4 and squared distances 9 + 4 + 1 + 0 + 36 = 50, so a variance of 12.5.
    #[test]
    fn moments_of_batches_are_those_of_all_scores() {
        let mut moments = ScoreMoments::default();
        moments.update(&[1.0, 2.0]);
        moments.update(&[]);
        moments.update(&[3.0, 4.0, 10.0]);
        let standardise = config(serde_json::json!({ "score_normalisation": "standardise" }));
        assert!((moments.apply(10.0, &standardise) - 6.0 / 12.5_f64.sqrt()).abs() < 1e-12);
        let clipped = config(serde_json::json!({ "score_normalisation": "scale", "score_clip": 1.5 }));
        assert!((moments.apply(5.0, &clipped) - 5.0 / 12.5_f64.sqrt()).abs() < 1e-12);
        assert_eq!(moments.apply(10.0, &clipped), 1.5);
        assert_eq!(moments.apply(-10.0, &clipped), -1.5);
        assert_eq!(ScoreMoments::from_bytes(&moments.to_bytes()).unwrap(), moments);
        assert!(ScoreMoments::from_bytes(&[0; 8]).is_err());
        // One score has no deviation, and equal ones none to divide by.
        let mut one = ScoreMoments::default();
        one.update(&[3.0]);
        assert_eq!(one.apply(3.0, &standardise), 0.0);
    }
}

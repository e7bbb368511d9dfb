//! Rotary position embedding (arXiv:2104.09864) in the half-split layout of Llama checkpoints.

use rayon::prelude::*;

/// How frequencies are scaled.
#[derive(Debug, Clone, Copy, PartialEq)]
#[allow(missing_docs)]
pub enum FrequencyScaling {
    /// All alike (arXiv:2306.15595).
    Linear { factor: f64 },
    /// As in Llama 3 checkpoints.
    Llama3 { factor: f64, low_freq_factor: f64, high_freq_factor: f64, original_context: f64 },
    /// YaRN (arXiv:2309.00071): frequencies that turn more than `beta_fast` times in the original context stay, those that turn less than
    /// `beta_slow` times are slowed, those between are blended; cosines and sines are multiplied by `attention_factor`.
    Yarn { factor: f64, attention_factor: f64, beta_fast: f64, beta_slow: f64, original_context: f64, truncate: bool },
}

/// Cosines and sines of every position.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeTable {
    half: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl RopeTable {
    /// For positions `0..context`, heads of width `head_dim` (even) and base `theta`.
    pub fn new(context: usize, head_dim: usize, theta: f64, scaling: Option<FrequencyScaling>) -> Self {
        let half = head_dim / 2;
        let frequencies: Vec<f32> = (0..half)
            .map(|i| {
                let frequency = theta.powf(-2.0 * i as f64 / head_dim as f64);
                scaling.map_or(frequency, |scaling| scaling.apply(frequency, i, head_dim, theta)) as f32
            })
            .collect();
        let factor = match scaling {
            Some(FrequencyScaling::Yarn { attention_factor, .. }) => attention_factor,
            _ => 1.0,
        };
        let (mut cos, mut sin) = (Vec::with_capacity(context * half), Vec::with_capacity(context * half));
        for position in 0..context {
            for frequency in &frequencies {
                // The angle is rounded to f32 as transformers does, so that logits agree at long positions.
                let angle = f64::from(position as f32 * frequency);
                cos.push((angle.cos() * factor) as f32);
                sin.push((angle.sin() * factor) as f32);
            }
        }
        Self { half, cos, sin }
    }

    /// Cosines and sines of each of `positions`, `[positions, head_dim / 2]` each.
    pub fn rows(&self, positions: &[u32]) -> (Vec<f32>, Vec<f32>) {
        let gather =
            |table: &[f32]| positions.iter().flat_map(|position| &table[*position as usize * self.half..][..self.half]).copied().collect();
        (gather(&self.cos), gather(&self.sin))
    }

    /// Rotates each head of each row by its position, in place; `inverse` turns back, which is the gradient.
    ///
    /// # Shapes
    /// - rows: `[tokens, heads * head_dim]`; positions: `[tokens]`
    pub fn rotate(&self, rows: &mut [f32], positions: &[u32], inverse: bool) {
        if positions.is_empty() {
            return;
        }
        let width = rows.len() / positions.len();
        let sign = if inverse { -1.0 } else { 1.0 };
        rows.par_chunks_mut(64 * width).zip(positions.par_chunks(64)).for_each(|(rows, positions)| {
            for (row, position) in rows.chunks_exact_mut(width).zip(positions) {
                self.rotate_row(row, *position as usize, sign);
            }
        });
    }

    fn rotate_row(&self, row: &mut [f32], position: usize, sign: f32) {
        let (cos, sin) = (&self.cos[position * self.half..][..self.half], &self.sin[position * self.half..][..self.half]);
        for head in row.chunks_exact_mut(2 * self.half) {
            let (first, second) = head.split_at_mut(self.half);
            for (((a, b), cos), sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
                let sin = sin * sign;
                (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
            }
        }
    }
}

impl FrequencyScaling {
    /// Of the pair `i` of a head.
    fn apply(self, frequency: f64, i: usize, head_dim: usize, theta: f64) -> f64 {
        let (factor, low_freq_factor, high_freq_factor, original_context) = match self {
            Self::Linear { factor } => return frequency / factor,
            Self::Yarn { factor, beta_fast, beta_slow, original_context, truncate, .. } => {
                // The pair that turns this often in the original context.
                let pair = |turns: f64| head_dim as f64 * (original_context / (turns * std::f64::consts::TAU)).ln() / (2.0 * theta.ln());
                let (low, high) = (pair(beta_fast), pair(beta_slow));
                let (low, high) = if truncate { (low.floor(), high.ceil()) } else { (low, high) };
                let (low, high) = (low.max(0.0), high.min(head_dim as f64 - 1.0));
                // As transformers has it, equal bounds are kept apart.
                let width = if low == high { 0.001 } else { high - low };
                let slowed = ((i as f64 - low) / width).clamp(0.0, 1.0);
                return frequency / factor * slowed + frequency * (1.0 - slowed);
            }
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                (factor, low_freq_factor, high_freq_factor, original_context)
            }
        };
        // High frequencies stay, low ones are slowed by `factor`, those between are blended.
        let wavelength = std::f64::consts::TAU / frequency;
        let (low, high) = (original_context / low_freq_factor, original_context / high_freq_factor);
        if wavelength < high {
            frequency
        } else if wavelength > low {
            frequency / factor
        } else {
            let smooth = (original_context / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
            (1.0 - smooth) * frequency / factor + smooth * frequency
        }
    }
}

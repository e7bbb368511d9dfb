use rlflow_api::CounterRng;

/// How often and how likely a source is passed.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct SourceShare {
    /// Documents in the source.
    pub documents: u64,
    /// Probability of drawing from it, relative to the others'.
    pub weight: Option<f64>,
    /// Most passes over it; fractions allowed.
    pub epochs: Option<f64>,
}

/// A document that was drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Draw {
    /// Number of the source.
    pub source: usize,
    /// Number of the document within it.
    pub document: u64,
}

/// The order in which documents of several sources are passed: an iterator of draws.
///
/// - No source has a `weight`: source after source, pass after pass, in the order of the files; `epochs` (default 1) may end
///   in part of a pass, which is then a random part.
/// - Weights: every draw picks a source with probability `weight` / sum of the weights of the sources that are not spent, and
///   takes its next document; each pass over a source has a random order of its own. A source is spent after `epochs` passes.
///   Sources without `epochs` are repeated until each of them was passed once (or, if `endless`, for ever); then drawing ends.
///
/// Draws are by counter: draw number i depends on the seed, i and what was drawn before only.
pub struct Mixture {
    sources: Vec<Source>,
    seed: u64,
    weighted: bool,
    endless: bool,
    draws: u64,
}

struct Source {
    share: SourceShare,
    /// Draws after which it is spent.
    quota: Option<u64>,
    drawn: u64,
    /// Order of the current pass; empty = as stored.
    order: Vec<u32>,
    seed: u64,
    index: u64,
}

impl Mixture {
    /// A mixture of `sources`. With `endless` it does not end while any source may be repeated: the caller stops it.
    pub fn new(sources: &[SourceShare], seed: u64, endless: bool) -> Self {
        let weighted = sources.iter().any(|share| share.weight.is_some());
        let source = |(index, share): (usize, &SourceShare)| {
            let epochs = share.epochs.or((!weighted).then_some(1.0));
            let quota = epochs.map(|epochs| (epochs * share.documents as f64).round() as u64);
            Source { share: *share, quota, drawn: 0, order: Vec::new(), seed, index: index as u64 }
        };
        let sources = sources.iter().enumerate().map(source).collect();
        Self { sources, seed, weighted, endless, draws: 0 }
    }

    fn pick(&self) -> Option<usize> {
        let mut live = self.sources.iter().enumerate().filter(|(_, source)| source.is_live());
        if !self.weighted {
            return live.next().map(|(index, _)| index);
        }
        let live: Vec<(usize, f64)> = live.map(|(index, source)| (index, source.share.weight.unwrap_or(0.0))).collect();
        let total: f64 = live.iter().map(|(_, weight)| weight).sum();
        if total <= 0.0 {
            return None;
        }
        let mut left = CounterRng::new(self.seed, "corpus/mixture", self.draws, 0).uniform() * total;
        for (index, weight) in &live {
            left -= weight;
            if left < 0.0 {
                return Some(*index);
            }
        }
        // Rounding may leave a rest above the last weight.
        live.iter().rev().find(|(_, weight)| *weight > 0.0).map(|(index, _)| *index)
    }

    fn is_over(&self) -> bool {
        let mut open = self.sources.iter().filter(|source| source.quota.is_none() && source.share.documents > 0).peekable();
        !self.endless && open.peek().is_some() && open.all(|source| source.drawn >= source.share.documents)
    }
}

impl Source {
    fn is_live(&self) -> bool {
        self.share.documents > 0 && self.quota.is_none_or(|quota| self.drawn < quota) && self.share.weight.is_none_or(|weight| weight > 0.0)
    }

    fn next(&mut self, weighted: bool) -> u64 {
        let documents = self.share.documents;
        let (pass, at) = (self.drawn / documents, self.drawn % documents);
        if at == 0 {
            let left = self.quota.map_or(documents, |quota| quota - self.drawn);
            let permutation = || CounterRng::new(self.seed, "corpus/order", pass, self.index).permutation(documents as usize);
            self.order = match weighted {
                true => permutation(),
                false if left >= documents => Vec::new(),
                false => {
                    let mut part = permutation();
                    part.truncate(left as usize);
                    part.sort_unstable();
                    part
                }
            };
        }
        self.drawn += 1;
        self.order.get(at as usize).map_or(at, |document| u64::from(*document))
    }
}

impl Iterator for Mixture {
    type Item = Draw;

    fn next(&mut self) -> Option<Draw> {
        if self.is_over() {
            return None;
        }
        let source = self.pick()?;
        self.draws += 1;
        Some(Draw { source, document: self.sources[source].next(self.weighted) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn share(documents: u64, weight: Option<f64>, epochs: Option<f64>) -> SourceShare {
        SourceShare { documents, weight, epochs }
    }

    fn counts(draws: &[Draw], source: usize, documents: u64) -> Vec<usize> {
        (0..documents).map(|document| draws.iter().filter(|draw| **draw == Draw { source, document }).count()).collect()
    }

    #[test]
    fn without_weights_every_document_once_in_order() {
        let draws: Vec<Draw> = Mixture::new(&[share(3, None, None), share(0, None, None), share(2, None, None)], 1, false).collect();
        let expected = [(0, 0), (0, 1), (0, 2), (2, 0), (2, 1)].map(|(source, document)| Draw { source, document });
        assert_eq!(draws, expected);
    }

    #[test]
    fn epochs_without_weights_repeat_and_end_in_part_of_a_pass() {
        let draws: Vec<Draw> = Mixture::new(&[share(10, None, Some(2.3)), share(4, None, Some(0.5))], 1, false).collect();
        assert_eq!(draws.len(), 23 + 2);
        let (first, second) = (counts(&draws, 0, 10), counts(&draws, 1, 4));
        assert_eq!((first.iter().filter(|count| **count == 3).count(), first.iter().filter(|count| **count == 2).count()), (3, 7));
        assert_eq!(second.iter().sum::<usize>(), 2);
        // The part of a pass is not simply its beginning, whatever the seed.
        let parts: std::collections::HashSet<Vec<usize>> =
            (0..20).map(|seed| counts(&Mixture::new(&[share(10, None, Some(0.3))], seed, false).collect::<Vec<_>>(), 0, 10)).collect();
        assert!(parts.len() > 10);
    }

    #[test]
    fn weights_are_probabilities_and_caps_renormalise() {
        // 0.6 : 0.4, both to be passed many times: shares within four standard deviations of 10,000 draws.
        let sources = [share(50, Some(3.0), None), share(50, Some(2.0), None)];
        let draws: Vec<Draw> = Mixture::new(&sources, 7, true).take(10_000).collect();
        let first = draws.iter().filter(|draw| draw.source == 0).count() as f64 / 10_000.0;
        assert!((first - 0.6).abs() < 4.0 * (0.24f64 / 10_000.0).sqrt(), "{first}");

        // A capped source is passed 3.4 times and no more; the open one exactly until it was passed once.
        let sources = [share(1000, Some(0.5), None), share(10, Some(0.5), Some(3.4))];
        let draws: Vec<Draw> = Mixture::new(&sources, 7, false).collect();
        assert_eq!(draws.len(), 1000 + 34);
        assert!(counts(&draws, 0, 1000).iter().all(|count| *count == 1));
        assert!(counts(&draws, 1, 10).iter().all(|count| (3..=4).contains(count)));
        // After the cap everything comes from the open source.
        assert!(draws[200..].iter().all(|draw| draw.source == 0));
    }

    #[test]
    fn all_open_sources_are_passed_at_least_once() {
        let sources = [share(10, Some(1.0), None), share(200, Some(1.0), None)];
        let draws: Vec<Draw> = Mixture::new(&sources, 3, false).collect();
        assert!(counts(&draws, 1, 200).iter().all(|count| *count == 1));
        let repeated = counts(&draws, 0, 10);
        let (least, most) = (repeated.iter().min().unwrap(), repeated.iter().max().unwrap());
        assert!(*least >= 10 && most - least <= 1, "each pass takes every document: {repeated:?}");
    }

    #[test]
    fn draws_depend_on_the_seed_only() {
        let sources = [share(20, Some(1.0), Some(2.0)), share(30, Some(2.0), Some(1.5))];
        let draw = |seed| Mixture::new(&sources, seed, false).collect::<Vec<_>>();
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
        assert_eq!(draw(1).len(), 40 + 45);
    }

    #[test]
    fn nothing_to_draw_ends_at_once() {
        assert_eq!(Mixture::new(&[], 1, true).next(), None);
        assert_eq!(Mixture::new(&[share(0, Some(1.0), None)], 1, true).next(), None);
        assert_eq!(Mixture::new(&[share(5, Some(0.0), None)], 1, true).next(), None);
    }
}

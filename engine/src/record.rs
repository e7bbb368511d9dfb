use std::{
    collections::BTreeMap,
    panic::resume_unwind,
    sync::{Mutex, MutexGuard},
    time::Instant,
};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use rlflow_api::{Reporter, Sample, StageError, StageEvent, Table};
use rlflow_store::{ActionRecord, Digest, Store};

use crate::{
    Result,
    event::{Event, Events},
    workflow::Workflow,
};

/// Metric name to its (step, value) points.
pub type Series = BTreeMap<String, Vec<(u64, f64)>>;

/// What a stage reported that belongs to its result: equal however often it was interrupted.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct StageRecord {
    /// Metrics.
    pub series: Series,
    /// Sampled texts.
    pub samples: Vec<Sample>,
    /// Tables.
    pub tables: Vec<Table>,
    /// Anything else, by name.
    pub values: BTreeMap<String, Value>,
    /// Parts that were kept and cannot be read any more: lost, or damaged. They are empty.
    #[serde(skip)]
    pub missing: Vec<&'static str>,
}

/// Names of the blobs under which an action keeps its record.
pub mod names {
    /// `{"loss": [[step, value], ...]}`.
    pub const SERIES: &str = "series";
    /// One sample per line.
    pub const SAMPLES: &str = "samples";
    /// A list of tables.
    pub const TABLES: &str = "tables";
    /// An object of everything else.
    pub const VALUES: &str = "values";
}

impl StageRecord {
    /// The last value of every metric.
    pub fn final_metrics(&self) -> BTreeMap<String, f64> {
        self.series.iter().filter_map(|(name, points)| Some((name.clone(), points.last()?.1))).collect()
    }

    /// Stores the record's parts as blobs, by name. Empty parts are left out.
    pub fn store(&self, store: &Store) -> Result<BTreeMap<String, Digest>> {
        let json = |value: &dyn Fn() -> serde_json::Result<Vec<u8>>| value().unwrap_or_default();
        let mut samples = Vec::new();
        for sample in &self.samples {
            samples.extend(json(&|| serde_json::to_vec(sample)));
            samples.push(b'\n');
        }
        let parts = [
            (names::SERIES, self.series.is_empty(), json(&|| serde_json::to_vec(&self.series))),
            (names::SAMPLES, self.samples.is_empty(), samples),
            (names::TABLES, self.tables.is_empty(), json(&|| serde_json::to_vec(&self.tables))),
            (names::VALUES, self.values.is_empty(), json(&|| serde_json::to_vec(&self.values))),
        ];
        let parts = parts.into_iter().filter(|(_, is_empty, _)| !is_empty);
        parts.map(|(name, _, content)| Ok((name.to_owned(), store.put_blob(&content)?))).collect()
    }

    /// Reads what [`StageRecord::store`] wrote for `action`. Losing a part of it costs no result, so that is said and no error.
    pub fn load(store: &Store, action: &ActionRecord) -> Self {
        let mut missing = Vec::new();
        let mut record = Self {
            series: part(store, action, names::SERIES, &mut missing, |bytes| serde_json::from_slice(bytes)),
            samples: part(store, action, names::SAMPLES, &mut missing, |bytes| {
                bytes.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).map(serde_json::from_slice).collect()
            }),
            tables: part(store, action, names::TABLES, &mut missing, |bytes| serde_json::from_slice(bytes)),
            values: part(store, action, names::VALUES, &mut missing, |bytes| serde_json::from_slice(bytes)),
            missing: Vec::new(),
        };
        record.missing = missing;
        record
    }
}

/// One part of a record; empty, and noted in `missing`, if it was kept and cannot be read.
fn part<T: Default>(
    store: &Store,
    action: &ActionRecord,
    name: &'static str,
    missing: &mut Vec<&'static str>,
    parse: impl FnOnce(&[u8]) -> serde_json::Result<T>,
) -> T {
    let Some(digest) = action.records.get(name) else { return T::default() };
    let why = match store.blob(*digest) {
        Ok(Some(blob)) => match parse(&blob) {
            Ok(part) => return part,
            Err(error) => error.to_string(),
        },
        Ok(None) => format!("blob {digest} is missing"),
        Err(error) => error.to_string(),
    };
    tracing::warn!(stage = action.provenance.stage, "the {name} of a result cannot be read: {why}");
    missing.push(name);
    T::default()
}

/// What snapshots keep of a stage's record.
#[derive(Serialize, Deserialize)]
struct Kept {
    record: StageRecord,
    /// Time spent so far, over all sessions.
    seconds: f64,
    /// Numerics profiles that the work so far was done under, each once, with [`THEN`] between them.
    numerics: String,
}

/// Between numerics profiles.
const THEN: &str = " then ";

/// What to say of parts of `stage`'s record that cannot be read. `None` if there are none.
pub fn missing_text(workflow: &Workflow, stage: &str, missing: &[&str]) -> Option<String> {
    let (parts, file) = (missing.join(", "), workflow.path.display());
    (!missing.is_empty()).then(|| format!("lost or damaged: {parts} (`rlflow run {file} --force {stage}` makes it again)"))
}

/// Keeps a running stage's record and passes its events on.
pub struct StageReporter<'a> {
    stage: &'a str,
    events: &'a Events,
    numerics: &'a str,
    started: Instant,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    record: StageRecord,
    measurements: BTreeMap<String, f64>,
    seconds_before: f64,
    resumed_numerics: Option<String>,
    resumed: Option<Continued>,
    last_snapshot: Option<u64>,
    not_finite: Option<(u64, String, f64)>,
    phase: Option<String>,
}

/// How a stage continued.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Continued {
    /// Steps done before.
    pub step: u64,
    /// From a finished, shorter run rather than an interruption.
    pub extended: bool,
}

/// What a stage's reporter has at its end.
#[derive(Debug)]
pub struct Reported {
    /// The record.
    pub record: StageRecord,
    /// Measured values.
    pub measurements: BTreeMap<String, f64>,
    /// Time over all sessions.
    pub seconds: f64,
    /// How it continued, if it did.
    pub continued: Option<Continued>,
    /// The numerics profiles of all sessions before, where they are not all today's.
    pub other_numerics: Option<String>,
}

/// Unwinds a stage at the metric that is not finite. Never reaches the panic hook.
struct NotFinite;

impl<'a> StageReporter<'a> {
    /// For `stage`, passing events to `events`.
    pub fn new(stage: &'a str, events: &'a Events, numerics: &'a str) -> Self {
        Self { stage, events, numerics, started: Instant::now(), state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// The failure, if a metric was not finite.
    pub fn not_finite(&self) -> Option<StageError> {
        let state = self.state();
        let (step, tensor, value) = state.not_finite.clone()?;
        Some(StageError::NonFinite { step, tensor, value: value as f32, last_snapshot: state.last_snapshot })
    }

    /// What the stage was doing last.
    pub fn phase(&self) -> Option<String> {
        self.state().phase.clone()
    }

    /// Everything that was reported.
    pub fn finish(self) -> Reported {
        let state = self.state.into_inner().unwrap_or_else(|poisoned| poisoned.into_inner());
        Reported {
            record: state.record,
            measurements: state.measurements,
            seconds: state.seconds_before + self.started.elapsed().as_secs_f64(),
            continued: state.resumed,
            other_numerics: state.resumed_numerics,
        }
    }
}

impl Reporter for StageReporter<'_> {
    /// A metric that is not finite ends the stage here and now, by unwinding: going on would cost hours and
    /// overwrite the last good snapshot.
    fn report(&self, event: StageEvent) {
        let mut state = self.state();
        match &event {
            StageEvent::Metrics { step, values } => {
                let wrong = values.iter().find(|(_, value)| !value.is_finite());
                if let Some((name, value)) = wrong {
                    state.not_finite = Some((*step, name.clone(), *value));
                }
                for (name, value) in values.iter().filter(|(_, value)| value.is_finite()) {
                    match state.record.series.get_mut(name) {
                        Some(points) => points.push((*step, *value)),
                        None => _ = state.record.series.insert(name.clone(), vec![(*step, *value)]),
                    }
                }
            }
            StageEvent::Measurement { name, value } if value.is_finite() => _ = state.measurements.insert(name.clone(), *value),
            StageEvent::Sample(sample) => state.record.samples.push(sample.clone()),
            StageEvent::Table(table) => state.record.tables.push(table.clone()),
            StageEvent::Record { name, value } => _ = state.record.values.insert(name.clone(), value.clone()),
            StageEvent::Phase { name } => state.phase = Some(name.clone()),
            StageEvent::Snapshot { step } => state.last_snapshot = Some(*step),
            StageEvent::Resumed { step, extended } => {
                state.last_snapshot = Some(*step);
                state.resumed = Some(Continued { step: *step, extended: *extended });
            }
            _ => {}
        }
        let stop = state.not_finite.is_some();
        drop(state);
        self.events.emit(&Event::Stage { stage: self.stage.to_owned(), event });
        if stop {
            resume_unwind(Box::new(NotFinite));
        }
    }

    fn record(&self) -> Vec<u8> {
        let state = self.state();
        let seconds = state.seconds_before + self.started.elapsed().as_secs_f64();
        // All of them: a session under the first again must not look as if there had been no other.
        let numerics = match &state.resumed_numerics {
            None => self.numerics.to_owned(),
            Some(before) if before.split(THEN).any(|profile| profile == self.numerics) => before.clone(),
            Some(before) => format!("{before}{THEN}{}", self.numerics),
        };
        serde_json::to_vec(&Kept { record: state.record.clone(), seconds, numerics }).unwrap_or_default()
    }

    fn restore(&self, record: &[u8]) {
        let Ok(kept) = serde_json::from_slice::<Kept>(record) else {
            tracing::warn!(stage = self.stage, "the snapshot's record of metrics cannot be read; the series starts here");
            return;
        };
        let mut state = self.state();
        state.record = kept.record;
        state.seconds_before = kept.seconds;
        if kept.numerics != self.numerics {
            state.resumed_numerics = Some(kept.numerics.clone());
            drop(state);
            let text = format!(
                "the snapshot was made under numerics profile `{}` and continues under `{}`: the result may differ in rounding from a run on one machine",
                kept.numerics, self.numerics
            );
            self.events.emit(&Event::Stage { stage: self.stage.to_owned(), event: StageEvent::Warning { text } });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;

    fn metrics(step: u64, loss: f64) -> StageEvent {
        StageEvent::Metrics { step, values: vec![("loss".into(), loss)] }
    }

    #[test]
    fn a_restored_reporter_ends_like_an_uninterrupted_one() {
        let events = Events::default();
        let sample = Sample { step: 1, prompt: "p".into(), response: "r".into(), scores: vec![("score".into(), 0.1)] };
        let whole = StageReporter::new("sft", &events, "n");
        whole.report(metrics(1, 0.1 + 0.2));
        whole.report(StageEvent::Sample(sample.clone()));
        let kept = whole.record();
        let second = StageReporter::new("sft", &events, "n");
        second.report(metrics(1, 9.0));
        second.restore(&kept);
        for reporter in [&whole, &second] {
            reporter.report(metrics(2, 1.0 / 3.0));
        }
        let (whole, second) = (whole.finish(), second.finish());
        assert_eq!(whole.record, second.record);
        assert_eq!(second.record.final_metrics()["loss"], 1.0 / 3.0);
        assert_eq!(second.other_numerics, None);
    }

    #[test]
    fn another_numerics_profile_is_marked() {
        let events = Events::default();
        let kept = StageReporter::new("sft", &events, "avx512").record();
        let second = StageReporter::new("sft", &events, "avx2");
        second.restore(&kept);
        let kept = second.record();
        assert_eq!(second.finish().other_numerics.as_deref(), Some("avx512"));
        // Back where it began, it was elsewhere all the same.
        let third = StageReporter::new("sft", &events, "avx512");
        third.restore(&kept);
        assert_eq!(serde_json::from_slice::<Kept>(&third.record()).unwrap().numerics, "avx512 then avx2");
        assert_eq!(third.finish().other_numerics.as_deref(), Some("avx512 then avx2"));
    }

    #[test]
    fn a_metric_that_is_not_finite_stops_the_stage_at_once() {
        let events = Events::default();
        let reporter = StageReporter::new("sft", &events, "n");
        reporter.report(metrics(1, 0.5));
        reporter.report(StageEvent::Snapshot { step: 1 });
        let stopped = catch_unwind(AssertUnwindSafe(|| reporter.report(metrics(2, f64::NAN))));
        assert!(stopped.is_err());
        let error = reporter.not_finite().unwrap();
        assert_eq!(error.to_string(), "step 2: loss is not finite (NaN); the last good snapshot is of step 1");
        assert_eq!(reporter.finish().record.series["loss"], [(1, 0.5)]);
    }
}

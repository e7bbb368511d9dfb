use std::{
    collections::BTreeMap,
    io::{IsTerminal, Write},
    time::Duration,
};

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use rlflow_api::StageEvent;
use rlflow_engine::{
    event::{Event, Sink, StageOutcome, StageStatus},
    text, thousands,
};

use crate::terminal::visible;

/// Seconds between two progress lines of a stage where there is no terminal.
const LINE_SECONDS: f64 = 10.0;

/// Bars on a terminal, lines elsewhere; on stderr.
pub fn sink(verbose: bool) -> Box<dyn Sink> {
    if std::io::stderr().is_terminal() {
        Box::new(Bars { bars: MultiProgress::new(), running: BTreeMap::new(), verbose })
    } else {
        Box::new(Lines { last: BTreeMap::new(), metrics: BTreeMap::new(), verbose })
    }
}

/// The line that an event is worth, bars or not.
fn line(event: &Event, verbose: bool) -> Option<String> {
    Some(match event {
        Event::Cached { stage, waited: true, .. } => format!("{stage}: made by the other run"),
        Event::Cached { stage, waited: false, .. } if verbose => format!("{stage}: cached"),
        Event::Waiting { stage, holder } => {
            format!("{stage}: waiting for process {} on {}, which is running it (run {})", holder.pid, holder.host, holder.run_id)
        }
        Event::StageStarted { stage, rerun, continues_from_step, .. } => match continues_from_step {
            Some(step) => format!("{stage}: continues from step {} ({})", thousands(*step), rerun.text()),
            None => format!("{stage}: running ({})", rerun.text()),
        },
        Event::Stage { stage, event } => match event {
            StageEvent::Note { text } => format!("{stage}: {text}"),
            StageEvent::Warning { text } => format!("{stage}: warning: {text}"),
            StageEvent::Phase { name } if verbose => format!("{stage}: {name}"),
            StageEvent::Snapshot { step } if verbose => format!("{stage}: snapshot at step {}", thousands(*step)),
            _ => return None,
        },
        Event::StageFinished(outcome) => ended(outcome)?,
        _ => return None,
    })
}

fn ended(outcome: &StageOutcome) -> Option<String> {
    let name = &outcome.name;
    Some(match outcome.status {
        StageStatus::Failed if outcome.was_interrupted() => format!("{name}: interrupted"),
        StageStatus::Failed => format!("{name}: failed: {}", outcome.error.as_deref().unwrap_or("no message")),
        StageStatus::Skipped | StageStatus::Cached => return None,
        _ => {
            let same = if outcome.same_output { ", same output as before" } else { "" };
            format!("{name}: done in {}{same}", text::seconds(outcome.seconds))
        }
    })
}

fn rate(tokens_per_s: Option<f64>) -> String {
    tokens_per_s.map(|rate| format!("{} tokens/s", text::number(rate.round()))).unwrap_or_default()
}

/// The first two metrics of a step.
fn first_metrics(values: &[(String, f64)]) -> String {
    values.iter().take(2).map(|(name, value)| format!("{name} {}", text::number(*value))).collect::<Vec<_>>().join("  ")
}

struct Lines {
    /// Per stage and unit (a stage may count documents first and steps then): time of the last line, and of the first
    /// progress with how much was done then.
    last: BTreeMap<(String, String), (f64, f64, u64)>,
    metrics: BTreeMap<String, String>,
    verbose: bool,
}

impl Lines {
    fn progress(&mut self, time: f64, stage: &str, event: &StageEvent) -> Option<String> {
        let StageEvent::Progress { done, total, unit, tokens_per_s, detail, .. } = event else { return None };
        let (last, began, done_then) = self.last.entry((stage.to_owned(), unit.clone())).or_insert((time, time, *done));
        if time - *last < LINE_SECONDS {
            return None;
        }
        *last = time;
        let elapsed = time - *began;
        let per_unit = elapsed / done.saturating_sub(*done_then).max(1) as f64;
        let left = text::seconds(per_unit * total.saturating_sub(*done) as f64);
        let parts = [
            format!("{unit} {}/{}", thousands(*done), thousands(*total)),
            if detail.is_empty() { self.metrics.get(stage).cloned().unwrap_or_default() } else { detail.clone() },
            rate(*tokens_per_s),
            format!("about {left} left"),
        ];
        let parts: Vec<String> = parts.into_iter().filter(|part| !part.is_empty()).collect();
        Some(format!("{stage}: {}", parts.join("  ")))
    }
}

impl Sink for Lines {
    fn event(&mut self, time: f64, event: &Event) {
        let text = match event {
            Event::Stage { stage, event: event @ StageEvent::Progress { .. } } => self.progress(time, stage, event),
            Event::Stage { stage, event: StageEvent::Metrics { values, .. } } => {
                self.metrics.insert(stage.clone(), first_metrics(values));
                None
            }
            event => line(event, self.verbose),
        };
        if let Some(text) = text {
            let _ = writeln!(std::io::stderr(), "{}", visible(&text));
        }
    }
}

struct Bars {
    bars: MultiProgress,
    running: BTreeMap<String, Bar>,
    verbose: bool,
}

struct Bar {
    bar: ProgressBar,
    metrics: String,
    phase: String,
}

impl Bars {
    fn start(&mut self, stage: &str) {
        let bar = self.bars.add(ProgressBar::new_spinner());
        if let Ok(style) = ProgressStyle::with_template("{spinner} {prefix:<14} {elapsed:>4}  {wide_msg}") {
            bar.set_style(style);
        }
        bar.set_prefix(stage.to_owned());
        bar.enable_steady_tick(Duration::from_millis(120));
        self.running.insert(stage.to_owned(), Bar { bar, metrics: String::new(), phase: String::new() });
    }

    fn update(&mut self, stage: &str, event: &StageEvent) {
        let Some(bar) = self.running.get_mut(stage) else { return };
        match event {
            StageEvent::Phase { name } => {
                bar.phase = name.clone();
                bar.bar.set_message(name.clone());
            }
            StageEvent::Metrics { values, .. } => bar.metrics = first_metrics(values),
            StageEvent::Progress { done, total, unit, tokens_per_s, detail, .. } => {
                if bar.bar.length() != Some(*total) {
                    let template = "{spinner} {prefix:<14} {elapsed:>4} [{bar:24}] {pos}/{len} {msg}  ETA {eta}";
                    if let Ok(style) = ProgressStyle::with_template(template) {
                        bar.bar.set_style(style.progress_chars("=> "));
                    }
                    bar.bar.set_length(*total);
                    // A resumed stage begins in the middle: what was done before says nothing about speed.
                    bar.bar.set_position(*done);
                    bar.bar.reset_eta();
                }
                bar.bar.set_position(*done);
                let parts = [unit.clone(), detail.clone(), bar.metrics.clone(), rate(*tokens_per_s)];
                let parts: Vec<String> = parts.into_iter().filter(|part| !part.is_empty()).collect();
                bar.bar.set_message(visible(&parts.join("  ")).into_owned());
            }
            _ => {}
        }
    }
}

impl Sink for Bars {
    fn event(&mut self, _time: f64, event: &Event) {
        match event {
            Event::StageStarted { stage, .. } => self.start(stage),
            Event::Stage { stage, event } => self.update(stage, event),
            Event::StageFinished(outcome) => {
                if let Some(bar) = self.running.remove(&outcome.name) {
                    bar.bar.finish_and_clear();
                }
            }
            Event::Finished { .. } => {
                let _ = self.bars.clear();
            }
            _ => {}
        }
        if let Some(text) = line(event, self.verbose) {
            let _ = self.bars.println(visible(&text));
        }
    }
}

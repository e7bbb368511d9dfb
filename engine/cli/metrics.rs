use clap::Args;

use rlflow_engine::{metrics, record::missing_text, text, thousands};

use crate::{
    common::{Common, WorkflowArgs},
    failure::{Failure, Outcome, print_line, print_text},
    host::host,
};

/// Logged series and final numbers
#[derive(Args)]
pub struct Metrics {
    #[command(flatten)]
    pub workflow: WorkflowArgs,
    /// Only these stages
    #[arg(value_name = "STAGE")]
    pub stages: Vec<String>,
}

impl Metrics {
    pub fn run(self, common: &Common) -> Result<Outcome, Failure> {
        let (workflow, store) = self.workflow.look(common)?;
        let all = metrics::metrics(&workflow, &store, &host(), &self.stages)?;
        if common.json {
            print_line(&metrics::to_json(&workflow, &all).to_string());
            return Ok(Outcome::Done);
        }
        if all.is_empty() {
            print_text("nothing has run yet\n");
        }
        for stage in &all {
            let name = &workflow.stages[stage.stage].name;
            let of_what = match &stage.unfinished {
                Some(attempt) if attempt.ended => {
                    format!(" (no result yet: ended at step {} of run {})", thousands(attempt.step), attempt.run_id)
                }
                Some(attempt) => format!(" (no result yet: step {} of run {})", thousands(attempt.step), attempt.run_id),
                None if stage.stale => " (of an older result)".to_owned(),
                None => String::new(),
            };
            print_text(&format!("{name}{of_what}\n"));
            if let Some(missing) = missing_text(&workflow, name, &stage.missing) {
                print_text(&format!("  {missing}\n"));
            }
            let documented = workflow.stages[stage.stage].kind.metrics();
            let rows: Vec<Vec<String>> = stage
                .finals()
                .iter()
                .map(|(metric, last)| {
                    let points = stage.series.get(metric).map_or(&[][..], Vec::as_slice);
                    let first = points.first().filter(|_| points.len() > 1).map(|point| text::number(point.1)).unwrap_or_default();
                    let curve = sparkline(points, 32);
                    let about = documented.iter().find(|(name, _)| name == metric).map_or("", |(_, about)| about);
                    vec![format!("  {metric}"), first, text::number(*last), curve, about.to_owned()]
                })
                .collect();
            print_text(&format!("{}\n", text::table(&["  metric", "first", "last", "curve", ""], &rows)));
        }
        Ok(Outcome::Done)
    }
}

/// A curve in at most `columns` characters.
fn sparkline(points: &[(u64, f64)], columns: usize) -> String {
    const LEVELS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    if points.len() < 2 {
        return String::new();
    }
    let columns = columns.min(points.len());
    let values: Vec<f64> = (0..columns)
        .map(|at| {
            let (from, to) = (at * points.len() / columns, ((at + 1) * points.len() / columns).max(at * points.len() / columns + 1));
            let bucket = &points[from..to];
            bucket.iter().map(|point| point.1).sum::<f64>() / bucket.len() as f64
        })
        .collect();
    let (low, high) = values.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(*value), high.max(*value)));
    let level = |value: f64| if high > low { ((value - low) / (high - low) * 7.0).round() as usize } else { 0 };
    values.into_iter().map(|value| LEVELS[level(value).min(7)]).collect()
}

#[cfg(test)]
mod tests {
    use super::sparkline;

    #[test]
    fn a_curve_fits_its_columns_and_keeps_its_ends() {
        let points: Vec<(u64, f64)> = (0..100).map(|step| (step, -(step as f64))).collect();
        let curve = sparkline(&points, 10);
        assert_eq!((curve.chars().count(), curve.chars().next(), curve.chars().last()), (10, Some('█'), Some('▁')));
        assert_eq!(sparkline(&[(1, 2.0)], 10), "");
        assert_eq!(sparkline(&[(1, 2.0), (2, 2.0)], 10), "▁▁");
    }
}

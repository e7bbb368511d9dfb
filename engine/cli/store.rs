//! Commands on the store itself: `gc`, `fsck`, `du`, `pin`, `unpin`.

use std::time::Duration;

use clap::Args;
use serde_json::json;

use rlflow_engine::{
    text,
    workflow::{LoadOptions, load},
};
use rlflow_store::{Digest, GcOptions, Store};

use crate::{
    artifact,
    common::{Common, registry},
    failure::{Failure, Outcome, print_line, print_text},
};

/// The store that a command works on.
#[derive(Args)]
pub struct StoreArgs {
    /// A workflow file, to find its store [default: --store, or .rlflow here]
    #[arg(value_name = "WORKFLOW")]
    pub workflow: Option<std::path::PathBuf>,
}

impl StoreArgs {
    fn open(&self, common: &Common) -> Result<Store, Failure> {
        match &self.workflow {
            Some(file) if !file.is_file() => {
                Err(Failure::request("missing_file", format!("there is no file `{}`", file.display()), "name a workflow file"))
            }
            Some(file) => common.store_of_file(file),
            None => common.store_here(),
        }
    }
}

/// Remove what no pin, no workflow in use and no recent run reaches
#[derive(Args)]
pub struct Gc {
    #[command(flatten)]
    pub store: StoreArgs,
    /// Only say what would be removed
    #[arg(long)]
    pub dry_run: bool,
    /// Last different states kept of each workflow
    #[arg(long, default_value_t = 1)]
    pub keep_last: usize,
    /// Remove results, oldest first, until this much is left: 500MB, 20GB
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub max_size: Option<u64>,
    /// Keep whatever is younger: 30m, 24h, 7d
    #[arg(long, value_name = "TIME", default_value = "24h", value_parser = parse_duration)]
    pub grace: Duration,
}

impl Gc {
    pub fn run(self, common: &Common) -> Result<Outcome, Failure> {
        let store = self.store.open(common)?;
        let options = GcOptions { dry_run: self.dry_run, keep_last: self.keep_last, max_size_bytes: self.max_size, grace: self.grace };
        let report = store.gc(&options)?;
        if common.json {
            print_line(&json!(report).to_string());
            return Ok(Outcome::Done);
        }
        let mut counts = std::collections::BTreeMap::<&str, (usize, u64)>::new();
        for removed in &report.removed {
            let (count, bytes) = counts.entry(removed.what).or_default();
            *count += 1;
            *bytes += removed.size_bytes;
        }
        let rows: Vec<Vec<String>> =
            counts.into_iter().map(|(what, (count, bytes))| vec![what.to_owned(), count.to_string(), text::bytes(bytes)]).collect();
        if !rows.is_empty() {
            print_text(&text::table(&["what", "count", "size"], &rows));
        }
        let (freed, kept) = (text::bytes(report.freed_bytes), text::bytes(report.kept_bytes));
        let verb = if report.dry_run { "would free" } else { "freed" };
        print_text(&format!("{verb} {freed}; {} blobs with {kept} are kept\n", report.kept_blobs));
        Ok(Outcome::Done)
    }
}

/// Verify every blob, manifest, action and snapshot
#[derive(Args)]
pub struct Fsck {
    #[command(flatten)]
    pub store: StoreArgs,
    /// Set damage aside, so that the next run makes it again
    #[arg(long)]
    pub repair: bool,
}

impl Fsck {
    pub fn run(self, common: &Common) -> Result<Outcome, Failure> {
        let report = self.store.open(common)?.fsck(self.repair)?;
        if common.json {
            let mut value = json!(report);
            value["ok"] = report.is_clean().into();
            print_line(&value.to_string());
        } else {
            let rows: Vec<Vec<String>> = report
                .problems
                .iter()
                .map(|problem| {
                    let done = if problem.repaired { "set aside" } else { "" };
                    vec![problem.what.to_owned(), text::clip(&problem.name, 70), problem.message.clone(), done.to_owned()]
                })
                .collect();
            if !rows.is_empty() {
                print_text(&text::table(&["what", "name", "problem", ""], &rows));
            }
            print_text(&format!(
                "{} blobs ({}), {} manifests, {} actions, {} snapshots verified: {}\n",
                report.blobs,
                text::bytes(report.bytes),
                report.manifests,
                report.actions,
                report.snapshots,
                if report.is_clean() { "all good".to_owned() } else { format!("{} problems", report.problems.len()) }
            ));
            if !report.is_clean() && !self.repair {
                print_text("`rlflow fsck --repair` sets damage aside, so that the next run makes it again\n");
            }
        }
        let all_repaired = self.repair && report.problems.iter().all(|problem| problem.repaired);
        Ok(if report.is_clean() || all_repaired { Outcome::Done } else { Outcome::Failed })
    }
}

/// Sizes by stage: as if nothing were shared, really, and shared
#[derive(Args)]
pub struct Du {
    #[command(flatten)]
    pub store: StoreArgs,
}

impl Du {
    pub fn run(self, common: &Common) -> Result<Outcome, Failure> {
        let usage = self.store.open(common)?.usage()?;
        if common.json {
            print_line(&json!(usage).to_string());
            return Ok(Outcome::Done);
        }
        let mut stages: Vec<_> = usage.stages.iter().collect();
        stages.sort_by_key(|stage| std::cmp::Reverse(stage.physical_bytes));
        let rows: Vec<Vec<String>> = stages
            .into_iter()
            .map(|stage| {
                let sizes = [stage.logical_bytes, stage.physical_bytes, stage.shared_bytes].map(text::bytes);
                [vec![stage.stage.clone(), stage.results.to_string()], sizes.into(), vec![stage.workflow.clone()]].concat()
            })
            .collect();
        print_text(&text::table(&["stage", "results", "logical", "physical", "shared", "workflow"], &rows));
        print_text(&format!(
            "\n{} in {} blobs ({} as if nothing were shared); {} unreferenced; {} of records; {} of scratch\n",
            text::bytes(usage.physical_bytes),
            usage.blobs,
            text::bytes(usage.logical_bytes),
            text::bytes(usage.unreferenced_bytes),
            text::bytes(usage.record_bytes),
            text::bytes(usage.scratch_bytes)
        ));
        Ok(Outcome::Done)
    }
}

/// Keep a result for ever, or list what is kept
#[derive(Args)]
pub struct Pin {
    /// The workflow file
    #[arg(value_name = "WORKFLOW")]
    pub workflow: std::path::PathBuf,
    /// A stage, one output of it (STAGE.PORT), or a digest; without it, pins are listed
    #[arg(value_name = "STAGE")]
    pub artifact: Option<String>,
    /// Why
    #[arg(long, default_value = "")]
    pub note: String,
    /// Keep it no longer
    #[arg(long, requires = "artifact")]
    pub remove: bool,
}

impl Pin {
    pub fn run(self, common: &Common) -> Result<Outcome, Failure> {
        let workflow = load(&self.workflow, &LoadOptions::default(), &registry())?;
        let store = common.store_beside(&workflow)?;
        let Some(name) = &self.artifact else {
            let pins = store.pins()?;
            if common.json {
                print_line(&json!({ "pins": pins }).to_string());
            } else {
                let row = |pin: &rlflow_store::Pin| vec![pin.digest.to_string(), crate::log::local_time(pin.since), pin.note.clone()];
                print_text(&text::table(&["digest", "since", "note"], &pins.iter().map(row).collect::<Vec<_>>()));
            }
            return Ok(Outcome::Done);
        };
        let digest: Digest = artifact::find(&workflow, &store, name)?;
        let was_there = if self.remove {
            store.unpin(digest)?
        } else {
            let note = if self.note.is_empty() { name.clone() } else { self.note.clone() };
            store.pin(digest, &note)?;
            true
        };
        if common.json {
            print_line(&json!({ "digest": digest, "pinned": !self.remove, "changed": was_there }).to_string());
        } else {
            let what = match (self.remove, was_there) {
                (false, _) => "pinned",
                (true, true) => "unpinned",
                (true, false) => "was not pinned:",
            };
            print_text(&format!("{what} {digest}\n"));
        }
        Ok(Outcome::Done)
    }
}

/// A size: `500MB`, `20GiB`, `1024`. Decimal and binary units.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let error = || format!("`{text}` is not a size: write 500MB, 20GB or 4GiB");
    let at = text.find(|character: char| !character.is_ascii_digit() && character != '.').unwrap_or(text.len());
    let number: f64 = text[..at].parse().map_err(|_| error())?;
    let unit: f64 = match text[at..].trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1.0,
        "k" | "kb" => 1e3,
        "m" | "mb" => 1e6,
        "g" | "gb" => 1e9,
        "t" | "tb" => 1e12,
        "kib" => 1024.0,
        "mib" => 1024.0 * 1024.0,
        "gib" => 1024.0 * 1024.0 * 1024.0,
        "tib" => 1024.0 * 1024.0 * 1024.0 * 1024.0,
        _ => return Err(error()),
    };
    Ok((number * unit) as u64)
}

/// A duration: `90s`, `30m`, `24h`, `7d`.
fn parse_duration(text: &str) -> Result<Duration, String> {
    let error = || format!("`{text}` is not a time: write 90s, 30m, 24h or 7d");
    let at = text.find(|character: char| !character.is_ascii_digit()).unwrap_or(text.len());
    let number: u64 = text[..at].parse().map_err(|_| error())?;
    let unit = match text[at..].trim() {
        "" | "s" => 1,
        "m" | "min" => 60,
        "h" => 3600,
        "d" => 24 * 3600,
        _ => return Err(error()),
    };
    number.checked_mul(unit).map(Duration::from_secs).ok_or_else(error)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{parse_duration, parse_size};

    #[test]
    fn sizes_and_times_have_units() {
        assert_eq!(["0", "1.5k", "20GB", "4GiB"].map(|text| parse_size(text).unwrap()), [0, 1500, 20_000_000_000, 4 << 30]);
        assert!(parse_size("many").is_err() && parse_size("3 parsecs").is_err());
        assert_eq!(["90s", "30m", "2d"].map(|text| parse_duration(text).unwrap().as_secs()), [90, 1800, 172_800]);
        assert!(parse_duration("-1h").is_err() && parse_duration("99999999999999999999d").is_err());
        assert_eq!(parse_duration("0").unwrap(), Duration::ZERO);
    }
}

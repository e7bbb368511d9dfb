use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use rlflow_store::{ActionRecord, Digest};

use crate::{
    action_key::FullKey,
    settings::{changes, display},
};

/// Who needs a result that was asked for by its stage's name. No stage can be called this.
pub const REQUEST: &str = "the request";

/// Why a stage runs although it might have been cached. [`RerunReason::text`] is what people read.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum RerunReason {
    /// No result of a stage of this name and kind is in the store.
    NeverRan,
    /// It was started, never finished, and can continue.
    Unfinished {
        /// Steps done.
        step: u64,
    },
    /// An identity setting has another value. `Null` stands for absent.
    SettingChanged {
        /// Dotted path.
        setting: String,
        /// Value of the last result.
        from: Value,
        /// Value now.
        to: Value,
    },
    /// An input artifact has another digest.
    InputChanged {
        /// Port.
        port: String,
        /// Place in the list, for ports that take many.
        index: Option<usize>,
        /// Stage that makes it now, if the port is connected.
        stage: Option<String>,
        /// Stage that made it for the last result, where that is another one which is still in the workflow.
        from_stage: Option<String>,
        /// Digest that the last result was made of.
        from: Option<Digest>,
        /// Digest now.
        to: Option<Digest>,
    },
    /// A data file has other content.
    FileChanged {
        /// As the workflow names it.
        file: String,
        /// Digest that the last result was made of; none if it was not read then.
        from: Option<Digest>,
        /// Digest now; none if it is not read any more.
        to: Option<Digest>,
    },
    /// The same files are read in another order, or as another format.
    FilesRearranged {
        /// The files of the last result, in their order.
        from: Vec<String>,
        /// The files now.
        to: Vec<String>,
    },
    /// The kind's implementation version was raised, or the key's schema.
    ImplementationChanged {
        /// Version of the last result.
        from: u64,
        /// Version now.
        to: u64,
    },
    /// The seed has another value.
    SeedChanged {
        /// Seed of the last result.
        from: Option<u64>,
        /// Seed now.
        to: Option<u64>,
    },
    /// Its result is known but was collected or deleted, and `needed_by` must read it.
    ArtifactMissing {
        /// Output port.
        port: String,
        /// Stage that must read it, or [`REQUEST`].
        needed_by: String,
    },
    /// Its result is damaged, and `needed_by` must read it.
    ArtifactDamaged {
        /// Output port.
        port: String,
        /// Stage that must read it, or [`REQUEST`].
        needed_by: String,
    },
    /// The user asked for it.
    Forced {
        /// The option that asked.
        option: String,
    },
    /// A stage above it runs, and whether this one must depends on what that gives.
    DependsOnResultOf {
        /// The stage above.
        stage: String,
        /// The first stage of the chain, which runs for a reason of its own.
        root: String,
        /// Why that one runs.
        because: String,
    },
    /// A result under the same inputs was recorded, but its record is gone.
    RecordMissing,
}

impl RerunReason {
    /// One sentence, without a full stop.
    pub fn text(&self) -> String {
        match self {
            Self::NeverRan => "never ran".into(),
            Self::Unfinished { step } => format!("was interrupted after step {}", thousands(*step)),
            Self::SettingChanged { setting, from, to } => format!("{setting} changed: {} -> {}", display(from), display(to)),
            Self::InputChanged { port, index, stage, from_stage, from, .. } => {
                let port = index.map_or_else(|| port.clone(), |index| format!("{port}[{index}]"));
                match (stage, from_stage, from) {
                    (Some(stage), Some(before), _) => format!("input {port} now comes from {stage} instead of {before}"),
                    (Some(stage), None, Some(_)) => format!("input {port} changed (because {stage} changed)"),
                    (Some(stage), None, None) => format!("input {port} is new (from {stage})"),
                    (None, Some(before), _) => format!("input {port} no longer comes from {before}"),
                    (None, None, _) => format!("input {port} is no longer connected"),
                }
            }
            Self::FileChanged { file, from: Some(_), to: Some(_) } => format!("data file {file} changed"),
            Self::FileChanged { file, from: None, .. } => format!("data file {file} was added"),
            Self::FileChanged { file, .. } => format!("data file {file} was removed"),
            Self::FilesRearranged { .. } => "its data files are read in another order or as another format".into(),
            Self::ImplementationChanged { from, to } => format!("implementation changed: version {from} -> {to}"),
            Self::SeedChanged { from, to } => {
                let seed = |seed: &Option<u64>| seed.map_or("(none)".to_owned(), |seed| seed.to_string());
                format!("seed changed: {} -> {}", seed(from), seed(to))
            }
            Self::ArtifactMissing { port, needed_by } => format!("its result {port} is missing from the store and {}", need(needed_by)),
            Self::ArtifactDamaged { port, needed_by } if needed_by.is_empty() => {
                format!("its result {port} was found damaged and set aside")
            }
            Self::ArtifactDamaged { port, needed_by } => format!("its result {port} is damaged and {}", need(needed_by)),
            Self::Forced { option } => format!("forced by {option}"),
            Self::DependsOnResultOf { stage, root, because } if stage == root => format!("depends on the result of {stage} ({because})"),
            Self::DependsOnResultOf { stage, root, because } => format!("depends on the result of {stage} ({root}: {because})"),
            Self::RecordMissing => "the record of its result is missing from the store".into(),
        }
    }
}

fn need(needed_by: &str) -> String {
    if needed_by == REQUEST { "it was asked for by name".into() } else { format!("{needed_by} must read it") }
}

/// A rerun's reason with everything else that changed too.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Rerun {
    /// What is shown first.
    pub reason: RerunReason,
    /// Other changes.
    pub also: Vec<RerunReason>,
}

impl From<RerunReason> for Rerun {
    fn from(reason: RerunReason) -> Self {
        Self { reason, also: Vec::new() }
    }
}

impl Rerun {
    /// Why a stage with this full key has no result, given the last result of the same stage, if any.
    pub fn find(last: Option<&ActionRecord>, new: &Current<'_>) -> Self {
        let Some(last) = last else { return RerunReason::NeverRan.into() };
        let mut changes = compare(last, new).into_iter();
        match changes.next() {
            Some(reason) => Self { reason, also: changes.collect() },
            None => RerunReason::RecordMissing.into(),
        }
    }

    /// Why a stage cannot be decided about before `stage`, which runs because of `above`.
    pub fn depends(stage: &str, above: Option<&Rerun>) -> Self {
        let stage = stage.to_owned();
        let (root, because) = match above.map(|above| (&above.reason, above)) {
            Some((RerunReason::DependsOnResultOf { root, because, .. }, _)) => (root.clone(), because.clone()),
            Some((_, above)) => (stage.clone(), above.text()),
            None => (stage.clone(), "it runs first".into()),
        };
        RerunReason::DependsOnResultOf { stage, root, because }.into()
    }

    /// The sentence, with the number of other changes.
    pub fn text(&self) -> String {
        match self.also.len() {
            0 => self.reason.text(),
            1 => format!("{}, and {}", self.reason.text(), self.also[0].text()),
            more => format!("{}, and {more} other changes", self.reason.text()),
        }
    }

    /// `{"kind", "text", ...}` with the variant's own fields, and the other changes under `also`.
    pub fn to_json(&self) -> Value {
        let one = |reason: &RerunReason| {
            let mut value = json!(reason);
            value["text"] = reason.text().into();
            value
        };
        let mut value = one(&self.reason);
        value["text"] = self.text().into();
        if !self.also.is_empty() {
            value["also"] = self.also.iter().map(one).collect();
        }
        value
    }
}

/// What a stage would be made of now.
pub struct Current<'a> {
    /// The full key.
    pub key: &'a FullKey<'a>,
    /// Port to (stage, digest).
    pub inputs: BTreeMap<&'a str, Vec<(&'a str, Digest)>>,
    /// Data files: name and digest.
    pub files: Vec<(&'a str, Digest)>,
    /// Whether the user wrote a setting: what follows from those by default is told after them.
    pub is_written: &'a dyn Fn(&str) -> bool,
    /// Whether the workflow has a stage of a name.
    pub has_stage: &'a dyn Fn(&str) -> bool,
}

/// Everything that differs, causes before consequences: implementation, settings, seed, files, inputs.
fn compare(last: &ActionRecord, new: &Current<'_>) -> Vec<RerunReason> {
    let old = &last.full_key;
    let key = new.key;
    let mut reasons = Vec::new();
    for (from, to) in [(&old["schema"], crate::action_key::SCHEMA), (&old["version"], key.version)] {
        let from = from.as_u64().unwrap_or(0);
        if from != u64::from(to) {
            reasons.push(RerunReason::ImplementationChanged { from, to: to.into() });
        }
    }
    let mut settings = changes(&old["settings"], key.settings);
    settings.sort_by_cached_key(|change| !(new.is_written)(&change.setting));
    reasons.extend(settings.into_iter().map(|change| RerunReason::SettingChanged {
        setting: change.setting,
        from: change.from,
        to: change.to,
    }));
    let seed = old["seed"].as_u64();
    if seed != key.seed {
        reasons.push(RerunReason::SeedChanged { from: seed, to: key.seed });
    }
    reasons.extend(compare_files(last, new));
    reasons.extend(compare_inputs(last, new));
    reasons
}

fn compare_files(last: &ActionRecord, new: &Current<'_>) -> Vec<RerunReason> {
    let old_files: BTreeMap<&str, Digest> = last.provenance.files.iter().map(|(name, digest)| (name.as_str(), *digest)).collect();
    let new_files: BTreeMap<&str, Digest> = new.files.iter().copied().collect();
    let mut names: Vec<&str> = old_files.keys().chain(new_files.keys()).copied().collect();
    names.sort_unstable();
    names.dedup();
    let digests = |files: &BTreeMap<&str, Digest>| {
        let mut digests: Vec<Digest> = files.values().copied().collect();
        digests.sort_unstable();
        digests
    };
    if digests(&old_files) == digests(&new_files) {
        let as_json = |value: &Value| if value.as_array().is_none_or(Vec::is_empty) { json!([]) } else { value.clone() };
        // The same contents under other names are the same files; only their order or format can differ.
        let same = as_json(&last.full_key["files"]) == as_json(&new.key.to_value()["files"]);
        let from = last.provenance.files.iter().map(|(name, _)| name.clone()).collect();
        let to = new.files.iter().map(|(name, _)| (*name).to_owned()).collect();
        return if same { Vec::new() } else { vec![RerunReason::FilesRearranged { from, to }] };
    }
    names
        .into_iter()
        .filter_map(|file| {
            let (from, to) = (old_files.get(file).copied(), new_files.get(file).copied());
            (from != to).then(|| RerunReason::FileChanged { file: file.to_owned(), from, to })
        })
        .collect()
}

fn compare_inputs(last: &ActionRecord, new: &Current<'_>) -> Vec<RerunReason> {
    let old: BTreeMap<String, Vec<Digest>> = serde_json::from_value(last.full_key["inputs"].clone()).unwrap_or_default();
    let mut ports: Vec<&str> = old.keys().map(String::as_str).chain(new.inputs.keys().copied()).collect();
    ports.sort_unstable();
    ports.dedup();
    let mut reasons = Vec::new();
    for port in ports {
        let from = old.get(port).map_or(&[][..], Vec::as_slice);
        let made = last.provenance.inputs.get(port).map_or(&[][..], Vec::as_slice);
        let to = new.inputs.get(port).map_or(&[][..], Vec::as_slice);
        let is_list = from.len().max(to.len()) > 1;
        for at in 0..from.len().max(to.len()) {
            let (from, now) = (from.get(at).copied(), to.get(at));
            if from == now.map(|(_, digest)| *digest) {
                continue;
            }
            let stage = now.map(|(stage, _)| (*stage).to_owned());
            // A stage that is gone was probably renamed: then what it gives now is what changed.
            let before = made.get(at).map(|(before, _)| before).filter(|before| stage.as_ref() != Some(before) && (new.has_stage)(before));
            reasons.push(RerunReason::InputChanged {
                port: port.to_owned(),
                index: is_list.then_some(at),
                stage,
                from_stage: before.cloned(),
                from,
                to: now.map(|(_, digest)| *digest),
            });
        }
    }
    reasons
}

/// `12345` as `12,345`.
pub fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use rlflow_store::Provenance;

    use super::*;
    use crate::action_key::KeyFile;

    fn file(name: &'static str, content: &str) -> (&'static str, Digest) {
        (name, Digest::of(content.as_bytes()))
    }

    fn key_files(files: &[(&'static str, Digest)]) -> Vec<Vec<KeyFile>> {
        vec![
            files
                .iter()
                .map(|(name, digest)| KeyFile { label: ("format", name.rsplit('.').next().unwrap_or("").into()), digest: *digest })
                .collect(),
        ]
    }

    struct Made {
        version: u32,
        settings: Value,
        seed: Option<u64>,
        /// The stage at the input `model`, and what it gives.
        model: Option<(&'static str, &'static str)>,
        files: Vec<(&'static str, Digest)>,
    }

    impl Made {
        fn new() -> Self {
            let settings = json!({ "beta": 0.1, "train": { "lr": 0.001 } });
            Self {
                version: 1,
                settings,
                seed: Some(1),
                model: Some(("sft", "sft")),
                files: vec![file("a.jsonl", "a"), file("b.jsonl", "b")],
            }
        }

        fn with<R>(&self, then: impl FnOnce(&Current<'_>) -> R) -> R {
            let files = key_files(&self.files);
            let inputs: BTreeMap<&str, Vec<(&str, Digest)>> =
                self.model.iter().map(|(stage, content)| ("model", vec![(*stage, Digest::of(content.as_bytes()))])).collect();
            let digests = inputs.iter().map(|(port, made)| (*port, made.iter().map(|(_, digest)| *digest).collect())).collect();
            let settings = self.settings.clone().into();
            let key = FullKey { kind: "dpo", version: self.version, settings: &settings, seed: self.seed, inputs: digests, files: &files };
            let has_stage = |name: &str| name != "renamed_since";
            then(&Current {
                key: &key,
                inputs,
                files: self.files.clone(),
                is_written: &|setting| setting != "aa_derived",
                has_stage: &has_stage,
            })
        }

        fn record(&self) -> ActionRecord {
            self.with(|current| ActionRecord {
                format: 1,
                key: current.key.digest(),
                full_key: current.key.to_value(),
                outputs: BTreeMap::new(),
                metrics: BTreeMap::new(),
                records: BTreeMap::new(),
                provenance: Provenance {
                    inputs: (current.inputs.iter())
                        .map(|(port, made)| {
                            ((*port).to_owned(), made.iter().map(|(stage, digest)| ((*stage).to_owned(), *digest)).collect())
                        })
                        .collect(),
                    files: current.files.iter().map(|(name, digest)| ((*name).to_owned(), *digest)).collect(),
                    ..Provenance::default()
                },
            })
        }
    }

    fn text_after(change: impl FnOnce(&mut Made)) -> String {
        let mut now = Made::new();
        change(&mut now);
        let last = Made::new().record();
        now.with(|current| Rerun::find(Some(&last), current).text())
    }

    #[test]
    fn every_change_has_its_sentence() {
        assert_eq!(text_after(|now| now.settings["beta"] = json!(0.2)), "beta changed: 0.1 -> 0.2");
        assert_eq!(text_after(|now| now.settings["train"]["lr"] = json!(1.0)), "train.lr changed: 0.001 -> 1.0");
        assert_eq!(text_after(|now| now.settings["loss"] = json!("ipo")), "loss changed: (unset) -> ipo");
        assert_eq!(text_after(|now| now.seed = Some(2)), "seed changed: 1 -> 2");
        assert_eq!(text_after(|now| now.version = 2), "implementation changed: version 1 -> 2");
        assert_eq!(text_after(|now| now.model = Some(("sft", "other"))), "input model changed (because sft changed)");
        assert_eq!(text_after(|now| now.model = Some(("sft2", "other"))), "input model now comes from sft2 instead of sft");
        assert_eq!(text_after(|now| now.model = None), "input model no longer comes from sft");
        // Another name with the same content is the same input.
        assert_eq!(text_after(|now| now.model = Some(("sft2", "sft"))), "the record of its result is missing from the store");
        assert_eq!(text_after(|now| now.files[1] = file("b.jsonl", "B")), "data file b.jsonl changed");
        assert_eq!(text_after(|now| now.files.push(file("c.jsonl", "c"))), "data file c.jsonl was added");
        assert_eq!(text_after(|now| now.files.truncate(1)), "data file b.jsonl was removed");
        assert_eq!(text_after(|now| now.files.reverse()), "its data files are read in another order or as another format");
        assert_eq!(text_after(|_| ()), "the record of its result is missing from the store");
    }

    #[test]
    fn a_stage_that_is_gone_was_renamed() {
        let last = Made { model: Some(("renamed_since", "sft")), ..Made::new() }.record();
        let text = |now: &Made| now.with(|current| Rerun::find(Some(&last), current).text());
        assert_eq!(text(&Made { model: Some(("sft", "other")), ..Made::new() }), "input model changed (because sft changed)");
        assert_eq!(text(&Made { model: None, ..Made::new() }), "input model is no longer connected");
        let rewired = Made { model: Some(("sft2", "other")), ..Made::new() };
        let json = rewired.with(|current| Rerun::find(Some(&Made::new().record()), current).to_json());
        let digest = |text: &str| json!(Digest::of(text.as_bytes()));
        assert_eq!(
            [&json["stage"], &json["from_stage"], &json["from"], &json["to"]],
            [&json!("sft2"), &json!("sft"), &digest("sft"), &digest("other")]
        );
    }

    #[test]
    fn several_changes_are_counted_and_all_kept() {
        let mut now = Made::new();
        now.settings["beta"] = json!(0.2);
        now.seed = Some(2);
        now.files[0] = file("a.jsonl", "A");
        let last = Made::new().record();
        let rerun = now.with(|current| Rerun::find(Some(&last), current));
        assert_eq!(rerun.text(), "beta changed: 0.1 -> 0.2, and 2 other changes");
        let json = rerun.to_json();
        assert_eq!((&json["kind"], &json["from"], &json["to"]), (&json!("setting_changed"), &json!(0.1), &json!(0.2)));
        let also: Vec<&Value> = json["also"].as_array().unwrap().iter().map(|reason| &reason["text"]).collect();
        assert_eq!(also, ["seed changed: 1 -> 2", "data file a.jsonl changed"]);
    }

    #[test]
    fn reasons_without_a_comparison() {
        assert_eq!(Made::new().with(|current| Rerun::find(None, current)), RerunReason::NeverRan.into());
        let depends = Rerun::depends("sft", Some(&RerunReason::NeverRan.into()));
        assert_eq!(depends.text(), "depends on the result of sft (never ran)");
        assert_eq!(Rerun::depends("rm", Some(&depends)).text(), "depends on the result of rm (sft: never ran)");
        assert_eq!(RerunReason::Forced { option: "--force sft".into() }.text(), "forced by --force sft");
        assert_eq!(RerunReason::Unfinished { step: 1_234_567 }.text(), "was interrupted after step 1,234,567");
        let (port, needed_by) = ("model".to_owned(), "dpo".to_owned());
        let missing = RerunReason::ArtifactMissing { port: port.clone(), needed_by: needed_by.clone() };
        assert_eq!(missing.text(), "its result model is missing from the store and dpo must read it");
        let asked = RerunReason::ArtifactMissing { port: port.clone(), needed_by: REQUEST.into() };
        assert_eq!(asked.text(), "its result model is missing from the store and it was asked for by name");
        assert_eq!(RerunReason::ArtifactDamaged { port, needed_by }.text(), "its result model is damaged and dpo must read it");
        assert_eq!(Rerun::from(RerunReason::NeverRan).to_json(), json!({ "kind": "never_ran", "text": "never ran" }));
    }

    #[test]
    fn numbers_have_separators() {
        assert_eq!([0, 999, 1000, 1_000_000].map(thousands), ["0", "999", "1,000", "1,000,000"]);
    }

    #[test]
    fn what_the_user_wrote_is_told_before_what_follows_from_it() {
        let before = Made::new().record();
        let mut now = Made::new();
        now.settings["aa_derived"] = json!(1);
        now.settings["beta"] = json!(0.2);
        let reason = now.with(|current| Rerun::find(Some(&before), current).text());
        assert_eq!(reason, "beta changed: 0.1 -> 0.2, and aa_derived changed: (unset) -> 1");
    }
}

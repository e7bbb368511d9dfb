//! Memory of devices: what stages take of it, what does not fit, and what would.

use std::collections::BTreeMap;

use rlflow_api::{DeviceSpec, ErasedStage, Needs, Offload, Placement, Problem, StageError, ZeroSetting};
use serde_json::{Value, json};

use crate::{action::Actions, text, workflow::WorkflowError};

/// Bytes by device.
pub type Usage = BTreeMap<DeviceSpec, u64>;

/// Bytes that stay while a stage runs, and bytes that come and go.
#[derive(Debug, Clone, Default, PartialEq)]
struct Parts {
    lasting: Usage,
    passing: Usage,
}

impl Parts {
    /// What a model of these `needs` per rank takes where it is placed.
    fn of(needs: &Needs, placement: &Placement) -> Self {
        let mut parts = Self::default();
        // Most stages of a large workflow say nothing.
        if needs.peak_bytes() == 0 {
            return parts;
        }
        let mut add = |to: fn(&mut Self) -> &mut Usage, device: DeviceSpec, bytes: u64| {
            *to(&mut parts).entry(device).or_default() += bytes;
        };
        for (rank, device) in placement.devices.iter().enumerate() {
            let (lasting, passing): (fn(&mut Self) -> &mut Usage, fn(&mut Self) -> &mut Usage) = (|p| &mut p.lasting, |p| &mut p.passing);
            add(passing, *device, needs.passing_bytes_of(rank));
            match (placement.offload, *device, needs.optimizer_bytes) {
                (Offload::None, ..) | (_, DeviceSpec::Cpu, _) => add(lasting, *device, needs.lasting_bytes()),
                // A frozen model is on the device only while it works.
                (Offload::Cpu, _, 0) => {
                    add(lasting, DeviceSpec::Cpu, needs.parameter_bytes);
                    add(passing, *device, needs.parameter_bytes.saturating_sub(needs.resting_bytes));
                }
                (Offload::Cpu, ..) => {
                    add(lasting, DeviceSpec::Cpu, needs.optimizer_bytes);
                    add(lasting, *device, needs.parameter_bytes);
                }
            }
        }
        parts
    }

    /// Another model beside this one: both stay, and work in turn.
    fn beside(mut self, other: Self) -> Self {
        other.lasting.into_iter().for_each(|(device, bytes)| *self.lasting.entry(device).or_default() += bytes);
        for (device, bytes) in other.passing {
            let passing = self.passing.entry(device).or_default();
            *passing = bytes.max(*passing);
        }
        self
    }

    fn total(self) -> Usage {
        let mut total = self.lasting;
        self.passing.into_iter().for_each(|(device, bytes)| *total.entry(device).or_default() += bytes);
        total.retain(|_, bytes| *bytes > 0);
        total
    }
}

/// Settings of a stage's own that save memory, and the value that does.
static SAVING: [(&str, bool); 2] = [("gradient_checkpointing", true), ("gather_for_generation", false)];

/// Another way to run a stage.
struct Change<'a> {
    zero: u8,
    devices: usize,
    offload: Offload,
    saving: &'a [(&'static str, bool)],
}

/// A stage that holds models of others.
struct Holding {
    /// What it needs beside them.
    own: Needs,
    /// Those stages, with memory per rank.
    roles: Vec<(usize, Needs)>,
}

impl Actions<'_> {
    /// What a stage takes of each device at its peak, as its kind predicts it.
    pub fn usage(&self, stage: usize) -> Usage {
        match self.holding(stage) {
            None => Parts::of(&self.needs(stage), self.placement(stage)).total(),
            Some(holding) => holding.usage(&|role| self.placement(role).clone()),
        }
    }

    /// Memory of a rank of the stage with the models of others that it holds: they stay side by side, and work in turn.
    pub fn rank_needs(&self, stage: usize) -> Needs {
        let Some(Holding { own, roles }) = self.holding(stage) else { return self.needs(stage) };
        roles.into_iter().fold(own, |all, (_, role)| Needs {
            parameter_bytes: all.parameter_bytes + role.parameter_bytes,
            optimizer_bytes: all.optimizer_bytes + role.optimizer_bytes,
            tokens: own.tokens,
            ..if role.passing_bytes() > all.passing_bytes() { role } else { all }
        })
    }

    /// Raises ZeRO levels that were left to planning until the stages that hold such models fit their devices.
    pub(crate) fn settle_levels(&mut self) {
        for stage in 0..self.workflow.stages.len() {
            if self.workflow.stages[stage].described.holds().is_empty() {
                continue;
            }
            while self.too_large(stage).is_some() {
                let open = |(role, _): &(usize, Needs)| {
                    let placement = self.placement(*role);
                    self.chooses_level(*role) && placement.ranks() > 1 && placement.zero < 3
                };
                let roles = self.holding(stage).map(|holding| holding.roles).unwrap_or_default();
                let open: Vec<usize> = roles.into_iter().filter(open).map(|(role, _)| role).collect();
                if open.is_empty() {
                    break;
                }
                open.into_iter().for_each(|role| self.raise_level(role));
            }
        }
    }

    fn chooses_level(&self, stage: usize) -> bool {
        let found = &self.workflow.stages[stage];
        found.kind.execution(&found.config).is_some_and(|execution| matches!(execution.zero, ZeroSetting::Auto(_)))
    }

    /// Selected stages that do not fit their devices, or name devices that this machine has not. Empty almost always.
    pub(crate) fn misplaced(&self) -> Vec<usize> {
        let here = |device: &DeviceSpec| self.host.device(*device).is_some();
        let wrong = |stage: &usize| {
            let elsewhere = !self.placement(*stage).devices.iter().all(|device| *device == DeviceSpec::Cpu || here(device));
            self.is_selected(*stage) && (elsewhere || self.too_large(*stage).is_some())
        };
        (0..self.workflow.stages.len()).filter(wrong).collect()
    }

    fn too_large(&self, stage: usize) -> Option<(DeviceSpec, u64, u64)> {
        let over = |(device, bytes): (DeviceSpec, u64)| {
            let capacity = self.capacity(device)?;
            (bytes > capacity).then_some((device, bytes, capacity))
        };
        self.usage(stage).into_iter().find_map(over)
    }

    /// Why a stage cannot run where it is placed, with what would let it. `run` also asks whether the devices are here.
    pub(crate) fn placement_error(&self, stage: usize, run: bool) -> Option<WorkflowError> {
        let placement = self.placement(stage);
        if run && let Some(device) = placement.devices.iter().find(|device| self.host.device(**device).is_none()) {
            let message = format!("device `{device}` is declared in `[devices]`, but this machine has none{}", self.host.why_no_gpu());
            let problem = Problem::new("device_unavailable", "device", message);
            return Some(self.workflow.error(stage, &problem.hint("`rlflow plan` plans for it; to run, name devices that are here")));
        }
        let (device, bytes, capacity) = self.too_large(stage)?;
        let roles = self.holding(stage).map(|holding| holding.roles).unwrap_or_default();
        let holds: Vec<&str> = roles.iter().map(|(role, _)| self.workflow.stages[*role].name.as_str()).collect();
        let with = if holds.is_empty() { String::new() } else { format!(" with {}", holds.join(", ")) };
        let message = format!("it needs {}{with} on {device}, which has {}", text::bytes(bytes), text::bytes(capacity));
        let ways = if roles.is_empty() { self.ways(stage, device, capacity) } else { self.ways_of_roles(stage, device, capacity) };
        let hint = match ways.as_slice() {
            [] => "no ZeRO level and no offloading on these devices makes it fit: a smaller model, batch or context would".to_owned(),
            ways => ways.join("; "),
        };
        let setting = if roles.is_empty() { "device".to_owned() } else { "inputs".to_owned() };
        Some(self.workflow.error(stage, &Problem::new("does_not_fit", setting, message).hint(hint)))
    }

    /// The error of a stage that ran out of memory: what it was doing, what it was planned to take, and what would take less.
    pub(crate) fn out_of_memory(&self, stage: usize, message: &str, phase: Option<&str>) -> StageError {
        let phase = phase.map(|phase| format!(" in phase `{phase}`")).unwrap_or_default();
        let usage = self.usage(stage);
        // The fullest device; of several kinds, not the host.
        let fullest = usage.iter().max_by_key(|(device, bytes)| (**device != DeviceSpec::Cpu, **bytes));
        let Some((device, planned)) = fullest else {
            let hint = "a smaller model, batch or context needs less; nothing is known of what this stage takes".to_owned();
            return StageError::OutOfMemory { message: format!("{message}{phase}"), hint: Some(hint) };
        };
        let has = self.capacity(*device).map(|capacity| format!(", which has {}", text::bytes(capacity))).unwrap_or_default();
        let message = format!("{message}{phase}; planned were {} on {device}{has}", text::bytes(*planned));
        // Plans are right within a tenth.
        let less = planned / 10 * 9;
        let ways = if self.holding(stage).is_some() { self.ways_of_roles(stage, *device, less) } else { self.ways(stage, *device, less) };
        let hint = if ways.is_empty() { "a smaller `micro_batch_size`, model or context needs less".to_owned() } else { ways.join("; ") };
        StageError::OutOfMemory { message, hint: Some(hint) }
    }

    /// Settings under which a stage fits, with what it then takes of the device: the smallest change first.
    fn ways(&self, stage: usize, device: DeviceSpec, capacity: u64) -> Vec<String> {
        let now = self.placement(stage);
        let same = self.planned.devices.iter().filter(|known| (known.spec == DeviceSpec::Cpu) == (device == DeviceSpec::Cpu)).count();
        let count = now.devices.len();
        // Ranks on one CPU share its memory: there, fewer need less.
        let more = (count + 1..=same).filter(|more| more.is_power_of_two() || *more == same);
        let fewer = (device == DeviceSpec::Cpu && count > 1).then_some(1);
        let counts = std::iter::once(count).chain(fewer).chain(more);
        // On the CPU all is on the host.
        let offloaded = (device != DeviceSpec::Cpu && now.offload == Offload::None).then_some(Offload::Cpu);
        let offloads: Vec<Offload> = std::iter::once(now.offload).chain(offloaded).collect();
        let mut ways = Vec::new();
        for (devices, offload) in counts.flat_map(|devices| offloads.iter().map(move |offload| (devices, *offload))) {
            let levels = if devices * now.processes == 1 { 0..=0 } else { 0..=3 };
            let fitting = |saving| {
                let change = |zero| Change { zero, devices, offload, saving };
                let fits = |change: Change<'static>| Some((self.changed(stage, device, &change)?, change));
                levels.clone().filter_map(|zero| fits(change(zero))).find(|(bytes, _)| *bytes <= capacity)
            };
            let mut lowest = None;
            for saving in [&[][..], &SAVING[..1], &SAVING[1..], &SAVING[..]] {
                let Some((bytes, change)) = fitting(saving) else { continue };
                // What slows down is worth it only where fewer shards do then.
                if lowest.is_some_and(|lowest| change.zero >= lowest) {
                    continue;
                }
                lowest = Some(change.zero);
                ways.push(format!("{}: {}", described(&change, now), text::bytes(bytes)));
                if ways.len() == 3 {
                    return ways;
                }
            }
        }
        ways
    }

    /// What the device would hold of a stage that runs otherwise.
    fn changed(&self, stage: usize, device: DeviceSpec, change: &Change<'_>) -> Option<u64> {
        let processes = self.placement(stage).processes;
        let config = self.saving_config(stage, change.saving)?;
        let config = config.as_ref().unwrap_or(&self.workflow.stages[stage].config);
        let spec = |index: usize| if device == DeviceSpec::Cpu { device } else { DeviceSpec::Cuda(index) };
        let devices = (0..change.devices).map(spec).collect();
        let placement = Placement { devices, processes, zero: change.zero, offload: change.offload };
        let needs = self.workflow.describe_as(stage, config, &placement, &|made| self.row_tokens(made)).ok()?.needs;
        let usage = Parts::of(&needs, &placement).total();
        if !self.has_room_beside(&usage, device) {
            return None;
        }
        let most = usage.into_iter().filter(|(used, _)| (*used == DeviceSpec::Cpu) == (device == DeviceSpec::Cpu)).map(|(_, bytes)| bytes);
        most.max()
    }

    /// The stage's config with other values of its own; none of it where nothing changes. No answer where it has not these settings, or
    /// has these values already.
    fn saving_config(&self, stage: usize, saving: &[(&'static str, bool)]) -> Option<Option<ErasedStage>> {
        if saving.is_empty() {
            return Some(None);
        }
        let found = &self.workflow.stages[stage];
        let mut settings = found.config.settings().clone();
        for (name, value) in saving {
            *settings.get_mut(*name).filter(|known| **known == Value::Bool(!value))? = json!(value);
        }
        found.kind.parse(&settings).ok().map(Some)
    }

    /// Whether what stands on devices of another sort than `device` fits there.
    fn has_room_beside(&self, usage: &Usage, device: DeviceSpec) -> bool {
        let is_host = |device: DeviceSpec| device == DeviceSpec::Cpu;
        let mut others = usage.iter().filter(|(used, _)| is_host(**used) != is_host(device));
        others.all(|(used, bytes)| self.capacity(*used).is_none_or(|capacity| *bytes <= capacity))
    }

    /// The same for a stage that holds the models of others: changes of all of them at once, and of its own.
    fn ways_of_roles(&self, stage: usize, device: DeviceSpec, capacity: u64) -> Vec<String> {
        let of = |zero: Option<u8>, offload: Option<Offload>, saving: &[(&'static str, bool)]| {
            let placement = |role: usize| {
                let now = self.placement(role);
                Placement { zero: zero.unwrap_or(now.zero), offload: offload.unwrap_or(now.offload), ..now.clone() }
            };
            let config = self.saving_config(stage, saving)?;
            let config = config.as_ref().unwrap_or(&self.workflow.stages[stage].config);
            let usage = self.holding_as(stage, config, &placement)?.usage(&placement);
            self.has_room_beside(&usage, device).then(|| usage.get(&device).copied().unwrap_or(0)).filter(|bytes| *bytes <= capacity)
        };
        let mut found: Vec<([bool; 4], String)> = Vec::new();
        // Fewer changes first.
        let mut changes: Vec<[bool; 4]> = (1..16_u8).map(|bits| [1, 2, 4, 8].map(|bit| bits & bit != 0)).collect();
        changes.sort_by_key(|change| change.iter().filter(|is_made| **is_made).count());
        for change in changes {
            let [zero, offload, checkpointing, by_block] = change;
            // What needs more changes than something that does is no way.
            let is_more = |known: &[bool; 4]| known.iter().zip(&change).all(|(known, made)| !known || *made);
            if found.iter().any(|(known, _)| is_more(known)) {
                continue;
            }
            let saving: Vec<_> =
                SAVING.into_iter().zip([checkpointing, by_block]).filter(|(_, is_made)| *is_made).map(|(set, _)| set).collect();
            let Some(bytes) = of(zero.then_some(3), offload.then_some(Offload::Cpu), &saving) else { continue };
            let roles: Vec<&str> = [(zero, "zero = 3"), (offload, "offload = \"cpu\"")]
                .into_iter()
                .filter(|(is_made, _)| *is_made)
                .map(|(_, set)| set)
                .collect();
            let roles = (!roles.is_empty()).then(|| format!("{} for all of them", roles.join(" and ")));
            let words: Vec<String> = roles.into_iter().chain(saving.iter().map(|(name, value)| format!("{name} = {value}"))).collect();
            found.push((change, format!("{}: {}", words.join(" with "), text::bytes(bytes))));
            if found.len() == 3 {
                break;
            }
        }
        found.into_iter().map(|(_, way)| way).collect()
    }

    /// What a stage holds of others', if it does, where those are placed.
    fn holding(&self, stage: usize) -> Option<Holding> {
        let found = &self.workflow.stages[stage];
        if found.described.holds().is_empty() {
            return None;
        }
        let loaded = self.with_stages(stage, found.described.needs, found.described.holds());
        let is_placed_otherwise = |role: usize| *self.placement(role) != self.workflow.asked_placement(role);
        if !loaded.roles.iter().any(|(role, _)| is_placed_otherwise(*role)) && !self.knows_rows(stage) {
            return Some(loaded);
        }
        Some(self.holding_as(stage, &found.config, &|role| self.placement(role).clone()).unwrap_or(loaded))
    }

    /// The same where `placed` puts those, under another config.
    fn holding_as(&self, stage: usize, config: &ErasedStage, placed: &dyn Fn(usize) -> Placement) -> Option<Holding> {
        let described = self.workflow.describe_holding(stage, config, placed, &|made| self.row_tokens(made))?;
        Some(self.with_stages(stage, described.needs, &described.holds))
    }

    fn with_stages(&self, stage: usize, own: Needs, held: &[(&'static str, Needs)]) -> Holding {
        let inputs = &self.workflow.stages[stage].inputs;
        Holding { own, roles: held.iter().filter_map(|(port, needs)| Some((inputs.get(*port)?.first()?.stage, *needs))).collect() }
    }
}

impl Holding {
    /// Bytes by device where `placed` puts the stages.
    fn usage(&self, placed: &dyn Fn(usize) -> Placement) -> Usage {
        let held = self.roles.iter().map(|(role, needs)| Parts::of(needs, &placed(*role))).fold(Parts::default(), Parts::beside);
        // What it needs of its own stands where the first of them works.
        let devices = self.roles.iter().take(1).flat_map(|(role, _)| placed(*role).devices).take(1).collect();
        held.beside(Parts::of(&self.own, &Placement { devices, ..Placement::default() })).total()
    }
}

fn described(change: &Change<'_>, now: &Placement) -> String {
    let mut words = Vec::new();
    if change.zero != now.zero || change.devices > 1 {
        words.push(format!("zero = {}", change.zero));
    }
    if change.offload != now.offload {
        words.push("offload = \"cpu\"".to_owned());
    }
    words.extend(change.saving.iter().map(|(name, value)| format!("{name} = {value}")));
    let devices = if change.devices == 1 { "on 1 device".to_owned() } else { format!("on {} devices", change.devices) };
    if words.is_empty() { devices } else { format!("{} {devices}", words.join(", ")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GPU: DeviceSpec = DeviceSpec::Cuda(0);

    fn needs(parameter_bytes: u64, optimizer_bytes: u64, activation_bytes: u64) -> Needs {
        Needs { parameter_bytes, optimizer_bytes, activation_bytes, ..Needs::default() }
    }

    fn placed(devices: &[DeviceSpec], offload: Offload) -> Placement {
        Placement { devices: devices.to_vec(), processes: 1, zero: 0, offload }
    }

    #[test]
    fn models_stay_together_and_work_in_turn() {
        let actor = Parts::of(&needs(10, 20, 5), &placed(&[GPU, GPU], Offload::None));
        let reference = Parts::of(&needs(10, 0, 30), &placed(&[GPU], Offload::None));
        // Two ranks of the actor hold 30 each and pass 5 each; the reference adds 10, and passes 30 while they rest.
        assert_eq!(actor.beside(reference).total(), Usage::from([(GPU, 2 * 30 + 10 + 30)]));
    }

    #[test]
    fn ranks_without_work_hold_less() {
        let needs = Needs { working_ranks: 1, idle_bytes: 2, ..needs(10, 20, 5) };
        let of = |devices: &[DeviceSpec]| Parts::of(&needs, &placed(devices, Offload::None)).total();
        assert_eq!(of(&[GPU, DeviceSpec::Cuda(1)]), Usage::from([(GPU, 35), (DeviceSpec::Cuda(1), 32)]));
        assert_eq!(of(&[DeviceSpec::Cpu; 3]), Usage::from([(DeviceSpec::Cpu, 3 * 30 + 5 + 2 + 2)]));
    }

    /// Three models of 10, 10 and 6, of which one is awake at a time.
    #[test]
    fn of_parked_models_the_largest_counts() {
        let needs = Needs { resting_bytes: 16, ..needs(26, 0, 5) };
        assert_eq!(Parts::of(&needs, &placed(&[GPU], Offload::Cpu)).total(), Usage::from([(DeviceSpec::Cpu, 26), (GPU, 15)]));
        assert_eq!(Parts::of(&needs, &placed(&[GPU], Offload::None)).total(), Usage::from([(GPU, 31)]));
    }

    #[test]
    fn what_is_offloaded_lives_on_the_host() {
        let trained = Parts::of(&needs(10, 20, 5), &placed(&[GPU], Offload::Cpu)).total();
        assert_eq!(trained, Usage::from([(DeviceSpec::Cpu, 20), (GPU, 15)]));
        let frozen = Parts::of(&needs(10, 0, 5), &placed(&[GPU], Offload::Cpu));
        // A parked model takes the device only while it works.
        assert_eq!(frozen.lasting, Usage::from([(DeviceSpec::Cpu, 10)]));
        assert_eq!(frozen.total(), Usage::from([(DeviceSpec::Cpu, 10), (GPU, 15)]));
        assert_eq!(Parts::of(&needs(10, 20, 5), &placed(&[DeviceSpec::Cpu], Offload::Cpu)).total(), Usage::from([(DeviceSpec::Cpu, 35)]));
    }
}

//! Memory of devices: what stages take of it, what does not fit, and what would.

use std::collections::BTreeMap;

use rlflow_api::{DeviceSpec, Needs, Offload, Placement, Problem, ZeroSetting};
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
        for device in &placement.devices {
            let (lasting, passing): (fn(&mut Self) -> &mut Usage, fn(&mut Self) -> &mut Usage) = (|p| &mut p.lasting, |p| &mut p.passing);
            add(passing, *device, needs.passing_bytes());
            match (placement.offload, *device, needs.optimizer_bytes) {
                (Offload::None, ..) | (_, DeviceSpec::Cpu, _) => add(lasting, *device, needs.lasting_bytes()),
                // A frozen model is on the device only while it works.
                (Offload::Cpu, _, 0) => {
                    add(lasting, DeviceSpec::Cpu, needs.parameter_bytes);
                    add(passing, *device, needs.parameter_bytes);
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

/// Another way to place a stage.
struct Change {
    zero: u8,
    devices: usize,
    offload: Offload,
    checkpointing: bool,
}

impl Actions<'_> {
    /// What a stage takes of each device at its peak, as its kind predicts it.
    pub fn usage(&self, stage: usize) -> Usage {
        let roles = self.roles(stage);
        if roles.is_empty() {
            return Parts::of(&self.needs(stage), self.placement(stage)).total();
        }
        self.with_roles(stage, &roles, &|role| self.placement(role).clone())
    }

    /// The same for a stage that holds models of others where `placed` puts them.
    fn with_roles(&self, stage: usize, roles: &[(usize, Needs)], placed: &dyn Fn(usize) -> Placement) -> Usage {
        let held = roles.iter().map(|(role, needs)| Parts::of(needs, &placed(*role))).fold(Parts::default(), Parts::beside);
        // What it needs of its own stands where the first of them works.
        let devices = roles.iter().take(1).flat_map(|(role, _)| placed(*role).devices).take(1).collect();
        held.beside(Parts::of(&self.needs(stage), &Placement { devices, ..Placement::default() })).total()
    }

    /// Memory of a rank of the stage with the models of others that it holds: they stay side by side, and work in turn.
    pub fn rank_needs(&self, stage: usize) -> Needs {
        let own = self.needs(stage);
        self.roles(stage).into_iter().fold(own, |all, (_, role)| Needs {
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
                let open: Vec<usize> = self.roles(stage).into_iter().filter(open).map(|(role, _)| role).collect();
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
            let message = format!("device `{device}` is declared in `[devices]`, but this machine has none");
            let problem = Problem::new("device_unavailable", "device", message);
            return Some(self.workflow.error(stage, &problem.hint("`rlflow plan` plans for it; to run, name devices that are here")));
        }
        let (device, bytes, capacity) = self.too_large(stage)?;
        let roles = self.roles(stage);
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

    /// Settings under which a stage fits, with what it then takes of the device: the smallest change first.
    fn ways(&self, stage: usize, device: DeviceSpec, capacity: u64) -> Vec<String> {
        let now = self.placement(stage);
        let same = self.planned.devices.iter().filter(|known| (known.spec == DeviceSpec::Cpu) == (device == DeviceSpec::Cpu)).count();
        let count = now.devices.len();
        // Ranks on one CPU share its memory: there, fewer need less.
        let more = (count + 1..=same).filter(|more| more.is_power_of_two() || *more == same);
        let fewer = (device == DeviceSpec::Cpu && count > 1).then_some(1);
        let counts = std::iter::once(count).chain(fewer).chain(more);
        let mut ways = Vec::new();
        for devices in counts {
            for (offload, checkpointing) in [(now.offload, false), (now.offload, true), (Offload::Cpu, false), (Offload::Cpu, true)] {
                let levels = if devices * now.processes == 1 { 0..=0 } else { 0..=3 };
                let change = |zero| Change { zero, devices, offload, checkpointing };
                let fits = |change: Change| Some((self.changed(stage, device, &change)?, change));
                let found = levels.filter_map(|zero| fits(change(zero))).find(|(bytes, _)| *bytes <= capacity);
                if let Some((bytes, change)) = found {
                    ways.push(format!("{}: {}", described(&change, now), text::bytes(bytes)));
                    if ways.len() == 3 {
                        return ways;
                    }
                    break;
                }
            }
        }
        ways
    }

    /// What the device would hold of a stage that is placed otherwise.
    fn changed(&self, stage: usize, device: DeviceSpec, change: &Change) -> Option<u64> {
        let processes = self.placement(stage).processes;
        let needs = self.needs_as(stage, change.devices * processes, change.zero, change.checkpointing)?;
        let spec = |index: usize| if device == DeviceSpec::Cpu { device } else { DeviceSpec::Cuda(index) };
        let devices = (0..change.devices).map(spec).collect();
        let usage = Parts::of(&needs, &Placement { devices, processes, zero: change.zero, offload: change.offload }).total();
        if !self.has_room_beside(&usage, device) {
            return None;
        }
        let most = usage.into_iter().filter(|(used, _)| (*used == DeviceSpec::Cpu) == (device == DeviceSpec::Cpu)).map(|(_, bytes)| bytes);
        most.max()
    }

    /// Whether what stands on devices of another sort than `device` fits there.
    fn has_room_beside(&self, usage: &Usage, device: DeviceSpec) -> bool {
        let is_host = |device: DeviceSpec| device == DeviceSpec::Cpu;
        let mut others = usage.iter().filter(|(used, _)| is_host(**used) != is_host(device));
        others.all(|(used, bytes)| self.capacity(*used).is_none_or(|capacity| *bytes <= capacity))
    }

    fn needs_as(&self, stage: usize, ranks: usize, zero: u8, checkpointing: bool) -> Option<Needs> {
        let found = &self.workflow.stages[stage];
        if !checkpointing {
            return Some(self.workflow.describe(stage, ranks, zero).ok()?.needs);
        }
        let mut settings = found.config.settings().clone();
        *settings.get_mut("gradient_checkpointing").filter(|known| **known == Value::Bool(false))? = json!(true);
        let config = found.kind.parse(&settings).ok()?;
        Some(self.workflow.describe_as(stage, &config, ranks, zero).ok()?.needs)
    }

    /// The same for a stage that holds the models of others: changes of all of them at once.
    fn ways_of_roles(&self, stage: usize, device: DeviceSpec, capacity: u64) -> Vec<String> {
        let of = |zero: Option<u8>, offload: Option<Offload>| {
            let placement = |role: usize| {
                let now = self.placement(role);
                Placement { zero: zero.unwrap_or(now.zero), offload: offload.unwrap_or(now.offload), ..now.clone() }
            };
            let held = self.workflow.held(stage, &|role| (placement(role).ranks(), placement(role).zero)).unwrap_or_default();
            let usage = self.with_roles(stage, &self.with_stages(stage, &held), &placement);
            if self.has_room_beside(&usage, device) { usage.get(&device).copied().unwrap_or(0) } else { u64::MAX }
        };
        let ways = [
            (of(Some(3), None), "zero = 3 for all of them"),
            (of(None, Some(Offload::Cpu)), "offload = \"cpu\" for all of them"),
            (of(Some(3), Some(Offload::Cpu)), "zero = 3 and offload = \"cpu\" for all of them"),
        ];
        let fits = ways.into_iter().filter(|(bytes, _)| *bytes <= capacity);
        fits.map(|(bytes, way)| format!("{way}: {}", text::bytes(bytes))).take(2).collect()
    }

    /// Stages whose models a stage holds, placed where those are, with memory per rank.
    fn roles(&self, stage: usize) -> Vec<(usize, Needs)> {
        let described = self.workflow.stages[stage].described.holds();
        if described.is_empty() {
            return Vec::new();
        }
        let roles = self.with_stages(stage, described);
        if !roles.iter().any(|(role, _)| self.chooses_level(*role) || self.placement(*role).processes > 1) {
            return roles;
        }
        let placed = |role: usize| (self.placement(role).ranks(), self.placement(role).zero);
        self.workflow.held(stage, &placed).map_or(roles, |held| self.with_stages(stage, &held))
    }

    fn with_stages(&self, stage: usize, held: &[(&'static str, Needs)]) -> Vec<(usize, Needs)> {
        let inputs = &self.workflow.stages[stage].inputs;
        held.iter().filter_map(|(port, needs)| Some((inputs.get(*port)?.first()?.stage, *needs))).collect()
    }
}

fn described(change: &Change, now: &Placement) -> String {
    let mut words = Vec::new();
    if change.zero != now.zero || change.devices > 1 {
        words.push(format!("zero = {}", change.zero));
    }
    if change.offload != now.offload {
        words.push("offload = \"cpu\"".to_owned());
    }
    if change.checkpointing {
        words.push("gradient_checkpointing = true".to_owned());
    }
    let devices = if change.devices == 1 { "1 device".to_owned() } else { format!("{} devices", change.devices) };
    format!("{} on {devices}", words.join(", "))
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

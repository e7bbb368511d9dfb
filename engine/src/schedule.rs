use std::collections::{BTreeMap, BTreeSet};

use rlflow_api::DeviceSpec;

use crate::{memory::Usage, workflow::Dag};

/// Where a stage stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Not asked for.
    Unselected,
    /// Not decided about: an input is missing, or nobody looked yet.
    Waiting,
    /// Must run and can.
    Ready,
    /// Runs.
    Running,
    /// Has its result.
    Settled,
    /// Has none and will not get one in this run.
    Over,
}

/// Which stage comes next: keeps the order of the DAG, the number of jobs and the devices. Knows nothing of keys or stores.
///
/// A stage whose inputs are settled is handed out once by [`Schedule::next_undecided`]; the caller says whether it is
/// settled at once (cached) or [`Schedule::ready`] to run, and ready stages are handed out by [`Schedule::start`].
pub struct Schedule {
    state: Vec<State>,
    /// Inputs (stages, each once) that are not settled.
    unsettled: Vec<usize>,
    dependents: Vec<Vec<usize>>,
    /// Place in topological order.
    position: Vec<usize>,
    order: Vec<usize>,
    undecided: BTreeSet<usize>,
    ready: BTreeSet<usize>,
    running: BTreeMap<usize, Usage>,
    jobs: usize,
}

impl Schedule {
    /// Of the selected stages, at most `jobs` at once. What a selected stage needs must be selected too.
    pub fn new(dag: &Dag, order: &[usize], selected: impl Fn(usize) -> bool, jobs: usize) -> Self {
        let count = dag.len();
        let state: Vec<State> = (0..count).map(|stage| if selected(stage) { State::Waiting } else { State::Unselected }).collect();
        let dependents: Vec<Vec<usize>> = (0..count)
            .map(|stage| dag.dependents(stage).into_iter().filter(|dependent| state[*dependent] != State::Unselected).collect())
            .collect();
        let mut unsettled = vec![0; count];
        for (stage, dependents) in dependents.iter().enumerate() {
            if state[stage] != State::Unselected {
                dependents.iter().for_each(|dependent| unsettled[*dependent] += 1);
            }
        }
        let mut position = vec![0; count];
        order.iter().enumerate().for_each(|(at, stage)| position[*stage] = at);
        let undecided = (0..count).filter(|stage| state[*stage] == State::Waiting && unsettled[*stage] == 0);
        let undecided = undecided.map(|stage| position[stage]).collect();
        let order = order.to_vec();
        let (ready, running) = (BTreeSet::new(), BTreeMap::new());
        Self { state, unsettled, dependents, position, order, undecided, ready, running, jobs: jobs.max(1) }
    }

    /// The next stage to decide about, in topological order.
    pub fn next_undecided(&mut self) -> Option<usize> {
        while let Some(position) = self.undecided.pop_first() {
            let stage = self.order[position];
            if self.is_undecided(stage) {
                return Some(stage);
            }
        }
        None
    }

    /// Whether the stage can be decided about, and is not.
    pub fn is_undecided(&self, stage: usize) -> bool {
        self.state[stage] == State::Waiting && self.unsettled[stage] == 0
    }

    /// The stage must run.
    pub fn ready(&mut self, stage: usize) {
        self.state[stage] = State::Ready;
        self.ready.insert(self.position[stage]);
    }

    /// The stage has its result. If that is not what it was before (`changed`), stages that were settled with the old
    /// one are undecided again.
    pub fn settle(&mut self, stage: usize, changed: bool) {
        self.running.remove(&stage);
        if self.state[stage] == State::Settled {
            return;
        }
        self.state[stage] = State::Settled;
        for dependent in self.dependents[stage].clone() {
            self.unsettled[dependent] -= 1;
            if changed && self.state[dependent] == State::Settled {
                self.reopen(dependent);
            }
            self.look_at(dependent);
        }
    }

    /// Takes a settled stage's result away: it is undecided, and so is what was about to run on its result.
    pub fn reopen(&mut self, stage: usize) {
        if self.state[stage] != State::Settled {
            return;
        }
        self.state[stage] = State::Waiting;
        for dependent in self.dependents[stage].clone() {
            self.unsettled[dependent] += 1;
            if self.state[dependent] == State::Ready {
                self.ready.remove(&self.position[dependent]);
                self.state[dependent] = State::Waiting;
            }
        }
        self.look_at(stage);
    }

    /// A stage that ran, or was about to, is undecided again.
    pub fn retry(&mut self, stage: usize) {
        self.running.remove(&stage);
        self.ready.remove(&self.position[stage]);
        self.state[stage] = State::Waiting;
        self.look_at(stage);
    }

    fn look_at(&mut self, stage: usize) {
        if self.is_undecided(stage) {
            self.undecided.insert(self.position[stage]);
        }
    }

    /// The stage gave nothing. Returns the stages that cannot run because of it, in topological order.
    pub fn fail(&mut self, stage: usize) -> Vec<usize> {
        self.running.remove(&stage);
        self.ready.remove(&self.position[stage]);
        self.state[stage] = State::Over;
        let mut skipped = BTreeSet::new();
        let mut open = self.dependents[stage].clone();
        while let Some(stage) = open.pop() {
            if matches!(self.state[stage], State::Waiting | State::Ready) {
                self.ready.remove(&self.position[stage]);
                self.state[stage] = State::Over;
                skipped.insert(self.position[stage]);
                open.extend(&self.dependents[stage]);
            }
        }
        skipped.into_iter().map(|position| self.order[position]).collect()
    }

    /// The next ready stage that finds a free job and room on its devices beside what runs there; it is running from now on.
    /// What fits no device by itself was refused before; where capacities are unknown, memory is no limit.
    pub fn start(&mut self, usage: impl Fn(usize) -> Usage, capacity: impl Fn(DeviceSpec) -> Option<u64>) -> Option<usize> {
        if self.running.len() >= self.jobs {
            return None;
        }
        let busy = |device: DeviceSpec| self.running.values().filter_map(|usage| usage.get(&device)).sum::<u64>();
        let fits = |(device, bytes): (&DeviceSpec, &u64)| match (busy(*device), capacity(*device)) {
            (0, _) | (_, None) => true,
            (busy, Some(capacity)) => busy + bytes <= capacity,
        };
        let (position, usage) = self.ready.iter().find_map(|position| {
            let usage = usage(self.order[*position]);
            usage.iter().all(fits).then_some((*position, usage))
        })?;
        self.ready.remove(&position);
        let stage = self.order[position];
        self.state[stage] = State::Running;
        self.running.insert(stage, usage);
        Some(stage)
    }

    /// Whether nothing runs.
    pub fn is_idle(&self) -> bool {
        self.running.is_empty()
    }

    /// Stages that were neither settled nor given up, in topological order.
    pub fn unfinished(&self) -> Vec<usize> {
        let open = |stage: &usize| matches!(self.state[*stage], State::Waiting | State::Ready | State::Running);
        self.order.iter().copied().filter(open).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// a -> b -> d, a -> c -> d.
    fn diamond(jobs: usize) -> Schedule {
        let dag = Dag::new(4, [(0, 1), (0, 2), (1, 3), (2, 3)]);
        Schedule::new(&dag, &[0, 1, 2, 3], |_| true, jobs)
    }

    fn cpu(_: usize) -> Usage {
        Usage::from([(DeviceSpec::Cpu, 60)])
    }

    fn large(_: DeviceSpec) -> Option<u64> {
        Some(1_000)
    }

    fn decide_all_ready(schedule: &mut Schedule) -> Vec<usize> {
        let mut found = Vec::new();
        while let Some(stage) = schedule.next_undecided() {
            schedule.ready(stage);
            found.push(stage);
        }
        found
    }

    #[test]
    fn independent_stages_run_together_when_jobs_allow() {
        let mut schedule = diamond(2);
        assert_eq!(decide_all_ready(&mut schedule), [0]);
        assert_eq!((schedule.start(cpu, large), schedule.start(cpu, large)), (Some(0), None));
        schedule.settle(0, true);
        assert_eq!(decide_all_ready(&mut schedule), [1, 2]);
        assert_eq!((schedule.start(cpu, large), schedule.start(cpu, large)), (Some(1), Some(2)));
        schedule.settle(2, true);
        assert_eq!(decide_all_ready(&mut schedule), [] as [usize; 0]);
        schedule.settle(1, true);
        assert_eq!(decide_all_ready(&mut schedule), [3]);
    }

    #[test]
    fn one_job_runs_one_stage() {
        let mut schedule = diamond(1);
        schedule.next_undecided();
        schedule.settle(0, true);
        decide_all_ready(&mut schedule);
        assert_eq!((schedule.start(cpu, large), schedule.start(cpu, large)), (Some(1), None));
    }

    #[test]
    fn stages_run_side_by_side_where_they_fit_and_never_over() {
        let ready = || {
            let mut schedule = diamond(4);
            schedule.next_undecided();
            schedule.settle(0, true);
            decide_all_ready(&mut schedule);
            schedule
        };
        let on = |device, bytes| move |_: usize| Usage::from([(device, bytes)]);
        let of = |bytes| move |_: DeviceSpec| Some(bytes);
        let gpu = DeviceSpec::Cuda(0);
        let mut schedule = ready();
        assert_eq!((schedule.start(on(gpu, 60), of(100)), schedule.start(on(gpu, 60), of(100))), (Some(1), None));
        assert_eq!(schedule.start(on(DeviceSpec::Cuda(1), 60), of(100)), Some(2));
        let mut schedule = ready();
        assert_eq!((schedule.start(on(gpu, 60), of(120)), schedule.start(on(gpu, 60), of(120))), (Some(1), Some(2)));
        // What gave back its memory makes room.
        let mut schedule = ready();
        schedule.start(on(gpu, 60), of(100));
        schedule.settle(1, true);
        assert_eq!(schedule.start(on(gpu, 60), of(100)), Some(2));
    }

    #[test]
    fn a_failure_skips_what_needs_it_and_nothing_else() {
        let mut schedule = diamond(2);
        schedule.next_undecided();
        schedule.settle(0, true);
        decide_all_ready(&mut schedule);
        schedule.start(cpu, large);
        assert_eq!(schedule.fail(1), [3]);
        assert_eq!(schedule.start(cpu, large), Some(2));
        schedule.settle(2, true);
        assert_eq!(schedule.next_undecided(), None);
        assert_eq!(schedule.unfinished(), [] as [usize; 0]);
    }

    #[test]
    fn a_reopened_stage_is_decided_again_and_its_dependents_only_if_it_changed() {
        for changed in [false, true] {
            let mut schedule = diamond(2);
            for _ in 0..3 {
                let stage = schedule.next_undecided().unwrap();
                schedule.settle(stage, true);
            }
            assert_eq!(schedule.next_undecided(), Some(3));
            schedule.ready(3);
            schedule.reopen(0);
            // 3 does not read 0, so it stays ready; its inputs 1 and 2 are settled.
            assert_eq!(schedule.next_undecided(), Some(0));
            schedule.ready(0);
            assert_eq!(schedule.start(cpu, large), Some(0));
            schedule.settle(0, changed);
            let again: Vec<usize> = std::iter::from_fn(|| schedule.next_undecided()).collect();
            assert_eq!(again, if changed { vec![1, 2] } else { vec![] });
        }
    }

    #[test]
    fn what_was_ready_waits_for_its_reopened_input() {
        let mut schedule = diamond(1);
        for _ in 0..3 {
            let stage = schedule.next_undecided().unwrap();
            schedule.settle(stage, true);
        }
        schedule.next_undecided();
        schedule.ready(3);
        schedule.reopen(2);
        assert_eq!(schedule.next_undecided(), Some(2));
        schedule.ready(2);
        assert_eq!(schedule.start(cpu, large), Some(2));
        assert_eq!(schedule.start(cpu, large), None);
        schedule.settle(2, false);
        assert_eq!(schedule.next_undecided(), Some(3));
    }
}

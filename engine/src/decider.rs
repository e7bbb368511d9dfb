use std::{
    collections::{BTreeMap, BTreeSet},
    iter,
};

use crate::{
    RerunReason, Result,
    action::{Actions, Decision, Outputs, Unreadable},
    memory::Usage,
    schedule::Schedule,
};

/// Which stages have their results, which run, and for which reader a result that is gone is made again. A plan and a run go
/// through a workflow here in one order, so that they give the same reasons.
///
/// Only of what runs for a reason of its own a plan cannot know what it gives, so what nothing but its readers would miss is not in a plan.
pub(crate) struct Decider<'a> {
    actions: &'a Actions<'a>,
    /// Who comes next.
    pub schedule: Schedule,
    /// Results, also of stages that are made again.
    outputs: Vec<Option<Outputs>>,
    /// Reasons to run a stage whatever its key.
    must_run: BTreeMap<usize, RerunReason>,
    /// Stages of which a plan takes it that they were made again.
    made_again: BTreeSet<usize>,
}

impl<'a> Decider<'a> {
    /// Nothing is decided yet. At most `jobs` stages are started at once.
    pub fn new(actions: &'a Actions<'a>, jobs: usize) -> Self {
        let workflow = actions.workflow;
        Self {
            actions,
            schedule: Schedule::new(&workflow.dag, &workflow.order, |stage| actions.is_selected(stage), jobs),
            outputs: vec![None; workflow.stages.len()],
            must_run: BTreeMap::new(),
            made_again: BTreeSet::new(),
        }
    }

    /// Results by stage.
    pub fn outputs(&self) -> &[Option<Outputs>] {
        &self.outputs
    }

    /// Decides about every stage whose inputs are settled, in order. What is cached is settled by that, what must run and can is ready;
    /// of a stage that comes twice, since a result turned out to be gone, the last decision counts.
    pub fn decide(&mut self) -> Result<Vec<(usize, Decision)>> {
        let mut decided = Vec::new();
        loop {
            let stages: Vec<usize> = iter::from_fn(|| self.schedule.next_undecided()).collect();
            if stages.is_empty() {
                return Ok(decided);
            }
            let decisions = self.actions.decide_all(&stages, &self.outputs, &|stage| self.must_run.get(&stage).cloned());
            for (stage, decision) in stages.into_iter().zip(decisions) {
                // Another one of them may have found that an input of this one is gone.
                if !self.schedule.is_undecided(stage) {
                    continue;
                }
                let decision = decision?;
                match &decision {
                    Decision::Cached { outputs, .. } => self.settle(stage, outputs.clone()),
                    Decision::Run(action) => {
                        let mut lost = self.actions.unreadable_inputs(action)?;
                        lost.retain(|lost| !self.made_again.contains(&lost.stage));
                        if !lost.is_empty() {
                            self.make_again(stage, &lost);
                            continue;
                        }
                        self.schedule.ready(stage);
                    }
                }
                decided.push((stage, decision));
            }
        }
    }

    /// The stage has its result.
    pub fn settle(&mut self, stage: usize, outputs: Outputs) {
        let changed = self.outputs[stage].as_ref().is_some_and(|before| *before != outputs);
        self.outputs[stage] = Some(outputs);
        self.must_run.remove(&stage);
        self.schedule.settle(stage, changed);
    }

    /// These inputs of `reader` are made again, for the first that needs them, and then it is decided about again.
    pub fn make_again(&mut self, reader: usize, lost: &[Unreadable]) {
        let name = &self.actions.workflow.stages[reader].name;
        for lost in lost {
            self.must_run.entry(lost.stage).or_insert_with(|| lost.reason(name));
            self.schedule.reopen(lost.stage);
        }
        self.schedule.retry(reader);
    }

    /// For a plan: the next stage that is ready, if it makes its result again, has made it as it was. Whether there was one.
    pub fn assume_made_again(&mut self) -> bool {
        // What runs for another reason stays with those that run: nobody knows what it will give.
        while let Some(stage) = self.schedule.start(|_| Usage::new(), |_| None) {
            if let Some(outputs) = self.outputs[stage].clone() {
                self.made_again.insert(stage);
                self.settle(stage, outputs);
                return true;
            }
        }
        false
    }
}

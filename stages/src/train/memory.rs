//! What a rank holds, counted while a stage runs.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use rlflow_api::{DeviceSpec, Offload, Placement, Processes, RunContext, StageResult};
use rlflow_model::{Layout, Ledger};

use super::burn_device;

/// The counts of a stage's ranks. Models on one device share its count, so that the peak is that of the device.
#[derive(Debug, Default)]
pub struct Memory {
    ledgers: Mutex<BTreeMap<(DeviceSpec, usize), Arc<Ledger>>>,
    processes: Processes,
}

impl Memory {
    /// Of a stage that these processes run.
    pub fn of(processes: &Processes) -> Self {
        Self { processes: processes.clone(), ..Self::default() }
    }

    /// The Burn devices of a placement, one per rank.
    ///
    /// # Errors
    /// If this build lacks one of them.
    pub fn layout(&self, placement: &Placement) -> StageResult<Layout> {
        let devices = placement.devices.iter().map(|device| burn_device(*device)).collect::<StageResult<_>>()?;
        let mut known = self.ledgers.lock().unwrap_or_else(PoisonError::into_inner);
        let places = placement.devices.iter().enumerate();
        let ledgers = places.map(|(rank, device)| known.entry((*device, rank)).or_default().clone()).collect();
        let offload = placement.offload == Offload::Cpu;
        Ok(Layout { devices, processes: self.processes.clone(), zero: placement.zero, offload, ledgers })
    }

    /// Reports what each rank held at its peak, and holds now.
    ///
    /// # Errors
    /// If another process fails.
    pub fn report(&self, context: &RunContext<'_>) -> StageResult<()> {
        let of_rank = |((device, rank), ledger): (&(DeviceSpec, usize), &Arc<Ledger>)| {
            let (peak, now) = (ledger.peak(), ledger.now());
            let totals = [("peak", peak.total()), ("now", now.total())].into_iter().chain(peak.parts());
            ((device.to_string(), *rank), totals.map(|(part, bytes)| (part.to_owned(), bytes)).collect::<Vec<_>>())
        };
        let own: Vec<_> = self.ledgers.lock().unwrap_or_else(PoisonError::into_inner).iter().map(of_rank).collect();
        let ranks = own.iter().map(|((_, rank), _)| rank + 1).max().unwrap_or(0);
        let all = self.processes.gather(own)?;
        let peaks = all.iter().flatten().flat_map(|(_, counts)| counts).filter(|(part, _)| part == "peak");
        context.measurement("memory/peak_bytes", peaks.map(|(_, bytes)| *bytes).max().unwrap_or(0) as f64);
        for (process, all) in all.into_iter().enumerate() {
            for ((device, rank), counts) in all {
                for (part, bytes) in counts {
                    context.measurement(&format!("memory/{device}/rank{}/{part}_bytes", process * ranks + rank), bytes as f64);
                }
            }
        }
        Ok(())
    }
}

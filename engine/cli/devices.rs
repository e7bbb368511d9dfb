use clap::Args;
use serde_json::json;

use rlflow_engine::text;

use crate::{
    common::Common,
    failure::{Failure, Outcome, print_line, print_text},
    host::host,
};

/// List what workflows can run on here
#[derive(Args)]
pub struct Devices {}

impl Devices {
    pub fn run(self, common: &Common) -> Result<Outcome, Failure> {
        let host = host();
        if common.json {
            let devices = host
                .devices
                .iter()
                .map(|device| json!({ "device": device.spec.to_string(), "name": device.name, "memory_bytes": device.memory_bytes }));
            print_line(&json!({ "devices": devices.collect::<Vec<_>>(), "numerics": host.numerics }).to_string());
            return Ok(Outcome::Done);
        }
        let row = |device: &rlflow_engine::DeviceInfo| vec![device.spec.to_string(), text::bytes(device.memory_bytes), device.name.clone()];
        print_text(&text::table(&["device", "memory", "name"], &host.devices.iter().map(row).collect::<Vec<_>>()));
        print_text(&format!("\nnumerics profile: {}\n", host.numerics));
        if host.devices.len() > 2 {
            let between =
                rlflow_stages::nccl().map_or_else(|reason| format!("host memory ({reason})"), |version| format!("NCCL {version}"));
            print_text(&format!("ranks on several GPUs exchange over {between}\n"));
        }
        Ok(Outcome::Done)
    }
}

//! Measures the machine's limits for a run, on the workers' side.

use super::progress::Progress;
use super::settings::Settings;
use crate::measure::host::Environment;
use crate::measure::limits::HostLimits;
use crate::worker::{Client, Workers};
use anyhow::{Context, Result, bail};
use evalfw_engine::protocol::{DeviceLimits, MeasureLimits};
use std::collections::BTreeMap;
use std::process::{Command, Stdio};
use std::time::Duration;

/// A GPU measures some large products; a scheduler may let them wait.
const TIMEOUT: Duration = Duration::from_secs(300);

#[derive(Default)]
pub struct RunLimits {
    pub host: Option<HostLimits>,
    pub devices: BTreeMap<String, DeviceLimits>,
}

impl Settings {
    /// Those of the host, and of the GPU of each of these engines. A limit that cannot be measured is left out and said
    /// so: speeds then stand alone.
    pub fn limits<'a>(&self, gpu_engines: impl Iterator<Item = &'a str>, progress: &Progress) -> RunLimits {
        let mut limits = RunLimits::default();
        if self.no_limits {
            return limits;
        }
        match host_limits(&self.workers) {
            Ok(host) => limits.host = Some(host),
            Err(error) => progress.say(&format!("the machine's limits were not measured: {error:#}")),
        }
        for engine in gpu_engines {
            match device_limits(engine, &self.workers) {
                Ok(device) => drop(limits.devices.insert(engine.to_owned(), device)),
                Err(error) => progress.say(&format!("{engine}: limits were not measured: {error:#}")),
            }
        }
        limits
    }
}

/// In a process of its own, so that the harness stays small.
fn host_limits(workers: &Workers) -> Result<HostLimits> {
    let arguments = ["limits", "--json"];
    let mut command = match &workers.launcher {
        None => {
            let mut command = Command::new(std::env::current_exe()?);
            command.args(arguments);
            command
        }
        Some(launcher) => {
            let (program, arguments) = launcher.command(&arguments)?;
            let mut command = Command::new(program);
            command.args(arguments);
            command
        }
    };
    if let Some(threads) = workers.threads {
        command.env("RAYON_NUM_THREADS", threads.to_string());
    }
    let output = command.stdin(Stdio::null()).output()?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        bail!("{}", text.lines().last().unwrap_or("the process that measures them failed"));
    }
    serde_json::from_slice(&output.stdout).context("what was printed is not JSON")
}

fn device_limits(engine: &str, workers: &Workers) -> Result<DeviceLimits> {
    let mut client = Client::start(&workers.of_engine(engine)?, None, TIMEOUT)?;
    client.hello()?;
    let limits = client.call(MeasureLimits {})?;
    // They are told; how the worker ends changes nothing.
    let _ = client.finish();
    Ok(limits)
}

/// The machine that the workers run on.
pub fn machine(engine: &str, workers: &Workers) -> Result<Environment> {
    if workers.launcher.is_none() {
        return Ok(Environment::detect());
    }
    let mut client = Client::start(&workers.of_engine(engine)?, None, TIMEOUT)?;
    client.hello()?;
    let environment = client.environment()?;
    let _ = client.finish();
    Ok(environment)
}

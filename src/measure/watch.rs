//! The machine's state while a cell runs: what else took its time, and what slowed it down.

use super::memory::{MemoryFigures, MemoryProbe};
use serde::{Deserialize, Serialize};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const INTERVAL: Duration = Duration::from_secs(1);

/// Share of all cores' time that others may take. Engines wait for their slowest thread, so that a little elsewhere costs
/// a lot here.
const OTHERS_SHARE: f64 = 0.05;
/// Share of all cores' time that a hypervisor may give to other machines.
const STOLEN_SHARE: f64 = 0.02;
/// Share of the time in which a control group's quota may hold the worker.
const THROTTLED_SHARE: f64 = 0.01;
/// Of the highest clock in the same cell: below it, the CPU has been slowed down.
const SLOW_CLOCK: f64 = 0.8;
/// Shares of a shorter time say nothing.
const SHORTEST_SECONDS: f64 = 1.0;
const SWAPPED_BYTES: u64 = 16_000_000;

/// What was seen; `None` where the system does not tell.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Surroundings {
    pub seconds: f64,
    pub logical_cores: usize,
    /// Cores that processes other than the worker's and the harness kept busy, in the mean.
    pub other_cores: Option<f64>,
    /// The most of it within one second.
    pub other_cores_peak: Option<f64>,
    /// Cores that the hypervisor gave to other machines, in the mean.
    pub stolen_cores: Option<f64>,
    /// Time in which a control group's quota held the group.
    pub throttled_seconds: Option<f64>,
    /// Times that a core was slowed down for its heat.
    pub thermal_throttles: Option<u64>,
    /// To swap and back, by all programs.
    pub swapped_bytes: Option<u64>,
    /// Of the fastest core, while the worker was busy.
    pub lowest_mhz: Option<f64>,
    pub highest_mhz: Option<f64>,
    pub on_battery: Option<bool>,
    /// Why the driver slowed a GPU down.
    pub gpu_slowdowns: Vec<String>,
}

impl Surroundings {
    /// What makes the cell's speed doubtful, in words; empty for a cell that was left alone.
    pub fn disturbances(&self) -> Vec<String> {
        let cores = self.logical_cores.max(1) as f64;
        // What of all the time there was, if that is more than the limit. The system counts in hundredths of a second.
        let over = |used: Option<f64>, of: f64, limit: f64| {
            let share = used.map(|used| used / of).filter(|_| self.seconds >= SHORTEST_SECONDS)?;
            (share > limit).then(|| format!("{:.0} %", share * 100.0))
        };
        let fell = self.lowest_mhz.zip(self.highest_mhz).filter(|(low, high)| *low < SLOW_CLOCK * high);
        let swapped = self.swapped_bytes.filter(|bytes| *bytes > SWAPPED_BYTES);
        let found = [
            over(self.other_cores, cores, OTHERS_SHARE)
                .map(|s| format!("other processes took {s} of the CPU")),
            over(self.stolen_cores, cores, STOLEN_SHARE)
                .map(|s| format!("the hypervisor took {s} of the CPU")),
            over(self.throttled_seconds, self.seconds, THROTTLED_SHARE)
                .map(|s| format!("a CPU quota held the worker {s} of the time")),
            self.thermal_throttles
                .filter(|n| *n > 0)
                .map(|n| format!("the CPU was slowed for its heat {n} times")),
            fell.map(|(low, high)| format!("the CPU's clock fell from {high:.0} to {low:.0} MHz")),
            swapped.map(|bytes| format!("{:.0} MB were swapped", bytes as f64 / 1e6)),
            self.on_battery.filter(|on| *on).map(|_| "on battery".to_owned()),
            (!self.gpu_slowdowns.is_empty()).then(|| format!("GPU: {}", self.gpu_slowdowns.join(", "))),
        ];
        found.into_iter().flatten().collect()
    }
}

/// Everything that is observed of a worker from outside.
pub struct Observer {
    memory: MemoryProbe,
    watch: Watch,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Observations {
    pub memory: MemoryFigures,
    pub surroundings: Surroundings,
}

impl Observer {
    pub fn start(pid: u32) -> Self {
        Self { memory: MemoryProbe::start(pid), watch: Watch::start(pid) }
    }

    pub fn begin_phase(&self, name: &str) {
        self.memory.begin_phase(name);
    }

    pub fn finish(self) -> Observations {
        Observations { surroundings: self.watch.finish(), memory: self.memory.finish() }
    }
}

/// Watches until it is finished or dropped.
struct Watch {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<Surroundings>>,
}

impl Watch {
    fn start(pid: u32) -> Self {
        let (stop, stopped) = channel::<()>();
        let thread = std::thread::spawn(move || {
            let mut seen = Seen::new(pid);
            while stopped.recv_timeout(INTERVAL) == Err(RecvTimeoutError::Timeout) {
                seen.look();
            }
            seen.finish()
        });
        Self { stop: Some(stop), thread: Some(thread) }
    }

    fn finish(mut self) -> Surroundings {
        self.end()
    }

    fn end(&mut self) -> Surroundings {
        drop(self.stop.take());
        self.thread.take().and_then(|thread| thread.join().ok()).unwrap_or_default()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.end();
    }
}

/// Counters that only grow, and states.
#[derive(Default, Clone)]
struct Counters {
    /// Seconds of all cores.
    busy: Option<f64>,
    stolen: Option<f64>,
    /// Of the worker's tree and of this process.
    own: f64,
    throttled: Option<f64>,
    thermal: Option<u64>,
    swapped: Option<u64>,
    mhz: Option<f64>,
}

struct Seen {
    pid: u32,
    began: Instant,
    first: Counters,
    last: (Instant, Counters),
    surroundings: Surroundings,
}

impl Seen {
    fn new(pid: u32) -> Self {
        let (now, counters) = (Instant::now(), os::counters(pid));
        let surroundings = Surroundings {
            logical_cores: std::thread::available_parallelism().map_or(1, |n| n.get()),
            on_battery: os::on_battery(),
            ..Surroundings::default()
        };
        Self { pid, began: now, first: counters.clone(), last: (now, counters), surroundings }
    }

    fn look(&mut self) {
        let (now, counters) = (Instant::now(), os::counters(self.pid));
        let seconds = (now - self.last.0).as_secs_f64();
        let before = &self.last.1;
        let own = counters.own - before.own;
        if seconds > INTERVAL.as_secs_f64() / 2.0 {
            let others = others(before, &counters).map(|others| others / seconds);
            let seen = &mut self.surroundings;
            seen.other_cores_peak = larger(seen.other_cores_peak, others);
            // An idle core clocks down, which says nothing.
            if let Some(mhz) = counters.mhz.filter(|_| own / seconds > 0.5) {
                seen.lowest_mhz = Some(seen.lowest_mhz.map_or(mhz, |low| low.min(mhz)));
                seen.highest_mhz = larger(seen.highest_mhz, Some(mhz));
            }
        }
        for slowdown in gpu_slowdowns() {
            if !self.surroundings.gpu_slowdowns.contains(&slowdown) {
                self.surroundings.gpu_slowdowns.push(slowdown);
            }
        }
        // The worker may be gone at the end: its time is that of the last look that saw it.
        if own >= 0.0 {
            self.last = (now, counters);
        }
    }

    fn finish(mut self) -> Surroundings {
        self.look();
        let (at, last) = &self.last;
        let seconds = (*at - self.began).as_secs_f64();
        let first = &self.first;
        let per_second = |value: f64| value / seconds.max(1e-3);
        let grown = |of: fn(&Counters) -> Option<u64>| Some(of(last)?.saturating_sub(of(first)?));
        self.surroundings.seconds = seconds;
        self.surroundings.other_cores = others(first, last).map(per_second);
        self.surroundings.stolen_cores = difference(first.stolen, last.stolen).map(per_second);
        self.surroundings.throttled_seconds = difference(first.throttled, last.throttled);
        self.surroundings.thermal_throttles = grown(|c| c.thermal);
        self.surroundings.swapped_bytes = grown(|c| c.swapped);
        self.surroundings
    }
}

/// Seconds that neither the worker's tree nor this process was busy.
fn others(before: &Counters, after: &Counters) -> Option<f64> {
    Some((difference(before.busy, after.busy)? - (after.own - before.own)).max(0.0))
}

fn difference(before: Option<f64>, after: Option<f64>) -> Option<f64> {
    Some(after? - before?)
}

fn larger(a: Option<f64>, b: Option<f64>) -> Option<f64> {
    match (a, b) {
        (Some(a), Some(b)) => Some(a.max(b)),
        (a, b) => a.or(b),
    }
}

/// Heat and a failing power supply; a limit of power alone is how a GPU runs under load.
#[cfg(not(target_os = "macos"))]
fn gpu_slowdowns() -> Vec<String> {
    use nvml_wrapper::bitmasks::device::ThrottleReasons;
    let Some(nvml) = super::memory::gpu::nvml() else { return Vec::new() };
    let reasons = [
        (ThrottleReasons::SW_THERMAL_SLOWDOWN, "slowed for its heat by the driver"),
        (ThrottleReasons::HW_THERMAL_SLOWDOWN, "slowed for its heat"),
        (ThrottleReasons::HW_POWER_BRAKE_SLOWDOWN, "slowed by its power supply"),
    ];
    let devices = 0..nvml.device_count().unwrap_or(0);
    let active = devices.filter_map(|i| nvml.device_by_index(i).ok()?.current_throttle_reasons().ok());
    active
        .flat_map(|active| reasons.iter().filter(move |(reason, _)| active.contains(*reason)))
        .map(|(_, text)| (*text).to_owned())
        .collect()
}

#[cfg(target_os = "macos")]
fn gpu_slowdowns() -> Vec<String> {
    Vec::new()
}

#[cfg(target_os = "linux")]
mod os {
    use super::Counters;
    use crate::measure::memory;
    use std::fs;
    use std::path::Path;

    pub fn counters(worker: u32) -> Counters {
        let ticks = rustix::param::clock_ticks_per_second().max(1) as f64;
        let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
        let cpu: Vec<f64> = stat
            .lines()
            .next()
            .unwrap_or_default()
            .split_whitespace()
            .skip(1)
            .filter_map(|value| Some(value.parse::<f64>().ok()? / ticks))
            .collect();
        // proc(5): user, nice, system, idle, iowait, irq, softirq, steal.
        let busy = (cpu.len() > 6).then(|| cpu[0] + cpu[1] + cpu[2] + cpu[5] + cpu[6]);
        let own: f64 = memory::process_tree(worker)
            .into_iter()
            .chain([std::process::id()])
            .map(|pid| process_seconds(pid, pid != std::process::id(), ticks))
            .sum();
        let vm = fs::read_to_string("/proc/vmstat").unwrap_or_default();
        let pages = |name: &str| -> Option<u64> {
            vm.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok())
        };
        let swapped = pages("pswpin ").zip(pages("pswpout "));
        Counters {
            busy,
            stolen: cpu.get(7).copied(),
            own,
            throttled: throttled_seconds(),
            thermal: of_cpus("thermal_throttle/core_throttle_count")
                .map(|counts| counts.iter().sum::<f64>() as u64),
            swapped: swapped.map(|(into, out)| (into + out) * rustix::param::page_size() as u64),
            mhz: of_cpus("cpufreq/scaling_cur_freq")
                .and_then(|khz| khz.into_iter().reduce(f64::max))
                .map(|khz| khz / 1e3),
        }
    }

    /// User and system time; of a worker with that of its children that have ended.
    fn process_seconds(pid: u32, with_children: bool, ticks: f64) -> f64 {
        let text = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // The name is in parentheses and may hold anything; the fields after it begin with the third.
        let Some((_, rest)) = text.rsplit_once(')') else { return 0.0 };
        let fields: Vec<&str> = rest.split_whitespace().collect();
        let value = |number: usize| fields.get(number - 3).and_then(|f| f.parse::<f64>().ok()).unwrap_or(0.0);
        let children = if with_children { value(16) + value(17) } else { 0.0 };
        (value(14) + value(15) + children) / ticks
    }

    /// Of each CPU that has the file.
    fn of_cpus(file: &str) -> Option<Vec<f64>> {
        let cpus = fs::read_dir("/sys/devices/system/cpu").ok()?.flatten();
        let values: Vec<f64> = cpus
            .filter_map(|cpu| fs::read_to_string(cpu.path().join(file)).ok()?.trim().parse().ok())
            .collect();
        (!values.is_empty()).then_some(values)
    }

    /// Of this process's control group, which its workers share.
    fn throttled_seconds() -> Option<f64> {
        let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
        let root = Path::new("/sys/fs/cgroup");
        groups.lines().find_map(|line| {
            let (_, rest) = line.split_once(':')?;
            let (controllers, group) = rest.split_once(':')?;
            let group = group.trim_start_matches('/');
            // Version 2 has one tree and microseconds, version 1 a tree for each controller and nanoseconds.
            let (file, key, unit) = match controllers {
                "" => (root.join(group), "throttled_usec ", 1e6),
                names if names.split(',').any(|name| name == "cpu") => {
                    (root.join("cpu").join(group), "throttled_time ", 1e9)
                }
                _ => return None,
            };
            let text = fs::read_to_string(file.join("cpu.stat")).ok()?;
            let value = text.lines().find_map(|line| line.strip_prefix(key)?.trim().parse::<f64>().ok())?;
            Some(value / unit)
        })
    }

    pub fn on_battery() -> Option<bool> {
        let supplies = fs::read_dir("/sys/class/power_supply").ok()?.flatten();
        let states: Vec<bool> = supplies
            .filter_map(|supply| fs::read_to_string(supply.path().join("status")).ok())
            .map(|status| status.trim() == "Discharging")
            .collect();
        (!states.is_empty()).then(|| states.contains(&true))
    }
}

#[cfg(not(target_os = "linux"))]
mod os {
    use super::Counters;
    use std::process::Command;

    /// What else runs is not told apart here.
    pub fn counters(_worker: u32) -> Counters {
        Counters::default()
    }

    pub fn on_battery() -> Option<bool> {
        if !cfg!(target_os = "macos") {
            return None;
        }
        let output = Command::new("pmset").args(["-g", "batt"]).output().ok()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        output.status.success().then(|| text.contains("Battery Power"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_disturbs_is_named_and_what_does_not_is_not() {
        let quiet = Surroundings {
            seconds: 10.0,
            logical_cores: 2,
            other_cores: Some(0.02),
            other_cores_peak: Some(0.3),
            stolen_cores: Some(0.01),
            throttled_seconds: Some(0.0),
            thermal_throttles: Some(0),
            swapped_bytes: Some(4096),
            lowest_mhz: Some(2900.0),
            highest_mhz: Some(3000.0),
            on_battery: Some(false),
            gpu_slowdowns: Vec::new(),
        };
        assert_eq!(quiet.disturbances(), Vec::<String>::new());
        assert_eq!(Surroundings::default().disturbances(), Vec::<String>::new());
        let short = Surroundings { seconds: 0.2, other_cores: Some(1.0), ..quiet.clone() };
        assert_eq!(short.disturbances(), Vec::<String>::new());
        for (part, disturbed) in [
            ("other processes took 50 %", Surroundings { other_cores: Some(1.0), ..quiet.clone() }),
            ("hypervisor took 10 %", Surroundings { stolen_cores: Some(0.2), ..quiet.clone() }),
            ("quota held the worker 30 %", Surroundings { throttled_seconds: Some(3.0), ..quiet.clone() }),
            ("for its heat 2 times", Surroundings { thermal_throttles: Some(2), ..quiet.clone() }),
            ("from 3000 to 1500 MHz", Surroundings { lowest_mhz: Some(1500.0), ..quiet.clone() }),
            ("100 MB were swapped", Surroundings { swapped_bytes: Some(100_000_000), ..quiet.clone() }),
            ("on battery", Surroundings { on_battery: Some(true), ..quiet.clone() }),
            ("GPU: slowed", Surroundings { gpu_slowdowns: vec!["slowed".into()], ..quiet.clone() }),
        ] {
            let found = disturbed.disturbances();
            assert!(found.len() == 1 && found[0].contains(part), "{found:?}");
        }
    }
}

//! Memory of a worker, watched from outside.
//!
//! A thread looks at the worker's process tree every 20 ms, or less often where that would cost more than a hundredth
//! of a core. What a figure is depends on the system, and the record names it:
//!
//! - Linux (`tree`): resident pages, each once however many processes of the tree share it: the proportional set sizes,
//!   and what they leave to processes outside of the tree. The kernel's high-water mark
//!   `VmHWM`, reset where a phase begins, makes the peak of a single process exact between two looks. Of a tree of
//!   several processes the peak is that of the looks.
//! - macOS: `phys_footprint`, which holds Metal's buffers as well.
//! - Windows: working set; elsewhere resident size. These are the looks alone.

#[cfg(not(target_os = "macos"))]
pub mod gpu;
#[cfg(target_os = "linux")]
#[path = "linux.rs"]
mod os;
#[cfg(target_os = "macos")]
#[path = "macos.rs"]
mod os;
#[cfg(not(any(target_os = "linux", target_os = "macos")))]
#[path = "elsewhere.rs"]
mod os;
mod timeline;

#[cfg(not(target_os = "macos"))]
pub use gpu::has_nvidia_gpu;
#[cfg(target_os = "linux")]
pub use os::tree as process_tree;
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use timeline::Timeline;

/// NVIDIA has no driver for Macs.
#[cfg(target_os = "macos")]
pub fn has_nvidia_gpu() -> bool {
    false
}

const INTERVAL: Duration = Duration::from_millis(20);
/// Looking may take one part in so many of the time.
const COST_DIVISOR: u32 = 100;

/// The process tree's memory at a moment.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct MemoryPoint {
    /// Since the worker was started.
    pub seconds: f64,
    /// By the measure that [`MemoryFigures::measure`] names. Records of schema 1: the sum of resident sizes.
    pub resident_bytes: u64,
}

/// One phase of a cell, such as `load` or `train`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PhaseMemory {
    pub name: String,
    pub seconds: f64,
    /// Largest memory of the process tree during the phase.
    pub peak_bytes: u64,
    /// At the end of the phase, shared pages counted once: memory that no file stands behind.
    pub anonymous_bytes: Option<u64>,
    /// At the end of the phase, shared pages counted once: pages of files, and memory shared on purpose.
    pub file_bytes: Option<u64>,
    /// The sum of the processes' own high-water marks of resident pages: a bound, as pages that they share count for
    /// each of them and their peaks need not fall together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub high_water_bytes: Option<u64>,
}

/// Everything that was seen of one worker.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct MemoryFigures {
    /// What the bytes of phases and timeline are: `tree` (until 2026-11-28 `pss`, without what is shared with other programs), `phys_footprint`, `working_set` or `resident`.
    pub measure: String,
    pub phases: Vec<PhaseMemory>,
    pub timeline: Vec<MemoryPoint>,
    pub gpus: Vec<GpuMemory>,
    pub cgroup: Option<CgroupPeak>,
    pub cost: SamplerCost,
}

/// A GPU as its driver tells it (NVML).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GpuMemory {
    pub name: String,
    /// In use by all programs when the worker started.
    pub before_bytes: u64,
    /// In use by all programs, at most.
    pub device_peak_bytes: u64,
    /// In use by the worker's processes, at most; `None` where the driver does not tell, as in a container with process
    /// ids of its own.
    pub process_peak_bytes: Option<u64>,
}

/// The peak of the worker's control group, page cache and neighbours in it included: a bound, no more.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CgroupPeak {
    pub bytes: u64,
    /// Since the worker started; else since the group was made.
    pub since_start: bool,
}

/// What looking took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct SamplerCost {
    pub looks: u64,
    /// Of one core; `None` where the system does not tell.
    pub cpu_seconds: Option<f64>,
    pub wall_seconds: f64,
}

/// What is looked at, each by a thread of its own: a GPU's driver may take long to answer.
const LOOKS: &[fn(&Shared)] = &[
    look_until_stopped,
    #[cfg(not(target_os = "macos"))]
    look_at_gpus_until_stopped,
];

/// Watches one process and its descendants until it is stopped or dropped.
pub struct MemoryProbe {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

struct Shared {
    state: Mutex<State>,
    stop: Condvar,
}

struct State {
    started: Instant,
    stopped: bool,
    watcher: os::Watcher,
    timeline: Timeline,
    phase: Phase,
    finished: Vec<PhaseMemory>,
    cost: SamplerCost,
    gpus: Vec<GpuMemory>,
}

struct Phase {
    name: String,
    started: Instant,
}

/// What an operating system tells of a phase that ends.
struct PhaseFigures {
    peak: u64,
    anonymous: Option<u64>,
    file: Option<u64>,
    high_water: Option<u64>,
}

impl MemoryProbe {
    /// Starts watching `pid`; the first phase is called `start`.
    pub fn start(pid: u32) -> Self {
        let state = State {
            started: Instant::now(),
            stopped: false,
            watcher: os::Watcher::new(pid),
            timeline: Timeline::default(),
            phase: Phase { name: "start".to_owned(), started: Instant::now() },
            finished: Vec::new(),
            cost: SamplerCost::default(),
            gpus: Vec::new(),
        };
        let shared = Arc::new(Shared { state: Mutex::new(state), stop: Condvar::new() });
        let start = |look: fn(&Shared)| {
            let watched = Arc::clone(&shared);
            std::thread::spawn(move || look(&watched))
        };
        let threads = LOOKS.iter().map(|look| start(*look)).collect();
        Self { shared, threads }
    }

    /// Ends the current phase and begins the next one.
    pub fn begin_phase(&self, name: &str) {
        let mut state = self.lock();
        state.end_phase();
        state.watcher.begin_phase();
        state.phase = Phase { name: name.to_owned(), started: Instant::now() };
    }

    /// Stops watching and returns what was seen.
    pub fn finish(mut self) -> MemoryFigures {
        self.lock().end_phase();
        self.stop();
        let mut state = self.lock();
        let wall_seconds = state.started.elapsed().as_secs_f64();
        MemoryFigures {
            measure: os::MEASURE.to_owned(),
            phases: std::mem::take(&mut state.finished),
            timeline: state.timeline.take(),
            gpus: std::mem::take(&mut state.gpus),
            cgroup: state.watcher.cgroup_peak(),
            cost: SamplerCost { wall_seconds, ..state.cost },
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.shared.lock()
    }

    fn stop(&mut self) {
        self.lock().stopped = true;
        self.shared.stop.notify_all();
        for thread in self.threads.drain(..) {
            // A sampler has nothing to report; if it panicked there are only fewer samples.
            let _ = thread.join();
        }
    }
}

impl Drop for MemoryProbe {
    fn drop(&mut self) {
        self.stop();
    }
}

impl State {
    fn look(&mut self) {
        self.cost.looks += 1;
        if let Some(resident_bytes) = self.watcher.look() {
            let seconds = self.started.elapsed().as_secs_f64();
            self.timeline.push(MemoryPoint { seconds, resident_bytes });
        }
    }

    fn end_phase(&mut self) {
        // A phase in which the process was never seen has no figure.
        if let Some(figures) = self.watcher.end_phase() {
            self.finished.push(PhaseMemory {
                name: self.phase.name.clone(),
                seconds: self.phase.started.elapsed().as_secs_f64(),
                peak_bytes: figures.peak,
                anonymous_bytes: figures.anonymous,
                file_bytes: figures.file,
                high_water_bytes: figures.high_water,
            });
        }
    }
}

fn look_until_stopped(shared: &Shared) {
    let mut state = shared.lock();
    while !state.stopped {
        let begun = Instant::now();
        let cpu_before = os::thread_cpu_seconds();
        state.look();
        let cpu = os::thread_cpu_seconds();
        state.cost.cpu_seconds = cpu;
        // A look that had to wait for a core cost no more than another.
        let took =
            cpu.zip(cpu_before).map(|(after, before)| Duration::from_secs_f64((after - before).max(0.0)));
        let wait = INTERVAL.max(took.unwrap_or(begun.elapsed()) * COST_DIVISOR);
        state = shared.wait(state, wait);
    }
}

#[cfg(not(target_os = "macos"))]
fn look_at_gpus_until_stopped(shared: &Shared) {
    let Some(mut gpus) = gpu::Watcher::open() else { return };
    let mut state = shared.lock();
    while !state.stopped {
        let pids = state.watcher.pids();
        // Nobody shall wait for a driver.
        drop(state);
        let begun = Instant::now();
        gpus.look(&pids);
        let took = begun.elapsed();
        state = shared.lock();
        state.gpus = gpus.figures();
        state = shared.wait(state, gpu::INTERVAL.max(took));
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Until it is stopped, or the time has passed.
    fn wait<'a>(&'a self, state: MutexGuard<'a, State>, time: Duration) -> MutexGuard<'a, State> {
        let waited = self.stop.wait_timeout_while(state, time, |state| !state.stopped);
        waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

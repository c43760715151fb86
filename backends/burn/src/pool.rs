//! What a GPU's memory pools hold, and the most that they held.
//!
//! Burn's pools know a peak each, those that are gone are forgotten, and some are not told of at all: their sum says
//! nothing certain. So the pages that they hold together are looked at. A pool keeps its pages until an allocation needs
//! larger ones; then another pool takes its place, and it gives its pages back as they empty. While that goes on, the
//! sum is sampled, at the interval of the harness's own samples of the process. Once the pools have settled it only
//! grows, so that what it is after a call is the peak of the call, and what is timed is left alone.

use crate::guard::guard;
use burn::tensor::Device;
use evalfw_engine::protocol::DeviceMemory;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

const INTERVAL: Duration = Duration::from_millis(20);

/// Watches a device until it is dropped.
pub struct PoolWatch {
    device: Device,
    shared: Arc<Shared>,
    history: Mutex<History>,
    /// Ends the thread when it is dropped. `None` for a device without pools.
    _thread: Option<Sender<()>>,
}

struct Shared {
    /// Bytes.
    most: AtomicU64,
    sampling: AtomicBool,
}

#[derive(Default)]
struct History {
    pools: Option<Pools>,
    /// The pools changed in a call that was not sampled.
    missed: bool,
}

/// What does not change while the sum of all pages only grows: the size of each pool's pages, and how many the pools
/// hold that nothing is taken from any more.
type Pools = Vec<(u64, Option<u64>)>;

impl PoolWatch {
    pub fn start(device: &Device) -> Self {
        let shared = Arc::new(Shared { most: AtomicU64::new(0), sampling: AtomicBool::new(true) });
        let thread = usage(device).map(|_| watch(device.clone(), Arc::clone(&shared)));
        Self { device: device.clone(), shared, history: Mutex::default(), _thread: thread }
    }

    /// The figures since the start. To be called after each call that may have allocated.
    pub fn memory(&self) -> DeviceMemory {
        let Some(Usage { in_use, reserved }) = usage(&self.device) else { return DeviceMemory::default() };
        let most = self.shared.most.fetch_max(reserved, Ordering::Relaxed).max(reserved);
        let pools = pools(&self.device);
        let mut history = self.history.lock().unwrap_or_else(PoisonError::into_inner);
        let settled = pools.is_some() && pools == history.pools;
        let was_sampled = self.shared.sampling.swap(!settled, Ordering::Relaxed);
        history.missed |= !settled && !was_sampled;
        history.pools = pools;
        DeviceMemory {
            in_use_bytes: Some(in_use),
            reserved_bytes: Some(reserved),
            peak_bytes: (!history.missed).then_some(most),
        }
    }

    /// Gives pages that nothing uses back to the device, and begins anew.
    pub fn clean_up(&self) {
        // If it fails, the figures have these pages in them and are too large: an upper bound still.
        let _ = guard(|| {
            self.device.memory_cleanup();
            Ok(())
        });
        self.shared.sampling.store(true, Ordering::Relaxed);
        self.shared.most.store(0, Ordering::Relaxed);
        *self.history.lock().unwrap_or_else(PoisonError::into_inner) = History::default();
    }
}

struct Usage {
    in_use: u64,
    reserved: u64,
}

/// In bytes.
fn usage(device: &Device) -> Option<Usage> {
    let usage = guard(|| Ok(device.memory_pool_usage())).ok().flatten()?;
    Some(Usage { in_use: usage.bytes_in_use, reserved: usage.bytes_reserved })
}

/// Burn tells the pool for small allocations first and the one that the others come from next; the rest only empty.
fn pools(device: &Device) -> Option<Pools> {
    let report = guard(|| Ok(device.memory_pool_report())).ok().flatten()?;
    let pools = report.iter().enumerate();
    Some(pools.map(|(at, pool)| (pool.page_size, (at >= 2).then_some(pool.pages))).collect())
}

fn watch(device: Device, shared: Arc<Shared>) -> Sender<()> {
    let (sender, stop) = channel();
    std::thread::spawn(move || {
        while stop.recv_timeout(INTERVAL) == Err(RecvTimeoutError::Timeout) {
            if shared.sampling.load(Ordering::Relaxed) {
                let Some(usage) = usage(&device) else { break };
                shared.most.fetch_max(usage.reserved, Ordering::Relaxed);
            }
        }
    });
    sender
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::BurnDevice;
    use crate::device::all_for_tests;
    use burn::tensor::Tensor;
    use std::process::Command;

    /// Runs a test in a process of its own: other tests of this one use the same devices, and so the same pools.
    fn alone(name: &str, test: impl FnOnce()) {
        const IS_ALONE: &str = "EVALFW_TEST_IS_ALONE";
        if std::env::var_os(IS_ALONE).is_some() {
            return test();
        }
        let this = std::env::current_exe().unwrap();
        let name = format!("pool::tests::{name}");
        let output = Command::new(this).args(["--exact", &name]).env(IS_ALONE, "1").output().unwrap();
        let printed = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && printed.contains("1 passed"), "{printed}");
    }

    fn ones(bytes: usize, device: &Device) -> Tensor<1> {
        let tensor = Tensor::ones([bytes / 4], device);
        device.sync().unwrap();
        tensor
    }

    #[test]
    fn the_peak_is_that_of_memory_that_is_given_back_already() {
        alone("the_peak_is_that_of_memory_that_is_given_back_already", || {
            for device in all_for_tests() {
                let watch = PoolWatch::start(&device.device);
                if device.kind == BurnDevice::Flex {
                    assert_eq!(watch.memory(), DeviceMemory::default());
                    continue;
                }
                let size = 64 << 20;
                let bytes = |figure: Option<u64>| figure.unwrap();
                let before = watch.memory();
                let tensor = ones(size, &device.device);
                std::thread::sleep(10 * INTERVAL);
                drop(tensor);
                device.device.memory_cleanup();
                let after = watch.memory();
                assert!(bytes(after.peak_bytes) >= bytes(before.reserved_bytes) + size as u64, "{after:?}");
                assert!(bytes(after.reserved_bytes) < bytes(after.peak_bytes), "{after:?}");
                watch.clean_up();
                let anew = watch.memory();
                assert_eq!(anew.peak_bytes, anew.reserved_bytes);
            }
        });
    }

    #[test]
    fn settled_pools_are_not_sampled_and_a_change_in_them_leaves_the_peak_unknown() {
        alone("settled_pools_are_not_sampled_and_a_change_in_them_leaves_the_peak_unknown", || {
            for device in all_for_tests().into_iter().filter(|device| device.kind == BurnDevice::Wgpu) {
                let watch = PoolWatch::start(&device.device);
                let sampling = || watch.shared.sampling.load(Ordering::Relaxed);
                let small = ones(4 << 20, &device.device);
                watch.memory();
                assert!(sampling());
                // Sooner or later one pool serves them all.
                let mut alike = Vec::new();
                let settled = loop {
                    alike.push(ones(4 << 20, &device.device));
                    let memory = watch.memory();
                    if !sampling() {
                        break memory;
                    }
                    assert!(alike.len() < 8, "{:?}", super::pools(&device.device));
                };
                assert_eq!(settled.peak_bytes, settled.reserved_bytes);
                // This needs larger pages.
                let large = ones(32 << 20, &device.device);
                assert_eq!(watch.memory().peak_bytes, None);
                assert!(sampling());
                drop((small, alike, large));
                watch.clean_up();
                assert!(watch.memory().peak_bytes.is_some());
            }
        });
    }
}

//! What a GPU's memory pools hold, and the most that they held.
//!
//! Burn's pools know a peak each, those that are gone are forgotten, and some are not told of at all: their sum says
//! nothing certain. So the pages that they hold together are sampled, at the interval of the harness's own samples of
//! the process. Little is missed between two samples, as a pool keeps its pages until a larger size of pages takes its
//! place.

use crate::guard::guard;
use burn::tensor::Device;
use evalfw_engine::protocol::DeviceMemory;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::Duration;

const INTERVAL: Duration = Duration::from_millis(20);

/// Watches a device until it is dropped.
pub struct PoolWatch {
    device: Device,
    /// Bytes.
    most: Arc<AtomicU64>,
    /// Ends the thread when it is dropped. `None` for a device without pools.
    _thread: Option<Sender<()>>,
}

impl PoolWatch {
    pub fn start(device: &Device) -> Self {
        let most = Arc::new(AtomicU64::new(0));
        let thread = usage(device).map(|_| watch(device.clone(), Arc::clone(&most)));
        Self { device: device.clone(), most, _thread: thread }
    }

    pub fn memory(&self) -> DeviceMemory {
        let Some(Usage { in_use, reserved }) = usage(&self.device) else { return DeviceMemory::default() };
        let before = self.most.fetch_max(reserved, Ordering::Relaxed);
        DeviceMemory {
            in_use_bytes: Some(in_use),
            reserved_bytes: Some(reserved),
            peak_bytes: Some(before.max(reserved)),
        }
    }

    /// Gives pages that nothing uses back to the device, and lets the peak begin anew.
    pub fn clean_up(&self) {
        // If it fails, the figures have these pages in them and are too large: an upper bound still.
        let _ = guard(|| {
            self.device.memory_cleanup();
            Ok(())
        });
        self.most.store(0, Ordering::Relaxed);
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

fn watch(device: Device, most: Arc<AtomicU64>) -> Sender<()> {
    let (sender, stop) = channel();
    std::thread::spawn(move || {
        while stop.recv_timeout(INTERVAL) == Err(RecvTimeoutError::Timeout) {
            let Some(usage) = usage(&device) else { break };
            most.fetch_max(usage.reserved, Ordering::Relaxed);
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

    #[test]
    fn the_peak_is_that_of_memory_that_is_given_back_already() {
        for device in all_for_tests() {
            let watch = PoolWatch::start(&device.device);
            if device.kind == BurnDevice::Flex {
                assert_eq!(watch.memory(), DeviceMemory::default());
                continue;
            }
            let size = 64 << 20;
            let bytes = |figure: Option<u64>| figure.unwrap();
            let before = watch.memory();
            let tensor = Tensor::<1>::ones([size / 4], &device.device);
            device.device.sync().unwrap();
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
    }
}

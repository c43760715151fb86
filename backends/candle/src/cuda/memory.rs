//! The driver's pool, from which candle's allocations come.

use candle_core::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::result::{device, mem_pool};
use candle_core::cuda_backend::cudarc::driver::sys::{CUmemPool_attribute as Attribute, CUmemoryPool};
use evalfw_engine::protocol::DeviceMemory;

/// Lets the pool keep what is freed. By default it goes back to the driver at every synchronisation, and has to be
/// taken again in the next step.
pub fn keep_pool(device: &CudaDevice) {
    let Some(pool) = pool(device) else { return };
    let mut threshold = u64::MAX;
    // SAFETY: the attribute takes a u64, and the pool is the device's own. A driver that refuses only costs time.
    let _ = unsafe {
        mem_pool::set_attribute(
            pool,
            Attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD,
            (&raw mut threshold).cast(),
        )
    };
}

/// What the pool holds, and the most that the device held: the pool at its largest, and what is taken beside it, such
/// as the context and the libraries' workspaces. The latter is known of the whole device only, so that other
/// processes are counted too.
pub fn memory(device: &CudaDevice) -> DeviceMemory {
    let Some(pool) = pool(device) else { return DeviceMemory::default() };
    let reserved = attribute(pool, Attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT);
    let largest = attribute(pool, Attribute::CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH);
    let taken = device.cuda_stream().context().mem_get_info().ok().map(|(free, total)| (total - free) as u64);
    DeviceMemory {
        in_use_bytes: attribute(pool, Attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT),
        reserved_bytes: reserved,
        peak_bytes: match (taken, reserved, largest) {
            (Some(taken), Some(reserved), Some(largest)) => Some(taken.saturating_sub(reserved) + largest),
            _ => None,
        },
    }
}

fn pool(of: &CudaDevice) -> Option<CUmemoryPool> {
    let context = of.cuda_stream().context().clone();
    if !context.has_async_alloc() {
        return None;
    }
    // SAFETY: the device is that of a live context.
    unsafe { device::get_mem_pool(context.cu_device()) }.ok()
}

fn attribute(pool: CUmemoryPool, attribute: Attribute) -> Option<u64> {
    let mut value = 0u64;
    // SAFETY: the attributes asked for are u64, and the pool is the device's own.
    unsafe { mem_pool::get_attribute(pool, attribute, (&raw mut value).cast()) }.ok()?;
    Some(value)
}

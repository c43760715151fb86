//! Launching a kernel on tensors: types and contiguity are checked here, so that a kernel may rely on them.

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::{
    CudaFunction, CudaSlice, CudaStream, CudaView, DevicePtr, DeviceRepr, LaunchConfig, PushKernelArg,
};
use candle_core::cuda_backend::{CudaDType, WrapErr};
use candle_core::op::BackpropOp;
use candle_core::{CudaDevice, CudaStorage, Result, Storage, StorageRef, Tensor, WithDType, bail};
use std::marker::PhantomData;
use std::ops::Range;
use std::sync::Arc;

const PTX: &str = include_str!(concat!(env!("OUT_DIR"), "/kernels.ptx"));

/// Threads of a block in elementwise kernels.
const THREADS: usize = 256;

/// Keeps a contiguous tensor on a CUDA device readable.
pub struct Values<'a> {
    storage: StorageRef<'a>,
    device: CudaDevice,
    range: Range<usize>,
}

impl<'a> Values<'a> {
    pub fn new(tensor: &'a Tensor) -> Result<Self> {
        let (storage, layout) = tensor.storage_and_layout();
        let Some((start, end)) = layout.contiguous_offsets() else { bail!("expected a contiguous tensor") };
        let device = match &*storage {
            Storage::Cuda(storage) => storage.device().clone(),
            other => bail!("expected a tensor on cuda, found one on {:?}", other.device()),
        };
        Ok(Self { storage, device, range: start..end })
    }

    pub fn device(&self) -> &CudaDevice {
        &self.device
    }

    /// Fails where the elements are of another type.
    pub fn view<T: CudaDType>(&self) -> Result<CudaView<'_, T>> {
        match &*self.storage {
            Storage::Cuda(storage) => Ok(storage.as_cuda_slice::<T>()?.slice(self.range.clone())),
            other => bail!("expected a tensor on cuda, found one on {:?}", other.device()),
        }
    }
}

/// Memory for a kernel to write; what it holds before is undefined.
pub fn empty<T: DeviceRepr>(device: &CudaDevice, len: usize) -> Result<CudaSlice<T>> {
    // SAFETY: every kernel writes each element of its outputs before anything reads them.
    unsafe { device.alloc::<T>(len) }
}

pub fn tensor<T: CudaDType + WithDType>(
    device: &CudaDevice,
    values: CudaSlice<T>,
    shape: &[usize],
) -> Result<Tensor> {
    let storage = CudaStorage::wrap_cuda_slice(values, device.clone());
    Ok(Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false))
}

pub struct Kernel {
    function: CudaFunction,
    stream: Arc<CudaStream>,
}

impl Kernel {
    pub fn new(device: &CudaDevice, name: &str) -> Result<Self> {
        let function = device.get_or_load_custom_func(name, "evalfw", PTX)?;
        Ok(Self { function: function.into_cuda_function(), stream: device.cuda_stream() })
    }

    pub fn launch<'a>(&'a self) -> Launch<'a> {
        Launch { kernel: self, args: Vec::with_capacity(16) }
    }
}

/// The arguments of one launch, in the order of the kernel's parameters.
pub struct Launch<'a> {
    kernel: &'a Kernel,
    args: Vec<Argument<'a>>,
}

enum Argument<'a> {
    /// An address, valid as long as what it was taken from.
    Pointer(u64, PhantomData<&'a ()>),
    Count(usize),
    Word(u32),
    Float(f32),
}

impl<'a> Launch<'a> {
    /// An input.
    pub fn values<T: CudaDType>(mut self, values: &'a Values<'_>) -> Result<Self> {
        let view = values.view::<T>()?;
        let (pointer, _) = view.device_ptr(&self.kernel.stream);
        self.args.push(Argument::Pointer(pointer, PhantomData));
        Ok(self)
    }

    /// Memory that the kernel writes.
    pub fn slice<T>(mut self, slice: &'a CudaSlice<T>) -> Self {
        let (pointer, _) = slice.device_ptr(&self.kernel.stream);
        self.args.push(Argument::Pointer(pointer, PhantomData));
        self
    }

    pub fn count(mut self, count: usize) -> Self {
        self.args.push(Argument::Count(count));
        self
    }

    pub fn word(mut self, word: u32) -> Self {
        self.args.push(Argument::Word(word));
        self
    }

    pub fn float(mut self, float: f32) -> Self {
        self.args.push(Argument::Float(float));
        self
    }

    /// Runs at least `threads` threads in blocks of a usual size.
    pub fn run_for(self, threads: usize) -> Result<()> {
        self.run(threads.div_ceil(THREADS), THREADS)
    }

    pub fn run(self, blocks: usize, threads: usize) -> Result<()> {
        let Ok(blocks) = u32::try_from(blocks) else { bail!("{blocks} blocks are too many for a launch") };
        if blocks == 0 {
            return Ok(());
        }
        let mut builder = self.kernel.stream.launch_builder(&self.kernel.function);
        for arg in &self.args {
            match arg {
                Argument::Pointer(pointer, _) => builder.arg(pointer),
                Argument::Count(count) => builder.arg(count),
                Argument::Word(word) => builder.arg(word),
                Argument::Float(float) => builder.arg(float),
            };
        }
        let config =
            LaunchConfig { grid_dim: (blocks, 1, 1), block_dim: (threads as u32, 1, 1), shared_mem_bytes: 0 };
        // SAFETY: the callers in this module give the arguments that the kernel of that name takes; inputs were
        // checked for type and contiguity, and live as long as `self`.
        unsafe { builder.launch(config) }.w()?;
        Ok(())
    }
}

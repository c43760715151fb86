//! Operations with a backward written by hand around a result that is there already.
//!
//! A custom operation of candle sees storages in its forward pass and tensors in its backward. On a GPU the
//! result comes from candle's own operations on detached tensors; wrapping it here puts it into the graph.
//! Where nothing is traced, the result stays as it is.

use super::Graph;
use candle_core::backend::BackendStorage;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, Layout, MetalStorage, Result, Shape, Storage,
    Tensor, bail,
};
use std::sync::Mutex;

/// The gradient with respect to each of `N` arguments, from the arguments and the gradient of the result.
type Backward<const N: usize> = Box<dyn Fn([&Tensor; N], &Tensor) -> Result<[Tensor; N]> + Send + Sync>;

struct ByHand<const N: usize> {
    name: &'static str,
    /// Taken when the operation runs, so that the graph does not hold it a second time.
    result: Mutex<Option<Tensor>>,
    backward: Backward<N>,
}

/// `result` as an operation on `x`.
pub fn op1(
    graph: Graph<'_>,
    name: &'static str,
    x: &Tensor,
    result: Tensor,
    backward: impl Fn(&Tensor, &Tensor) -> Result<Tensor> + Send + Sync + 'static,
) -> Result<Tensor> {
    if graph.tape.is_none() && !x.track_op() {
        return Ok(result);
    }
    let backward: Backward<1> = Box::new(move |[x], grad| Ok([backward(x, grad)?]));
    graph.op1(x, ByHand::new(name, result, backward)?)
}

/// `result` as an operation on `a` and `b`.
pub fn op2(
    graph: Graph<'_>,
    name: &'static str,
    args: [&Tensor; 2],
    result: Tensor,
    backward: impl Fn([&Tensor; 2], &Tensor) -> Result<[Tensor; 2]> + Send + Sync + 'static,
) -> Result<Tensor> {
    if graph.tape.is_none() && !args.iter().any(|x| x.track_op()) {
        return Ok(result);
    }
    graph.op2(args, ByHand::new(name, result, Box::new(backward))?)
}

/// `result` as an operation on `a`, `b` and `c`.
pub fn op3(
    graph: Graph<'_>,
    name: &'static str,
    args: [&Tensor; 3],
    result: Tensor,
    backward: impl Fn([&Tensor; 3], &Tensor) -> Result<[Tensor; 3]> + Send + Sync + 'static,
) -> Result<Tensor> {
    if graph.tape.is_none() && !args.iter().any(|x| x.track_op()) {
        return Ok(result);
    }
    graph.op3(args, ByHand::new(name, result, Box::new(backward))?)
}

/// A tensor whose storage begins with its elements in order, as a copy of the storage needs it.
fn own(result: Tensor) -> Result<Tensor> {
    let result = result.detach();
    let whole = {
        let (_, layout) = result.storage_and_layout();
        layout.is_contiguous() && layout.start_offset() == 0
    };
    if whole { Ok(result) } else { result.force_contiguous() }
}

impl<const N: usize> ByHand<N> {
    fn new(name: &'static str, result: Tensor, backward: Backward<N>) -> Result<Self> {
        Ok(Self { name, result: Mutex::new(Some(own(result)?)), backward })
    }

    fn copy<S: BackendStorage>(&self, of: fn(&Storage) -> Option<&S>) -> Result<(S, Shape)> {
        let Some(result) = self.result.lock().ok().and_then(|mut result| result.take()) else {
            bail!("{} runs once only", self.name)
        };
        let (storage, layout) = result.storage_and_layout();
        match of(&storage) {
            Some(storage) => Ok((storage.try_clone(layout)?, layout.shape().clone())),
            None => bail!("the result of {} is on another device", self.name),
        }
    }

    fn cpu(&self) -> Result<(CpuStorage, Shape)> {
        self.copy(|storage| match storage {
            Storage::Cpu(storage) => Some(storage),
            _ => None,
        })
    }

    fn cuda(&self) -> Result<(CudaStorage, Shape)> {
        self.copy(|storage| match storage {
            Storage::Cuda(storage) => Some(storage),
            _ => None,
        })
    }

    fn metal(&self) -> Result<(MetalStorage, Shape)> {
        self.copy(|storage| match storage {
            Storage::Metal(storage) => Some(storage),
            _ => None,
        })
    }

    /// Gradients have no gradients of their own here.
    fn gradients(&self, args: [&Tensor; N], grad: &Tensor) -> Result<[Tensor; N]> {
        let args = args.map(Tensor::detach);
        (self.backward)(args.each_ref(), &grad.detach().contiguous()?)
    }
}

impl CustomOp1 for ByHand<1> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.cpu()
    }

    fn cuda_fwd(&self, _: &CudaStorage, _: &Layout) -> Result<(CudaStorage, Shape)> {
        self.cuda()
    }

    fn metal_fwd(&self, _: &MetalStorage, _: &Layout) -> Result<(MetalStorage, Shape)> {
        self.metal()
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let [of_x] = self.gradients([x], grad)?;
        Ok(Some(of_x))
    }
}

impl CustomOp2 for ByHand<2> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.cpu()
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.cuda()
    }

    fn metal_fwd(
        &self,
        _: &MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
    ) -> Result<(MetalStorage, Shape)> {
        self.metal()
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let [of_a, of_b] = self.gradients([a, b], grad)?;
        Ok((Some(of_a), Some(of_b)))
    }
}

impl CustomOp3 for ByHand<3> {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu_fwd(
        &self,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
        _: &CpuStorage,
        _: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.cpu()
    }

    fn cuda_fwd(
        &self,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
        _: &CudaStorage,
        _: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.cuda()
    }

    fn metal_fwd(
        &self,
        _: &MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
        _: &MetalStorage,
        _: &Layout,
    ) -> Result<(MetalStorage, Shape)> {
        self.metal()
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        c: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [of_a, of_b, of_c] = self.gradients([a, b, c], grad)?;
        Ok((Some(of_a), Some(of_b), Some(of_c)))
    }
}

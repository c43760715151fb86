//! Products of bf16 factors with sums and results in f32, by cuBLAS. candle's own matmul would round the result to
//! bf16 as well.

use super::launch::{Values, empty, tensor};
use candle_core::cuda_backend::WrapErr;
use candle_core::cuda_backend::cudarc::cublas::{result, sys};
use candle_core::cuda_backend::cudarc::driver::DevicePtr;
use candle_core::{Result, Tensor, bail};
use half::bf16;
use std::ffi::c_int;

/// How the weight `[out, in]` enters the product.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transposed {
    /// `x Wᵀ`, `[rows, in]` to `[rows, out]`.
    Yes,
    /// `y W`, `[rows, out]` to `[rows, in]`.
    No,
}

/// `x` and `weight` in bf16, the result in f32.
pub fn bf16_product(x: &Tensor, weight: &Tensor, transposed: Transposed) -> Result<Tensor> {
    let (rows, inner) = x.dims2()?;
    let (height, width) = weight.dims2()?;
    let (expected, cols) = match transposed {
        Transposed::Yes => (width, height),
        Transposed::No => (height, width),
    };
    if inner != expected {
        bail!("a product of {:?} with {:?}, {transposed:?} transposed", x.shape(), weight.shape());
    }
    let (x, weight) = (Values::new(x)?, Values::new(weight)?);
    let device = x.device();
    let out = empty::<f32>(device, rows * cols)?;
    let stream = device.cuda_stream();
    let (x_view, weight_view) = (x.view::<bf16>()?, weight.view::<bf16>()?);
    let ((a, _a), (b, _b), (c, _c)) =
        (weight_view.device_ptr(&stream), x_view.device_ptr(&stream), out.device_ptr(&stream));
    let operation = match transposed {
        Transposed::Yes => sys::cublasOperation_t::CUBLAS_OP_T,
        Transposed::No => sys::cublasOperation_t::CUBLAS_OP_N,
    };
    let (one, zero) = (1.0f32, 0.0f32);
    // cuBLAS counts columns first: what is row-major here is transposed there, so that the factors swap places.
    // SAFETY: the shapes were checked against each other, and the storages against their shapes by `Values`; all of
    // them outlive the call, and the stream orders what comes after it.
    unsafe {
        result::gemm_ex(
            *device.cublas_handle().handle(),
            operation,
            sys::cublasOperation_t::CUBLAS_OP_N,
            cols as c_int,
            rows as c_int,
            inner as c_int,
            (&raw const one).cast(),
            a as *const _,
            sys::cudaDataType_t::CUDA_R_16BF,
            width as c_int,
            b as *const _,
            sys::cudaDataType_t::CUDA_R_16BF,
            inner as c_int,
            (&raw const zero).cast(),
            c as *mut _,
            sys::cudaDataType_t::CUDA_R_32F,
            cols as c_int,
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT_TENSOR_OP,
        )
    }
    .w()?;
    drop((_a, _b, _c));
    tensor(device, out, &[rows, cols])
}

//! NF4 as tensors of a device.

use candle_core::{DType, Device, Result, Tensor};
use evalfw_engine::nf4::{BLOCK, DYNAMIC_MAP, LEVELS, NESTED_BLOCK, Nf4Tensor};

/// An NF4 matrix in the 4.127 bits a weight of its host form. Both kinds of codes are padded to whole blocks.
#[derive(Clone)]
pub struct Nf4 {
    shape: [usize; 2],
    tables: Nf4Tables,
    /// u8, two values each.
    codes: Tensor,
    /// u8, one for each block.
    scale_codes: Tensor,
    /// f32 `[nested blocks, 1]`
    nested: Tensor,
    offset: f32,
    #[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "there are kernels on CUDA only"))]
    decoding: Decoding,
}

/// Who decodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decoding {
    /// candle's own operations: two table look-ups, and a product.
    Composed,
    /// Our kernel, where the device has one.
    Kernel,
}

/// The tables all NF4 matrices of a device share.
#[derive(Clone)]
pub struct Nf4Tables {
    /// `[256, 2]`: both levels of a byte.
    pairs: Tensor,
    /// `[16]`
    #[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "for the kernel on CUDA"))]
    levels: Tensor,
    /// `[256]`: the values of the 8-bit scales.
    scales: Tensor,
}

impl Nf4Tables {
    pub fn new(device: &Device) -> Result<Self> {
        let pairs: Vec<f32> = (0..256).flat_map(|byte| [LEVELS[byte >> 4], LEVELS[byte & 15]]).collect();
        Ok(Self {
            pairs: Tensor::from_vec(pairs, (256, 2), device)?,
            levels: Tensor::new(&LEVELS[..], device)?,
            scales: Tensor::new(&DYNAMIC_MAP[..], device)?,
        })
    }
}

impl Nf4 {
    pub fn new(tensor: Nf4Tensor, device: &Device, tables: &Nf4Tables, decoding: Decoding) -> Result<Self> {
        let blocks = tensor.scales.codes.len();
        let nested_blocks = tensor.scales.absmax.len();
        let mut codes = tensor.codes;
        codes.resize(blocks * BLOCK / 2, 0);
        let mut scale_codes = tensor.scales.codes;
        scale_codes.resize(nested_blocks * NESTED_BLOCK, 0);
        Ok(Self {
            shape: tensor.shape,
            tables: tables.clone(),
            codes: Tensor::from_vec(codes, blocks * BLOCK / 2, device)?,
            scale_codes: Tensor::from_vec(scale_codes, nested_blocks * NESTED_BLOCK, device)?,
            nested: Tensor::from_vec(tensor.scales.absmax, (nested_blocks, 1), device)?,
            offset: tensor.scales.offset,
            decoding,
        })
    }

    /// The matrix in `dtype`.
    pub fn decode(&self, dtype: DType) -> Result<Tensor> {
        #[cfg(feature = "cuda")]
        if let Some(nf4) = self.for_kernels() {
            return nf4.decode(self.shape, dtype);
        }
        self.decode_composed()?.to_dtype(dtype)
    }

    /// `x Wᵀ` for a single row `x`, from the packed form, if there is a kernel for it.
    pub fn matvec(&self, x: &Tensor) -> Result<Option<Tensor>> {
        #[cfg(feature = "cuda")]
        if let Some(nf4) = self.for_kernels()
            && x.dim(0)? == 1
            && crate::cuda::Nf4::has_matvec(self.shape[1])
        {
            return nf4.matvec(self.shape, &x.contiguous()?).map(Some);
        }
        let _ = x;
        Ok(None)
    }

    #[cfg(feature = "cuda")]
    fn for_kernels(&self) -> Option<crate::cuda::Nf4<'_>> {
        (self.decoding == Decoding::Kernel && self.codes.device().is_cuda()).then_some(crate::cuda::Nf4 {
            codes: &self.codes,
            scale_codes: &self.scale_codes,
            nested: &self.nested,
            levels: &self.tables.levels,
            scales: &self.tables.scales,
            offset: self.offset,
        })
    }

    fn decode_composed(&self) -> Result<Tensor> {
        let blocks = self.codes.elem_count() / (BLOCK / 2);
        let nested_blocks = self.nested.dim(0)?;
        let absmax = look_up(&self.tables.scales, &self.scale_codes)?
            .reshape((nested_blocks, NESTED_BLOCK))?
            .broadcast_mul(&self.nested)?
            .affine(1.0, f64::from(self.offset))?
            .flatten_all()?
            .narrow(0, 0, blocks)?
            .reshape((blocks, 1))?;
        look_up(&self.tables.pairs, &self.codes)?
            .reshape((blocks, BLOCK))?
            .broadcast_mul(&absmax)?
            .flatten_all()?
            .narrow(0, 0, self.shape[0] * self.shape[1])?
            .reshape((self.shape[0], self.shape[1]))
    }
}

/// Selects rows by u8 codes. candle takes the largest value of an index type for "no row" and fills in
/// zeros without a word, so that code 255 needs a wider type.
fn look_up(table: &Tensor, codes: &Tensor) -> Result<Tensor> {
    table.index_select(&codes.to_dtype(DType::U32)?, 0)
}

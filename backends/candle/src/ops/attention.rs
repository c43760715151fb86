//! Causal grouped-query attention (Ainslie et al. 2023).

use super::{Form, Graph, by_hand};
use crate::kept::Known;
use crate::values::{CpuValues, stored};
use candle_core::{CpuStorage, CustomOp3, D, Device, Layout, Result, Shape, Tensor, bail};
use candle_nn::ops::softmax_last_dim;
use evalfw_kernels::attention::{self as kernel, Shape as HeadShape};
use std::sync::Arc;

/// Scores that exist at a time on a GPU: 128 MiB, and a few times that in the backward.
const SCORES: usize = 32 << 20;

/// The score of a key that is not seen. Metal's fast arithmetic may take infinity for any number.
const HIDDEN: f32 = -1e30;

/// Which queries are attended together, and what each of them sees. The same for all blocks of a pass.
#[derive(Clone)]
pub struct Causal {
    pieces: Arc<[Piece]>,
}

struct Piece {
    start: usize,
    queries: usize,
    /// The last of the queries sees all of them, each one before it one key less.
    keys: usize,
    /// `[queries, keys]`: [`HIDDEN`] where a query does not see a key. `None` where all see all.
    mask: Option<Tensor>,
}

impl Causal {
    /// For `queries` after `cached` positions, in `examples` sequences with `heads` heads each.
    pub fn new(
        form: Form,
        [examples, heads]: [usize; 2],
        cached: usize,
        queries: usize,
        device: &Device,
    ) -> Result<Self> {
        let at_a_time = match form {
            // The loops on the CPU cut for themselves, and need no mask.
            Form::Host => return Ok(Self { pieces: Arc::new([]) }),
            Form::Device => (SCORES / (examples * heads * (cached + queries))).clamp(1, queries.max(1)),
            Form::Stock => queries.max(1),
        };
        let pieces = (0..queries).step_by(at_a_time).map(|start| {
            let queries = at_a_time.min(queries - start);
            let keys = cached + start + queries;
            let mask = (queries > 1).then(|| causal_mask(queries, keys, device)).transpose()?;
            Ok(Piece { start, queries, keys, mask })
        });
        Ok(Self { pieces: pieces.collect::<Result<Vec<_>>>()?.into() })
    }
}

/// Attends from `q` `[examples, queries, heads, dim]` to `k` and `v` `[examples, keys, kv_heads, dim]`;
/// the last query sees all keys, each one before it one key less. The softmax is in f32.
///
/// Padding on the right needs no mask of its own: no real token comes after it.
/// With a result that is known already, that one; the stock form has no use for it.
pub fn attention(
    graph: Graph<'_>,
    qkv: [&Tensor; 3],
    causal: &Causal,
    known: Option<Known>,
) -> Result<Tensor> {
    let [q, k, v] = qkv;
    let shape = head_shape(q.shape(), k.shape(), v.shape())?;
    match graph.form {
        Form::Host => graph.op3(qkv, Attention { shape, known }),
        Form::Device => in_pieces(graph, qkv, (shape, causal), known),
        Form::Stock => composed(q, k, v, shape, causal),
    }
}

fn head_shape(q: &Shape, k: &Shape, v: &Shape) -> Result<HeadShape> {
    let (examples, queries, heads, dim) = q.dims4()?;
    let (k_examples, keys, kv_heads, k_dim) = k.dims4()?;
    let fits = k.dims() == v.dims()
        && (examples, dim) == (k_examples, k_dim)
        && queries <= keys
        && heads.is_multiple_of(kv_heads);
    if !fits {
        bail!("attention from {q:?} to {k:?} and {v:?}");
    }
    Ok(HeadShape { examples, queries, keys, heads, kv_heads, dim })
}

fn causal_mask(queries: usize, keys: usize, device: &Device) -> Result<Tensor> {
    let cached = keys - queries;
    let mask: Vec<f32> = (0..queries)
        .flat_map(|query| (0..keys).map(move |key| if key <= cached + query { 0.0 } else { HIDDEN }))
        .collect();
    Tensor::from_vec(mask, (queries, keys), device)
}

/// With candle's autograd, and the scores of the whole sequence.
fn composed(q: &Tensor, k: &Tensor, v: &Tensor, shape: HeadShape, causal: &Causal) -> Result<Tensor> {
    let outputs = causal.pieces.iter().map(|piece| {
        let heads = PieceOfHeads::new(q, k, v, shape, piece)?;
        let scores = heads.scores()?;
        // The maximum only keeps the exponentials in range: it has no gradient.
        let exponentials = scores.broadcast_sub(&scores.detach().max_keepdim(D::Minus1)?)?.exp()?;
        let weights = exponentials.broadcast_div(&exponentials.sum_keepdim(D::Minus1)?)?;
        heads.ungroup(&weights.matmul(&heads.v)?)
    });
    Tensor::cat(&outputs.collect::<Result<Vec<_>>>()?, 1)
}

fn in_pieces(
    graph: Graph<'_>,
    qkv: [&Tensor; 3],
    (shape, causal): (HeadShape, &Causal),
    known: Option<Known>,
) -> Result<Tensor> {
    let ([q, k, v], causal) = (qkv.map(Tensor::detach), causal.clone());
    let outputs = causal.pieces.iter().map(|piece| {
        let heads = PieceOfHeads::new(&q, &k, &v, shape, piece)?;
        heads.ungroup(&softmax_last_dim(&heads.scores()?)?.matmul(&heads.v)?)
    });
    let result = match known {
        Some(known) => known.on_device(q.shape(), q.device())?,
        None => Tensor::cat(&outputs.collect::<Result<Vec<_>>>()?, 1)?,
    };
    by_hand::op3(graph, "attention", qkv, result, move |[q, k, v], grad| {
        let mut of_q = Vec::with_capacity(causal.pieces.len());
        let mut of_k: Option<Tensor> = None;
        let mut of_v: Option<Tensor> = None;
        for piece in causal.pieces.iter() {
            let heads = PieceOfHeads::new(q, k, v, shape, piece)?;
            let grad = heads.grouped_queries(grad)?;
            let weights = softmax_last_dim(&heads.scores()?)?;
            let of_weights = grad.matmul(&heads.v.t()?)?;
            let along = (&of_weights * &weights)?.sum_keepdim(D::Minus1)?;
            let of_scores = ((of_weights.broadcast_sub(&along)? * &weights)? * heads.scale())?;
            of_q.push(heads.ungroup(&of_scores.matmul(&heads.k)?)?);
            add_keys(&mut of_k, heads.ungroup_keys(&of_scores.t()?.matmul(&heads.q)?)?)?;
            add_keys(&mut of_v, heads.ungroup_keys(&weights.t()?.matmul(&grad)?)?)?;
        }
        match (of_k, of_v) {
            (Some(of_k), Some(of_v)) => Ok([Tensor::cat(&of_q, 1)?, of_k, of_v]),
            _ => bail!("attention without queries"),
        }
    })
}

/// Adds the gradients of the first keys; each piece sees more of them than the one before.
fn add_keys(sum: &mut Option<Tensor>, part: Tensor) -> Result<()> {
    *sum = Some(match sum.take() {
        Some(sum) => {
            let missing = part.dim(1)? - sum.dim(1)?;
            (sum.pad_with_zeros(1, 0, missing)? + part)?
        }
        None => part,
    });
    Ok(())
}

/// The queries of a piece, and the keys and values that they see. The heads of a group stand below each
/// other, so that keys and values need not be repeated.
struct PieceOfHeads<'a> {
    shape: HeadShape,
    piece: &'a Piece,
    /// `[examples * kv_heads, group * queries, dim]`
    q: Tensor,
    /// `[examples * kv_heads, keys, dim]`
    k: Tensor,
    v: Tensor,
}

impl<'a> PieceOfHeads<'a> {
    fn new(q: &Tensor, k: &Tensor, v: &Tensor, shape: HeadShape, piece: &'a Piece) -> Result<Self> {
        let keys = |tensor: &Tensor| {
            let seen = tensor.narrow(1, 0, piece.keys)?.transpose(1, 2)?.contiguous()?;
            seen.reshape((shape.examples * shape.kv_heads, piece.keys, shape.dim))
        };
        let mut heads = Self { shape, piece, q: q.clone(), k: keys(k)?, v: keys(v)? };
        heads.q = heads.grouped_queries(q)?;
        Ok(heads)
    }

    fn group(&self) -> usize {
        self.shape.heads / self.shape.kv_heads
    }

    fn scale(&self) -> f64 {
        1.0 / (self.shape.dim as f64).sqrt()
    }

    /// The piece's part of something in the layout of the queries.
    fn grouped_queries(&self, tensor: &Tensor) -> Result<Tensor> {
        let HeadShape { examples, kv_heads, dim, .. } = self.shape;
        let part = tensor.narrow(1, self.piece.start, self.piece.queries)?.transpose(1, 2)?.contiguous()?;
        part.reshape((examples * kv_heads, self.group() * self.piece.queries, dim))
    }

    /// Scaled and masked, `[examples * kv_heads, group * queries, keys]`.
    fn scores(&self) -> Result<Tensor> {
        let scores = (&self.q * self.scale())?.matmul(&self.k.t()?)?;
        let Some(mask) = &self.piece.mask else { return Ok(scores) };
        let batch = self.shape.examples * self.shape.kv_heads;
        let (queries, keys) = (self.piece.queries, self.piece.keys);
        let masked = scores.reshape((batch * self.group(), queries, keys))?.broadcast_add(mask)?;
        masked.reshape((batch, self.group() * queries, keys))
    }

    /// Back from `[examples * kv_heads, group * queries, dim]` to the layout of the queries.
    fn ungroup(&self, grouped: &Tensor) -> Result<Tensor> {
        let HeadShape { examples, heads, dim, .. } = self.shape;
        grouped.reshape((examples, heads, self.piece.queries, dim))?.transpose(1, 2)?.contiguous()
    }

    /// Back from `[examples * kv_heads, keys, dim]` to the layout of the keys.
    fn ungroup_keys(&self, grouped: &Tensor) -> Result<Tensor> {
        let HeadShape { examples, kv_heads, dim, .. } = self.shape;
        grouped.reshape((examples, kv_heads, self.piece.keys, dim))?.transpose(1, 2)?.contiguous()
    }
}

struct Attention {
    shape: HeadShape,
    known: Option<Known>,
}

impl CustomOp3 for Attention {
    fn name(&self) -> &'static str {
        "attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (q, k, v) = (stored(q, q_layout)?, stored(k, k_layout)?, stored(v, v_layout)?);
        let result = match &self.known {
            Some(known) => known.on_host(q.len())?,
            None => CpuStorage::F32(kernel::forward(self.shape, q, k, v)),
        };
        Ok((result, q_layout.shape().clone()))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let (q_values, k_values, v_values, grad) =
            (CpuValues::new(q)?, CpuValues::new(k)?, CpuValues::new(v)?, CpuValues::new(&grad)?);
        let gradients = kernel::backward(
            self.shape,
            q_values.slice()?,
            k_values.slice()?,
            v_values.slice()?,
            grad.slice()?,
        );
        let tensor = |values, like: &Tensor| Tensor::from_vec(values, like.shape(), &Device::Cpu).map(Some);
        Ok((tensor(gradients.q, q)?, tensor(gradients.k, k)?, tensor(gradients.v, v)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::{assert_alike, var};

    /// Several pieces of queries, several examples, a cache, groups of one and of three heads.
    #[test]
    fn all_forms_are_alike() {
        for (examples, queries, keys, heads, kv_heads) in
            [(2, 5, 5, 6, 2), (1, 150, 150, 2, 2), (1, 70, 90, 2, 1), (1, 1, 9, 4, 2)]
        {
            let q = var(&[examples, queries, heads, 8], 1);
            let k = var(&[examples, keys, kv_heads, 8], 2);
            let v = var(&[examples, keys, kv_heads, 8], 3);
            let of = |form: Form, causal: &Causal| attention(form.into(), [&q, &k, &v], causal, None);
            let causal =
                |form| Causal::new(form, [examples, heads], keys - queries, queries, &Device::Cpu).unwrap();
            for form in [Form::Host, Form::Device] {
                assert_alike(
                    &[&q, &k, &v],
                    || of(form, &causal(form)),
                    || of(Form::Stock, &causal(Form::Stock)),
                );
            }
            let cut = in_pieces_of(queries.div_ceil(3), queries, keys);
            assert_alike(&[&q, &k, &v], || of(Form::Device, &cut), || of(Form::Stock, &causal(Form::Stock)));
        }
    }

    fn in_pieces_of(size: usize, queries: usize, keys: usize) -> Causal {
        let piece = |start: usize| {
            let end = queries.min(start + size);
            let seen = keys - queries + end;
            let mask = Some(causal_mask(end - start, seen, &Device::Cpu).unwrap());
            Piece { start, queries: end - start, keys: seen, mask }
        };
        Causal { pieces: (0..queries).step_by(size).map(piece).collect() }
    }
}

//! Causal grouped-query attention, a piece of the queries at a time: the scores of a whole sequence
//! never exist, and what the mask hides is hardly ever computed.

mod one;

use crate::dot;
use crate::elementwise::exponentials;
use crate::filled::zeros;
use crate::team::for_each_piece;
use crate::views::{Threads, View, ViewMut, add_product, put_product};
use one::{Seen, attend};
use rayon::prelude::*;

/// Queries whose scores exist at a time, for each thread.
const QUERIES: usize = 64;

/// Queries are `[examples, queries, heads, dim]`, keys and values `[examples, keys, kv_heads, dim]`,
/// row-major. The last query sees all keys, each one before it one key less.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Shape {
    pub examples: usize,
    pub queries: usize,
    pub keys: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub dim: usize,
}

pub struct Gradients {
    pub q: Vec<f32>,
    pub k: Vec<f32>,
    pub v: Vec<f32>,
}

/// The weighted values, in the layout of `q`.
pub fn forward(shape: Shape, q: &[f32], k: &[f32], v: &[f32]) -> Vec<f32> {
    if (shape.examples, shape.queries) == (1, 1) {
        return forward_one(shape, q, k, v);
    }
    let heads: Vec<_> = shape.heads(q, k, v).map(|head| head.forward()).collect();
    let mut out = zeros(q.len());
    shape.interleave(|head| &heads[head], &mut out);
    out
}

/// For a token that is decoded.
fn forward_one(shape: Shape, q: &[f32], k: &[f32], v: &[f32]) -> Vec<f32> {
    let Shape { heads, kv_heads, dim, .. } = shape;
    let mut out = vec![0.0; q.len()];
    for_each_piece(&mut out, dim, |head, out| {
        let first = head / (heads / kv_heads) * dim;
        let seen = Seen { keys: &k[first..], values: &v[first..], stride: kv_heads * dim };
        attend(&q[head * dim..][..dim], seen, out);
    });
    out
}

/// The gradients of the inputs, from the inputs and the gradient of the output.
pub fn backward(shape: Shape, q: &[f32], k: &[f32], v: &[f32], grad: &[f32]) -> Gradients {
    let heads: Vec<_> =
        shape.heads(q, k, v).map(|head| head.backward(shape.queries_of(head.index, grad))).collect();
    let mut gradients = Gradients { q: vec![0.0; q.len()], k: vec![0.0; k.len()], v: vec![0.0; v.len()] };
    shape.interleave(|head| &heads[head].q, &mut gradients.q);
    shape.sum_groups(|head| &heads[head].k, &mut gradients.k);
    shape.sum_groups(|head| &heads[head].v, &mut gradients.v);
    gradients
}

impl Shape {
    /// The heads of all examples, to be computed on all threads.
    fn heads<'a>(
        self,
        q: &'a [f32],
        k: &'a [f32],
        v: &'a [f32],
    ) -> impl IndexedParallelIterator<Item = Head<'a>> {
        (0..self.examples * self.heads).into_par_iter().map(move |index| Head {
            index,
            q: self.queries_of(index, q),
            k: self.keys_of(index, k),
            v: self.keys_of(index, v),
            cached_keys: self.keys - self.queries,
            queries: self.queries,
            keys: self.keys,
            dim: self.dim,
        })
    }

    /// What belongs to head `index`, counted over all examples, in a tensor like `q`.
    fn queries_of(self, index: usize, q: &[f32]) -> View<'_> {
        let width = self.heads * self.dim;
        let (example, head) = (index / self.heads, index % self.heads);
        let start = example * self.queries * width + head * self.dim;
        View::strided(&q[start..], self.queries, self.dim, width)
    }

    /// What belongs to head `index` in a tensor like `k`.
    fn keys_of(self, index: usize, k: &[f32]) -> View<'_> {
        let width = self.kv_heads * self.dim;
        let (example, head) = (index / self.heads, index % self.heads);
        let group = head / (self.heads / self.kv_heads);
        let start = example * self.keys * width + group * self.dim;
        View::strided(&k[start..], self.keys, self.dim, width)
    }

    /// Puts the `[queries, dim]` of each head into a tensor like `q`.
    fn interleave<'a>(self, of_head: impl Fn(usize) -> &'a Vec<f32> + Sync, out: &mut [f32]) {
        out.par_chunks_mut(self.heads * self.dim).enumerate().for_each(|(row, out)| {
            let (example, query) = (row / self.queries, row % self.queries);
            for (head, out) in out.chunks_mut(self.dim).enumerate() {
                out.copy_from_slice(&of_head(example * self.heads + head)[query * self.dim..][..self.dim]);
            }
        });
    }

    /// Sums the `[keys, dim]` of the heads that share keys into a tensor like `k`.
    fn sum_groups<'a>(self, of_head: impl Fn(usize) -> &'a Vec<f32> + Sync, out: &mut [f32]) {
        let group_size = self.heads / self.kv_heads;
        out.par_chunks_mut(self.kv_heads * self.dim).enumerate().for_each(|(row, out)| {
            let (example, key) = (row / self.keys, row % self.keys);
            for (group, out) in out.chunks_mut(self.dim).enumerate() {
                for member in 0..group_size {
                    let head = example * self.heads + group * group_size + member;
                    let part = &of_head(head)[key * self.dim..][..self.dim];
                    out.iter_mut().zip(part).for_each(|(out, part)| *out += part);
                }
            }
        });
    }
}

/// One head of one example.
struct Head<'a> {
    /// Counted over all examples.
    index: usize,
    /// `[queries, dim]`
    q: View<'a>,
    /// `[keys, dim]`
    k: View<'a>,
    v: View<'a>,
    /// Keys before that of the first query: those in the cache.
    cached_keys: usize,
    queries: usize,
    keys: usize,
    dim: usize,
}

fn softmax(row: &mut [f32]) {
    let (_, sum) = exponentials(row);
    let factor = (1.0 / sum) as f32;
    row.iter_mut().for_each(|value| *value *= factor);
}

impl Head<'_> {
    fn forward(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.queries * self.dim];
        let mut weights = Vec::new();
        for (piece, out) in out.chunks_mut(QUERIES * self.dim).enumerate() {
            let visible = self.weights(piece, &mut weights);
            let weights = View::new(&weights, visible);
            add_product(ViewMut::new(out, self.dim), 1.0, weights, self.v.rows(0, visible), Threads::One);
        }
        out
    }

    fn backward(&self, grad: View<'_>) -> Gradients {
        let mut out = Gradients {
            q: vec![0.0; self.queries * self.dim],
            k: vec![0.0; self.keys * self.dim],
            v: vec![0.0; self.keys * self.dim],
        };
        let (mut weights, mut of_scores) = (Vec::new(), Vec::new());
        for (piece, of_queries) in out.q.chunks_mut(QUERIES * self.dim).enumerate() {
            let first = piece * QUERIES;
            let rows = of_queries.len() / self.dim;
            let visible = self.weights(piece, &mut weights);
            let grad = grad.rows(first, rows);
            let probabilities = View::new(&weights, visible);
            let of_values = ViewMut::new(&mut out.v[..visible * self.dim], self.dim);
            add_product(of_values, 1.0, probabilities.t(), grad, Threads::One);

            // Through the softmax: p ⊙ (dp − Σ p dp), and the scale of the scores.
            of_scores.resize(rows * visible, 0.0);
            let of_weights = ViewMut::new(&mut of_scores, visible);
            put_product(of_weights, 1.0, grad, self.v.rows(0, visible).t(), Threads::One);
            for (p, dp) in weights.chunks(visible).zip(of_scores.chunks_mut(visible)) {
                let mean = dot(p, dp);
                for (dp, p) in dp.iter_mut().zip(p) {
                    *dp = p * (*dp - mean) * self.scale();
                }
            }

            let of_scores = View::new(&of_scores, visible);
            let of_queries = ViewMut::new(of_queries, self.dim);
            add_product(of_queries, 1.0, of_scores, self.k.rows(0, visible), Threads::One);
            let of_keys = ViewMut::new(&mut out.k[..visible * self.dim], self.dim);
            add_product(of_keys, 1.0, of_scores.t(), self.q.rows(first, rows), Threads::One);
        }
        out
    }

    /// The attention weights of one piece of the queries, `[rows, visible]`; returns how many keys the
    /// last of them sees. What a query does not see has weight 0.
    fn weights(&self, piece: usize, weights: &mut Vec<f32>) -> usize {
        let first = piece * QUERIES;
        let rows = QUERIES.min(self.queries - first);
        let visible = self.cached_keys + first + rows;
        weights.resize(rows * visible, 0.0);
        put_product(
            ViewMut::new(weights, visible),
            self.scale(),
            self.q.rows(first, rows),
            self.k.rows(0, visible).t(),
            Threads::One,
        );
        for (row, scores) in weights.chunks_mut(visible).enumerate() {
            let (seen, unseen) = scores.split_at_mut(visible - (rows - 1 - row));
            softmax(seen);
            unseen.fill(0.0);
        }
        visible
    }

    fn scale(&self) -> f32 {
        1.0 / (self.dim as f32).sqrt()
    }
}

//! Qwen2 with LoRA in plain loops and f64, written from the papers and nothing of the engine.

use crate::support::Tensors;
use evalfw_engine::StepInput;
use evalfw_engine::config::ModelConfig;
use evalfw_engine::dropout::MaskKey;
use evalfw_engine::lora::{Adapter, Target};

type Rows = Vec<Vec<f64>>;

pub struct Reference<'a> {
    pub config: &'a ModelConfig,
    pub tensors: &'a Tensors,
    pub adapter: Option<&'a Adapter>,
}

/// One sequence of a batch, whose masks are those of the whole flattened batch.
struct Sequence<'a> {
    tokens: &'a [u32],
    first_row: usize,
    rows: usize,
    /// Layer and target are filled in where the mask is used.
    dropout: Option<MaskKey>,
}

impl Reference<'_> {
    /// `[tokens][vocab_size]`, without dropout.
    pub fn logits(&self, tokens: &[u32]) -> Rows {
        self.forward(&Sequence { tokens, first_row: 0, rows: tokens.len(), dropout: None })
    }

    /// The mean loss of a training step.
    pub fn loss(&self, input: &StepInput<'_>) -> f64 {
        let mut sum = 0.0;
        for (micro_batch, batch) in input.micro_batches.iter().enumerate() {
            let (slots, rows) = (batch.sequence_length(), batch.slot_tokens());
            for (example, ids) in batch.input_ids.iter().enumerate() {
                let (seed, step) = (input.dropout_seed, input.step);
                let dropout = Some(MaskKey { seed, step, micro_batch, layer: 0, target: Target::Q });
                let logits =
                    self.forward(&Sequence { tokens: ids, first_row: example * slots, rows, dropout });
                for position in 1..slots {
                    if let Ok(label) = usize::try_from(batch.labels[example][position]) {
                        let row = &logits[position - 1];
                        let largest = row.iter().copied().fold(f64::MIN, f64::max);
                        let exponentials: f64 = row.iter().map(|v| (v - largest).exp()).sum();
                        sum += exponentials.ln() + largest - row[label];
                    }
                }
            }
        }
        sum / input.trained_tokens() as f64
    }

    fn forward(&self, sequence: &Sequence<'_>) -> Rows {
        let hidden = self.config.hidden_size;
        let embedding = &self.tensors["model.embed_tokens.weight"];
        let row = |&token: &u32| embedding[token as usize * hidden..][..hidden].iter().map(|&v| f64::from(v));
        let mut x: Rows = sequence.tokens.iter().map(|token| row(token).collect()).collect();
        for layer in 0..self.config.num_hidden_layers {
            let normed = self.norm(&x, &format!("model.layers.{layer}.input_layernorm.weight"));
            let project = |target, x: &Rows| self.project(layer, target, x, sequence);
            let [query, key, value] = [Target::Q, Target::K, Target::V].map(|t| project(t, &normed));
            let mixed = self.attend(&self.rotate(query), &self.rotate(key), &value);
            add(&mut x, &project(Target::O, &mixed));

            let normed = self.norm(&x, &format!("model.layers.{layer}.post_attention_layernorm.weight"));
            let mut inner = project(Target::Gate, &normed);
            for (gate, up) in inner.iter_mut().zip(project(Target::Up, &normed)) {
                for (gate, up) in gate.iter_mut().zip(up) {
                    *gate = *gate / (1.0 + (-*gate).exp()) * up;
                }
            }
            add(&mut x, &project(Target::Down, &inner));
        }
        let head =
            if self.config.tie_word_embeddings { "model.embed_tokens.weight" } else { "lm_head.weight" };
        multiply(&self.norm(&x, "model.norm.weight"), &self.tensors[head])
    }

    fn norm(&self, x: &Rows, name: &str) -> Rows {
        let weight = &self.tensors[name];
        let row = |row: &Vec<f64>| {
            let mean = row.iter().map(|v| v * v).sum::<f64>() / row.len() as f64;
            let scale = 1.0 / (mean + self.config.rms_norm_eps).sqrt();
            row.iter().zip(weight).map(|(v, &w)| v * scale * f64::from(w)).collect()
        };
        x.iter().map(row).collect()
    }

    fn project(&self, layer: usize, target: Target, x: &Rows, sequence: &Sequence<'_>) -> Rows {
        let prefix = format!("model.layers.{layer}.{}", target.path());
        let mut y = multiply(x, &self.tensors[&format!("{prefix}.weight")]);
        if let Some(bias) = self.tensors.get(&format!("{prefix}.bias")) {
            for row in &mut y {
                row.iter_mut().zip(bias).for_each(|(v, &b)| *v += f64::from(b));
            }
        }
        let Some(adapter) = self.adapter else { return y };
        let mut x = x.clone();
        let rate = adapter.config.lora_dropout;
        if let (Some(key), true) = (sequence.dropout, rate > 0.0) {
            let width = x[0].len();
            let mask = MaskKey { layer, target, ..key }.mask(rate, sequence.rows * width);
            let mask = mask[sequence.first_row * width..].chunks(width);
            for (row, mask) in x.iter_mut().zip(mask) {
                row.iter_mut().zip(mask).for_each(|(v, &m)| *v *= f64::from(m));
            }
        }
        let pair = &adapter.tensors[&(layer, target)];
        let mut delta = multiply(&multiply(&x, &pair.a), &pair.b);
        delta.iter_mut().flatten().for_each(|v| *v *= adapter.config.scale());
        add(&mut y, &delta);
        y
    }

    /// Half-split: element i turns with element i + dim / 2.
    fn rotate(&self, mut x: Rows) -> Rows {
        let dim = self.config.head_dim;
        for (position, row) in x.iter_mut().enumerate() {
            for head in row.chunks_mut(dim) {
                for i in 0..dim / 2 {
                    let angle = position as f64 / self.config.rope_theta.powf(2.0 * i as f64 / dim as f64);
                    let (first, second) = (head[i], head[i + dim / 2]);
                    head[i] = first * angle.cos() - second * angle.sin();
                    head[i + dim / 2] = second * angle.cos() + first * angle.sin();
                }
            }
        }
        x
    }

    fn attend(&self, query: &Rows, key: &Rows, value: &Rows) -> Rows {
        let dim = self.config.head_dim;
        let group = self.config.num_attention_heads / self.config.num_key_value_heads;
        let mut out = vec![vec![0.0; self.config.num_attention_heads * dim]; query.len()];
        for (position, out) in out.iter_mut().enumerate() {
            for (head, out) in out.chunks_mut(dim).enumerate() {
                let shared = head / group * dim..(head / group + 1) * dim;
                let query = &query[position][head * dim..][..dim];
                let weights: Vec<f64> = (0..=position)
                    .map(|seen| dot(query, &key[seen][shared.clone()]) / (dim as f64).sqrt())
                    .map(f64::exp)
                    .collect();
                let sum: f64 = weights.iter().sum();
                for (seen, weight) in weights.iter().enumerate() {
                    for (out, value) in out.iter_mut().zip(&value[seen][shared.clone()]) {
                        *out += weight / sum * value;
                    }
                }
            }
        }
        out
    }
}

/// `x · Wᵀ` for a row-major W of as many columns as `x` has.
fn multiply(x: &Rows, weight: &[f32]) -> Rows {
    let row = |row: &Vec<f64>| {
        let product = |w: &[f32]| row.iter().zip(w).map(|(a, &b)| a * f64::from(b)).sum();
        weight.chunks(row.len()).map(product).collect()
    };
    x.iter().map(row).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add(x: &mut Rows, y: &Rows) {
    for (x, y) in x.iter_mut().zip(y) {
        x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
    }
}

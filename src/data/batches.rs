//! Rows of a fixed number of slots, and batches of rows, in an order that a seed decides.

use super::chat::TokenizedExample;
use anyhow::{Result, bail};
use evalfw_engine::batch::{Batch, IGNORE_INDEX};
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// A batch and the number of source examples in it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PreparedBatch {
    pub batch: Batch,
    pub examples: usize,
}

#[derive(Debug, Clone, Copy)]
pub struct BatchShape {
    pub sequence_length: usize,
    pub batch_size: usize,
    /// Fill a row with several whole examples instead of padding.
    pub packing: bool,
}

#[derive(Default)]
struct Row {
    ids: Vec<u32>,
    labels: Vec<i64>,
    examples: usize,
}

impl Row {
    fn push(&mut self, ids: &[u32], labels: &[i64]) {
        self.ids.extend(ids);
        self.labels.extend(labels);
        // The first token of a row has nothing to predict it.
        self.labels[0] = IGNORE_INDEX;
        self.examples += 1;
    }

    fn has_target(&self) -> bool {
        self.labels.iter().any(|&l| l != IGNORE_INDEX)
    }
}

/// Makes `count` batches out of the examples in shuffled order, beginning again (and shuffling again)
/// when they run out. An example without an answer inside the row's slots is left out.
pub fn batches(
    examples: &[TokenizedExample],
    shape: BatchShape,
    count: usize,
    seed: u64,
) -> Result<Vec<PreparedBatch>> {
    let slots = shape.sequence_length;
    let usable: Vec<&TokenizedExample> =
        examples.iter().filter(|e| e.labels.iter().take(slots).skip(1).any(|&l| l != IGNORE_INDEX)).collect();
    if usable.is_empty() {
        bail!("no example has a token of its answer within sequence_length {slots}");
    }
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut order: Vec<usize> = Vec::new();
    let mut next = || {
        if order.is_empty() {
            order.extend(0..usable.len());
            order.shuffle(&mut random);
        }
        order.pop().map(|i| usable[i])
    };
    let wanted = count * shape.batch_size;
    let mut rows: Vec<Row> = Vec::new();
    let mut row = Row::default();
    while rows.len() < wanted {
        let Some(example) = next() else { break };
        let length = example.ids.len().min(slots);
        let fits = row.ids.len() + length <= slots;
        if row.examples > 0 && !(shape.packing && fits) {
            rows.push(std::mem::take(&mut row));
        }
        row.push(&example.ids[..length], &example.labels[..length]);
    }
    debug_assert!(rows.iter().all(Row::has_target));
    Ok(rows.chunks(shape.batch_size).take(count).map(|rows| pad(rows, slots)).collect())
}

/// For a model without a tokenizer: rows full of seeded random ids, with labels on the second half.
/// The work is the same, the text means nothing.
pub fn random_batches(vocab_size: usize, shape: BatchShape, count: usize, seed: u64) -> Vec<PreparedBatch> {
    let slots = shape.sequence_length;
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut row = || {
        let ids = random_tokens(&mut random, vocab_size, slots);
        let labels = ids
            .iter()
            .enumerate()
            .map(|(i, &id)| if i < slots.div_ceil(2) { IGNORE_INDEX } else { id.into() });
        Row { labels: labels.collect(), ids, examples: 1 }
    };
    (0..count).map(|_| pad(&(0..shape.batch_size).map(|_| row()).collect::<Vec<_>>(), slots)).collect()
}

/// Prompt ids for measuring speed: seeded, uniform over the vocabulary.
pub fn random_prompt(vocab_size: usize, tokens: usize, seed: u64) -> Vec<u32> {
    random_tokens(&mut ChaCha8Rng::seed_from_u64(seed), vocab_size, tokens)
}

fn random_tokens(random: &mut ChaCha8Rng, vocab_size: usize, count: usize) -> Vec<u32> {
    (0..count).map(|_| random.random_range(0..vocab_size as u32)).collect()
}

fn pad(rows: &[Row], slots: usize) -> PreparedBatch {
    let values = rows.iter().map(|row| (row.ids.clone(), row.labels.clone()));
    PreparedBatch {
        batch: Batch::right_padded(values, slots),
        examples: rows.iter().map(|r| r.examples).sum(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn example(prompt: usize, answer: usize, id: u32) -> TokenizedExample {
        let mut labels = vec![IGNORE_INDEX; prompt];
        labels.extend(vec![i64::from(id); answer]);
        TokenizedExample { ids: vec![id; prompt + answer], labels }
    }

    #[test]
    fn packing_fills_rows_with_whole_examples() {
        let examples: Vec<_> = (1..=6).map(|id| example(2, 2, id)).collect();
        let shape = BatchShape { sequence_length: 10, batch_size: 1, packing: true };
        let packed = batches(&examples, shape, 3, 1).unwrap();
        assert!(packed.iter().all(|b| b.examples == 2 && b.batch.real_tokens() == 8));
        let padded = batches(&examples, BatchShape { packing: false, ..shape }, 6, 1).unwrap();
        assert!(padded.iter().all(|b| b.examples == 1 && b.batch.real_tokens() == 4));
    }

    #[test]
    fn answers_beyond_the_row_are_an_error_that_names_the_length() {
        let shape = BatchShape { sequence_length: 4, batch_size: 1, packing: true };
        let error = batches(&[example(8, 2, 1)], shape, 1, 1).unwrap_err().to_string();
        assert!(error.contains("sequence_length 4"), "{error}");
    }

    #[test]
    fn the_seed_decides_the_order() {
        let examples: Vec<_> = (1..=50).map(|id| example(1, 1, id)).collect();
        let shape = BatchShape { sequence_length: 4, batch_size: 2, packing: false };
        let make = |seed| batches(&examples, shape, 20, seed).unwrap();
        assert_eq!(make(1), make(1));
        assert_ne!(make(1), make(2));
    }

    proptest! {
        #[test]
        fn every_batch_has_its_shape_and_something_to_learn(
            lengths in prop::collection::vec((1usize..20, 1usize..20), 1..30),
            sequence_length in 21usize..60, batch_size in 1usize..4, count in 1usize..6, packing: bool,
        ) {
            let examples: Vec<_> = lengths.iter().map(|&(p, a)| example(p, a, 7)).collect();
            let shape = BatchShape { sequence_length, batch_size, packing };
            let made = batches(&examples, shape, count, 3).unwrap();
            prop_assert_eq!(made.len(), count);
            for PreparedBatch { batch, examples } in made {
                prop_assert!(batch.validate(8).is_ok());
                prop_assert_eq!((batch.examples(), batch.sequence_length()), (batch_size, sequence_length));
                prop_assert!(batch.trained_tokens() >= batch_size && examples >= batch_size);
            }
        }
    }
}

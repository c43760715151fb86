//! Tokenised examples as the harness hands them out, one JSON object a line.

use crate::{Error, Result};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::Path;

/// The label of a position without a loss, as in transformers.
pub const IGNORE_INDEX: i64 = -100;

/// A right-padded batch in the convention of transformers: `labels` are aligned with `input_ids`, and
/// the model predicts `labels[t + 1]` at position `t`.
///
/// Padding stands on the right and carries no label. Under a causal mask it can then influence nothing
/// that counts, so that engines need no attention mask.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Batch {
    /// `[examples][slots]`, all rows of the same length.
    pub input_ids: Vec<Vec<u32>>,
    pub labels: Vec<Vec<i64>>,
    /// Tokens that are not padding, for each example.
    pub lengths: Vec<usize>,
}

impl Batch {
    /// Pads rows of (ids, labels) of the same length to `slots`.
    pub fn right_padded(rows: impl IntoIterator<Item = (Vec<u32>, Vec<i64>)>, slots: usize) -> Self {
        let mut batch = Self { input_ids: Vec::new(), labels: Vec::new(), lengths: Vec::new() };
        for (mut ids, mut labels) in rows {
            batch.lengths.push(ids.len());
            // Any id will do: nothing that counts can see it.
            ids.resize(slots, 0);
            labels.resize(slots, IGNORE_INDEX);
            batch.input_ids.push(ids);
            batch.labels.push(labels);
        }
        batch
    }

    pub fn examples(&self) -> usize {
        self.input_ids.len()
    }

    /// Slots of one row, padding included.
    pub fn sequence_length(&self) -> usize {
        self.input_ids.first().map_or(0, Vec::len)
    }

    /// Positions with padding.
    pub fn slot_tokens(&self) -> usize {
        self.examples() * self.sequence_length()
    }

    /// Positions without padding.
    pub fn real_tokens(&self) -> usize {
        self.lengths.iter().sum()
    }

    /// Positions with a loss.
    pub fn trained_tokens(&self) -> usize {
        self.targets().len()
    }

    pub fn flat_ids(&self) -> Vec<u32> {
        self.input_ids.concat()
    }

    /// The supervised positions as (row of the flattened `[examples * slots]` hidden states, token to
    /// predict there). The shift by one is done here, once for all engines.
    pub fn targets(&self) -> Vec<(u32, u32)> {
        let slots = self.sequence_length();
        let mut targets = Vec::new();
        for (example, labels) in self.labels.iter().enumerate() {
            for (position, &label) in labels.iter().enumerate().skip(1) {
                if let Ok(token) = u32::try_from(label) {
                    targets.push(((example * slots + position - 1) as u32, token));
                }
            }
        }
        targets
    }

    /// Checks the shape, that padding has no labels and that every id is below `vocab_size`.
    pub fn validate(&self, vocab_size: usize) -> std::result::Result<(), String> {
        let slots = self.sequence_length();
        if slots == 0 {
            return Err("input_ids is empty".into());
        }
        if self.labels.len() != self.examples() || self.lengths.len() != self.examples() {
            return Err("input_ids, labels and lengths differ in the number of examples".into());
        }
        for (row, ids) in self.input_ids.iter().enumerate() {
            let labels = &self.labels[row];
            if ids.len() != slots || labels.len() != slots {
                return Err(format!("example {row} does not have {slots} slots"));
            }
            let length = self.lengths[row];
            if length > slots {
                return Err(format!("example {row} has a length of {length}, but only {slots} slots"));
            }
            if let Some(index) = labels[length..].iter().position(|&label| label != IGNORE_INDEX) {
                let slot = length + index;
                return Err(format!(
                    "example {row} has a label at slot {slot}, but its length is {length}: padding carries none"
                ));
            }
            if let Some(id) = ids.iter().find(|&&id| id as usize >= vocab_size) {
                return Err(format!("token id {id} is not below the vocabulary of {vocab_size}"));
            }
            let in_vocabulary = |label: i64| label == IGNORE_INDEX || (0..vocab_size as i64).contains(&label);
            if let Some(label) = labels.iter().find(|&&label| !in_vocabulary(label)) {
                return Err(format!("label {label} is neither a token id nor {IGNORE_INDEX}"));
            }
        }
        Ok(())
    }
}

/// Reads a file of batches, one JSON object a line.
pub fn read_batches(path: &Path) -> Result<Vec<Batch>> {
    let file = File::open(path).map_err(|e| Error::file(path, e))?;
    let mut batches = Vec::new();
    for (number, line) in BufReader::new(file).lines().enumerate() {
        let line = line.map_err(|e| Error::file(path, e))?;
        let batch = serde_json::from_str(&line)
            .map_err(|e| Error::file(path, format_args!("line {}: {e}", number + 1)))?;
        batches.push(batch);
    }
    Ok(batches)
}

pub fn write_batches(path: &Path, batches: &[Batch]) -> std::io::Result<()> {
    let mut file = BufWriter::new(File::create(path)?);
    for batch in batches {
        serde_json::to_writer(&mut file, batch)?;
        file.write_all(b"\n")?;
    }
    file.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch() -> Batch {
        Batch {
            input_ids: vec![vec![5, 6, 7, 0], vec![8, 9, 10, 11]],
            labels: vec![vec![IGNORE_INDEX, IGNORE_INDEX, 7, IGNORE_INDEX], vec![IGNORE_INDEX, 9, 10, 11]],
            lengths: vec![3, 4],
        }
    }

    #[test]
    fn targets_are_shifted_by_one_and_flattened() {
        assert_eq!(batch().targets(), vec![(1, 7), (4, 9), (5, 10), (6, 11)]);
    }

    #[test]
    fn counts_tell_slots_real_and_trained_tokens_apart() {
        let b = batch();
        assert_eq!((b.slot_tokens(), b.real_tokens(), b.trained_tokens()), (8, 7, 4));
    }

    #[test]
    fn a_label_on_the_first_token_has_nothing_to_predict_it() {
        let b = Batch { input_ids: vec![vec![1, 2]], labels: vec![vec![1, 2]], lengths: vec![2] };
        assert_eq!(b.targets(), vec![(0, 2)]);
    }

    #[test]
    fn ids_beyond_the_vocabulary_are_refused() {
        assert!(batch().validate(12).is_ok());
        assert!(batch().validate(11).unwrap_err().contains("token id 11"));
    }

    #[test]
    fn lengths_beyond_the_slots_and_labels_beyond_the_lengths_are_refused() {
        let long = Batch { lengths: vec![5, 4], ..batch() };
        assert_eq!(long.validate(12).unwrap_err(), "example 0 has a length of 5, but only 4 slots");
        let padded = Batch { lengths: vec![3, 2], ..batch() };
        assert!(padded.validate(12).unwrap_err().contains("example 1 has a label at slot 2"));
    }

    #[test]
    fn a_broken_line_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("batches.jsonl");
        write_batches(&path, &[batch()]).unwrap();
        assert_eq!(read_batches(&path).unwrap(), vec![batch()]);
        std::fs::write(&path, "{\"input_ids\":[[1]]}\n").unwrap();
        let error = read_batches(&path).unwrap_err().to_string();
        assert!(error.contains("batches.jsonl: line 1") && error.contains("labels"), "{error}");
    }
}

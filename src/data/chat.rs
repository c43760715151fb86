//! Chats to token ids, in the ChatML form of Qwen2.5, with labels on the answers only.

use super::dataset::{Example, Role};
use anyhow::{Context, Result, bail};
use evalfw_engine::batch::IGNORE_INDEX;
use evalfw_engine::config::ModelConfig;
use std::ops::Range;
use std::path::Path;
use tokenizers::Tokenizer;

/// One example as the model sees it; both have the same length.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenizedExample {
    pub ids: Vec<u32>,
    /// The token's id where it belongs to an answer, [`IGNORE_INDEX`] elsewhere.
    pub labels: Vec<i64>,
}

/// Reads `tokenizer.json` of a model folder, if there is one, and checks it against the model.
pub fn read_tokenizer(dir: &Path, model: &ModelConfig) -> Result<Option<Tokenizer>> {
    let path = dir.join("tokenizer.json");
    if !path.exists() {
        return Ok(None);
    }
    let tokenizer = Tokenizer::from_file(&path);
    let tokenizer = tokenizer.map_err(|e| anyhow::anyhow!("{}: {e}", path.display()))?;
    let vocabulary = tokenizer.get_vocab(true);
    if let Some((token, id)) = vocabulary.iter().max_by_key(|(_, id)| **id)
        && *id as usize >= model.vocab_size
    {
        bail!(
            "{}: token {token:?} has id {id}, but config.json's vocab_size is {}",
            path.display(),
            model.vocab_size
        );
    }
    Ok(Some(tokenizer))
}

/// Tokenises a chat as a whole, so that the ids are those the model would see, and labels the tokens
/// that begin inside an answer. The end of an answer, `<|im_end|>`, is part of it.
pub fn tokenize(tokenizer: &Tokenizer, example: &Example) -> Result<TokenizedExample> {
    let (text, answers) = chatml(example);
    let encoding = tokenizer.encode(text, false);
    let encoding = encoding.map_err(|e| anyhow::anyhow!("{e}")).context("the tokenizer failed")?;
    let ids = encoding.get_ids().to_vec();
    let labels = ids
        .iter()
        .zip(encoding.get_offsets())
        .map(|(&id, &(start, _))| match answers.iter().any(|answer| answer.contains(&start)) {
            true => i64::from(id),
            false => IGNORE_INDEX,
        })
        .collect();
    Ok(TokenizedExample { ids, labels })
}

/// The text of a chat, and where in it (in bytes) the answers are.
fn chatml(example: &Example) -> (String, Vec<Range<usize>>) {
    let mut text = String::new();
    let mut answers = Vec::new();
    for message in &example.messages {
        text += &format!("<|im_start|>{}\n", message.role.as_str());
        let start = text.len();
        text += &message.content;
        text += "<|im_end|>";
        if message.role == Role::Assistant {
            answers.push(start..text.len());
        }
        text.push('\n');
    }
    (text, answers)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::dataset::Message;

    #[test]
    fn answers_end_with_their_end_mark() {
        let message = |role, content: &str| Message { role, content: content.into() };
        let example = Example { messages: vec![message(Role::User, "hü?"), message(Role::Assistant, "ja")] };
        let (text, answers) = chatml(&example);
        assert_eq!(text, "<|im_start|>user\nhü?<|im_end|>\n<|im_start|>assistant\nja<|im_end|>\n");
        assert_eq!(&text[answers[0].clone()], "ja<|im_end|>");
        assert_eq!(answers.len(), 1);
    }
}

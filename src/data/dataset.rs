//! Instruction data: `messages` JSONL, as TRL and axolotl take it.

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use std::path::Path;

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Example {
    pub messages: Vec<Message>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Message {
    pub role: Role,
    pub content: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    System,
    User,
    Assistant,
}

impl Role {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
        }
    }
}

/// What is trained on and what is evaluated on.
#[derive(Debug, Clone)]
pub struct Dataset {
    pub train: Vec<Example>,
    pub valid: Vec<Example>,
}

impl Dataset {
    /// The project's own data.
    pub fn built_in() -> Result<Self> {
        Ok(Self {
            train: parse("data/train.jsonl", include_str!("../../data/train.jsonl"))?,
            valid: parse("data/valid.jsonl", include_str!("../../data/valid.jsonl"))?,
        })
    }

    /// `train.jsonl` and `valid.jsonl` of a folder.
    pub fn read(folder: &Path) -> Result<Self> {
        let read = |name: &str| {
            let path = folder.join(name);
            let place = path.display().to_string();
            let text = std::fs::read_to_string(&path).with_context(|| place.clone())?;
            parse(&place, &text)
        };
        Ok(Self { train: read("train.jsonl")?, valid: read("valid.jsonl")? })
    }
}

fn parse(place: &str, text: &str) -> Result<Vec<Example>> {
    let mut examples = Vec::new();
    // Editors on Windows begin a file with a byte-order mark.
    let text = text.trim_start_matches('\u{feff}');
    for (number, line) in text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()) {
        let place = || format!("{place}: line {}", number + 1);
        let example: Example = serde_json::from_str(line).with_context(place)?;
        if !example.messages.iter().any(|m| m.role == Role::Assistant && !m.content.is_empty()) {
            bail!("{}: messages holds no answer of the role assistant", place());
        }
        examples.push(example);
    }
    if examples.is_empty() {
        bail!("{place}: the data set is empty");
    }
    Ok(examples)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(text: &str) -> String {
        format!("{:#}", parse("my/train.jsonl", text).unwrap_err())
    }

    #[test]
    fn bad_data_names_file_and_line() {
        let good = r#"{"messages":[{"role":"user","content":"a"},{"role":"assistant","content":"b"}]}"#;
        assert_eq!(parse("x", &format!("{good}\n\n{good}\n")).unwrap().len(), 2);
        assert_eq!(parse("x", &format!("\u{feff}{good}\r\n")).unwrap().len(), 1);
        assert!(error("").contains("my/train.jsonl: the data set is empty"));
        assert!(error(&format!("{good}\nnot json")).contains("my/train.jsonl: line 2"));
        assert!(error(r#"{"messages":[{"role":"user","content":"a"}]}"#).contains("role assistant"));
        assert!(error(r#"{"messages":[{"role":"tool","content":"a"}]}"#).contains("tool"));
        assert!(error(r#"{"prompt":"a"}"#).contains("messages"));
    }

    #[test]
    fn the_built_in_data_is_whole() {
        let data = Dataset::built_in().unwrap();
        assert!(
            data.train.len() >= 300 && data.valid.len() >= 30,
            "{} {}",
            data.train.len(),
            data.valid.len()
        );
        assert!(data.valid.iter().all(|v| !data.train.contains(v)), "an example is in both sets");
    }
}

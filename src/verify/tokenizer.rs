//! Texts and their token ids: whether a checkpoint's tokenizer is read as transformers reads it.
//!
//! Engines get token ids from the harness. One whose framework has a tokenizer of its own is asked for it; for the others
//! stands the `tokenizers` library, with which the harness makes their ids, and which their users take.

use super::compare::Deviation;
use super::session::{Broken, Session};
use super::{Check, Verdict};
use anyhow::{Context, Result, bail};
use evalfw_engine::protocol::Tokenize;
use serde::Deserialize;
use std::path::{Path, PathBuf};
use tokenizers::Tokenizer;

/// As the check is called.
pub const TOKENIZER: &str = "token ids of texts";
/// In place of the name of a reference model.
const MODEL: &str = "tokenizer";

/// What transformers makes of some texts.
pub struct TokenizerCases {
    pub folder: PathBuf,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    text: String,
    ids: Vec<u32>,
}

impl TokenizerCases {
    /// `None` where there is no such folder.
    pub fn read(folder: &Path) -> Result<Option<Self>> {
        if !folder.is_dir() {
            return Ok(None);
        }
        let path = folder.join("cases.json");
        let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let cases: Vec<Case> = serde_json::from_str(&text).with_context(|| path.display().to_string())?;
        if cases.iter().all(|case| case.ids.is_empty()) {
            bail!("{}: no token ids", path.display());
        }
        Ok(Some(Self { folder: folder.to_owned(), cases }))
    }

    /// Holds what the engine, or else the harness, makes of the texts against the reference.
    pub fn check(&self, session: &mut Session, verdict: &mut Verdict) -> Result<(), Broken> {
        let mut made = Vec::new();
        for case in &self.cases {
            match session.call("tokenize", Tokenize { folder: self.folder.clone(), text: case.text.clone() })
            {
                Ok(reply) => made.push(reply.tokens),
                Err(broken) if broken.refused => break,
                Err(broken) => return Err(broken),
            }
        }
        let by = if made.is_empty() { "by the tokenizers library" } else { "by the framework's own reader" };
        if made.is_empty() {
            made = session.harness("tokenize", self.by_the_harness())?;
        }
        let wrong: Vec<usize> = (0..self.cases.len()).filter(|&i| made[i] != self.cases[i].ids).collect();
        let mut place = format!("{} texts, {by}", self.cases.len());
        if let Some(first) = wrong.first() {
            place += &format!("; text {first}: {:?}, expected {:?}", made[*first], self.cases[*first].ids);
        }
        let deviation = Deviation::new(wrong.len() as f64, place);
        verdict.checks.push(Check::new(MODEL, TOKENIZER.to_owned(), deviation, 0.0));
        Ok(())
    }

    fn by_the_harness(&self) -> Result<Vec<Vec<u32>>> {
        let path = self.folder.join("tokenizer.json");
        let failed = |error: tokenizers::Error| anyhow::anyhow!("{}: {error}", path.display());
        let tokenizer = Tokenizer::from_file(&path).map_err(failed)?;
        let ids =
            |case: &Case| Ok(tokenizer.encode(case.text.as_str(), false).map_err(failed)?.get_ids().to_vec());
        self.cases.iter().map(ids).collect()
    }
}

//! A tokenizer in Qwen2's format, trained on the spot.
//!
//! It is a byte-level BPE with Qwen2's normalizer and pre-tokenizer, and with Qwen's special tokens at
//! their real ids. The learned vocabulary is far smaller than Qwen's, so the ids between it and the
//! special tokens stand for nothing; a model may still produce them, and decoding leaves them out.

use crate::model::{Error, Result};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tokenizers::decoders::byte_level::ByteLevel;
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::normalizers::unicode::NFC;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior, Tokenizer, TokenizerBuilder};

/// Where Qwen2 cuts a text before it merges: contractions, words, single digits, punctuation, line ends,
/// blanks.
const PRE_TOKENIZER: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Qwen's tokens for structure, from [`QWEN_FIRST_SPECIAL`] on, in the order of their ids.
pub const STRUCTURE_TOKENS: [&str; 22] = [
    END_OF_TEXT,
    MESSAGE_START,
    MESSAGE_END,
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
];
const END_OF_TEXT: &str = "<|endoftext|>";
const MESSAGE_START: &str = "<|im_start|>";
const MESSAGE_END: &str = "<|im_end|>";
/// The first of them that is not special: decoding keeps it even where special tokens are skipped.
const FIRST_NOT_SPECIAL: usize = 14;
/// The id of `<|endoftext|>` in every Qwen2 and Qwen2.5 tokenizer.
const QWEN_FIRST_SPECIAL: usize = 151_643;
/// Tokens learned at most, the 256 bytes included.
const LEARNED_TOKENS: usize = 8192;
/// Every byte has a token, and every structure token.
pub const SMALLEST_VOCABULARY: usize = 256 + STRUCTURE_TOKENS.len();

/// The ids of the structure tokens in a vocabulary of a given size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StructureIds {
    first: usize,
}

impl StructureIds {
    /// Qwen's own ids where the vocabulary is large enough for them; otherwise the last ids, so that
    /// models with a small vocabulary, as tests have them, get a tokenizer that fits.
    pub fn of(vocab_size: usize) -> Self {
        let last_possible = vocab_size.saturating_sub(STRUCTURE_TOKENS.len());
        Self { first: last_possible.min(QWEN_FIRST_SPECIAL) }
    }

    /// Each token with its id and whether it is special.
    fn tokens(self) -> impl Iterator<Item = (&'static str, u32, bool)> {
        let with_id = move |(i, token)| (token, (self.first + i) as u32, i < FIRST_NOT_SPECIAL);
        STRUCTURE_TOKENS.into_iter().enumerate().map(with_id)
    }

    /// `<|endoftext|>`, which also pads.
    pub fn end_of_text(self) -> usize {
        self.first
    }

    /// `<|im_end|>`, which ends an answer.
    pub fn message_end(self) -> usize {
        self.first + 2
    }
}

/// A line of an instruction data set.
#[derive(Deserialize)]
struct Example {
    messages: Vec<Message>,
}

#[derive(Deserialize)]
struct Message {
    role: String,
    content: String,
}

/// The texts of a `messages` JSONL data set: roles and contents.
pub fn texts(jsonl: &str) -> Result<Vec<String>> {
    let mut texts = Vec::new();
    for (number, line) in jsonl.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let example: Example = serde_json::from_str(line)
            .map_err(|e| Error::Tokenizer(format!("line {} of the training text: {e}", number + 1)))?;
        texts.extend(example.messages.into_iter().flat_map(|message| [message.role, message.content]));
    }
    Ok(texts)
}

/// Trains on `texts` and returns `tokenizer.json`. The same texts give the same bytes.
pub fn train(texts: &[String], vocab_size: usize) -> Result<String> {
    let ids = StructureIds::of(vocab_size);
    let learned = learn(texts, ids.first.min(LEARNED_TOKENS)).map_err(failed)?;
    with_structure_tokens(learned, ids).and_then(|tokenizer| tokenizer.to_string(true)).map_err(failed)
}

fn failed(error: tokenizers::Error) -> Error {
    Error::Tokenizer(error.to_string())
}

fn learn(texts: &[String], size: usize) -> tokenizers::Result<BPE> {
    let mut trainer = BpeTrainerBuilder::new()
        .vocab_size(size)
        .min_frequency(2)
        .show_progress(false)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build();
    let mut tokenizer = pipeline(BPE::default())?;
    tokenizer.train(&mut trainer, texts.iter())?;
    Ok(tokenizer.get_model().clone())
}

type Pipeline = tokenizers::TokenizerImpl<BPE, NFC, Sequence, ByteLevel, ByteLevel>;

fn pipeline(model: BPE) -> tokenizers::Result<Pipeline> {
    let pattern = SplitPattern::Regex(PRE_TOKENIZER.to_owned());
    let split = Split::new(pattern, SplitDelimiterBehavior::Isolated, false)?;
    let bytes = ByteLevel::new(false, false, false);
    TokenizerBuilder::new()
        .with_model(model)
        .with_normalizer(Some(NFC))
        .with_pre_tokenizer(Some(Sequence::new(vec![split.into(), bytes.into()])))
        .with_post_processor(Some(bytes))
        .with_decoder(Some(bytes))
        .build()
}

/// Adds the structure tokens. The crate numbers added tokens by itself, from the end of the model's
/// vocabulary on; one that is in the vocabulary keeps its id, so they are put there first. No merge
/// leads to them, so plain text never becomes one by merging.
fn with_structure_tokens(learned: BPE, ids: StructureIds) -> tokenizers::Result<Tokenizer> {
    let mut parts = serde_json::to_value(&learned)?;
    if let Some(vocab) = parts["vocab"].as_object_mut() {
        vocab.extend(ids.tokens().map(|(token, id, _)| (token.to_owned(), id.into())));
    }
    // Through text: the crate's reader borrows from its input, which a `Value` cannot lend.
    let mut tokenizer = pipeline(serde_json::from_str(&parts.to_string())?)?;
    tokenizer.add_tokens(
        ids.tokens()
            .map(|(token, _, special)| AddedToken::from(token, special).normalized(false))
            .collect::<Vec<_>>(),
    )?;
    Ok(tokenizer.into())
}

/// ChatML: each message between `<|im_start|>role` and `<|im_end|>`.
const CHAT_TEMPLATE: &str = "\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
";

/// `tokenizer_config.json`, as transformers writes it for Qwen2.
pub fn tokenizer_config(vocab_size: usize, model_max_length: usize) -> Value {
    let ids = StructureIds::of(vocab_size);
    let decoder: Map<String, Value> = ids
        .tokens()
        .map(|(content, id, special)| {
            let entry = json!({
                "content": content, "lstrip": false, "normalized": false, "rstrip": false,
                "single_word": false, "special": special
            });
            (id.to_string(), entry)
        })
        .collect();
    let additional: Vec<&str> = STRUCTURE_TOKENS[1..FIRST_NOT_SPECIAL].to_vec();
    json!({
        "add_bos_token": false,
        "add_prefix_space": false,
        "added_tokens_decoder": decoder,
        "additional_special_tokens": additional,
        "bos_token": null,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": false,
        "eos_token": MESSAGE_END,
        "errors": "replace",
        "model_max_length": model_max_length,
        "pad_token": END_OF_TEXT,
        "split_special_tokens": false,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": null
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::synth::CORPUS;
    use minijinja::context;
    use proptest::prelude::*;
    use std::collections::BTreeSet;
    use std::str::FromStr;
    use std::sync::LazyLock;
    use tokenizers::{NormalizedString, Normalizer};

    const QWEN_VOCABULARY: usize = 151_936;

    static JSON: LazyLock<String> =
        LazyLock::new(|| train(&texts(CORPUS).unwrap(), QWEN_VOCABULARY).unwrap());
    static TOKENIZER: LazyLock<Tokenizer> = LazyLock::new(|| Tokenizer::from_str(&JSON).unwrap());

    fn ids_of(text: &str) -> Vec<u32> {
        TOKENIZER.encode(text, false).unwrap().get_ids().to_vec()
    }

    fn normalized(text: &str) -> String {
        let mut text = NormalizedString::from(text);
        NFC.normalize(&mut text).unwrap();
        text.get().to_owned()
    }

    #[test]
    fn structure_tokens_have_qwens_ids() {
        let known = [
            ("<|endoftext|>", 151_643),
            ("<|im_start|>", 151_644),
            ("<|im_end|>", 151_645),
            ("<|video_pad|>", 151_656),
            ("<tool_call>", 151_657),
            ("</tool_call>", 151_658),
            ("<|fim_prefix|>", 151_659),
            ("<|file_sep|>", 151_664),
        ];
        for (token, id) in known {
            assert_eq!(TOKENIZER.token_to_id(token), Some(id), "{token}");
            assert_eq!(TOKENIZER.id_to_token(id).as_deref(), Some(token));
            assert_eq!(ids_of(token), [id], "{token}");
        }
    }

    #[test]
    fn only_special_tokens_are_skipped_in_decoding() {
        let text = "<|im_start|>a<tool_call>b</tool_call><|fim_prefix|><|im_end|>";
        let decoded = TOKENIZER.decode(&ids_of(text), true).unwrap();
        assert_eq!(decoded, "a<tool_call>b</tool_call><|fim_prefix|>");
    }

    #[test]
    fn ids_that_stand_for_nothing_decode_to_nothing() {
        let [first, second] = [ids_of("a")[0], ids_of("b")[0]];
        assert_eq!(TOKENIZER.decode(&[first, 100_000, second], false).unwrap(), "ab");
    }

    #[test]
    fn the_same_text_gives_the_same_file() {
        assert_eq!(train(&texts(CORPUS).unwrap(), QWEN_VOCABULARY).unwrap(), *JSON);
    }

    /// Were a token made by two different merges, the crate's trainer could meet them in either order.
    #[test]
    fn every_merge_makes_a_token_of_its_own() {
        let parsed: Value = serde_json::from_str(&JSON).unwrap();
        let merges = parsed["model"]["merges"].as_array().unwrap();
        let joined = |m: &Value| format!("{}{}", m[0].as_str().unwrap(), m[1].as_str().unwrap());
        let made: BTreeSet<String> = merges.iter().map(joined).collect();
        assert_eq!(made.len(), merges.len());
        assert!(merges.len() > 1000, "{}", merges.len());
    }

    #[test]
    fn the_training_text_survives_and_gets_shorter() {
        let (mut bytes, mut tokens) = (0, 0);
        for text in texts(CORPUS).unwrap() {
            let ids = ids_of(&text);
            assert_eq!(TOKENIZER.decode(&ids, false).unwrap(), normalized(&text));
            bytes += text.len();
            tokens += ids.len();
        }
        assert!(bytes > 2 * tokens, "{bytes} bytes in {tokens} tokens");
    }

    proptest! {
        #[test]
        fn any_text_survives(text in any::<String>()) {
            let decoded = TOKENIZER.decode(&ids_of(&text), false).unwrap();
            prop_assert_eq!(decoded, normalized(&text));
        }
    }

    #[test]
    fn a_small_vocabulary_has_the_structure_tokens_at_its_end() {
        for vocab_size in [SMALLEST_VOCABULARY, 512, 20_000] {
            let json = train(&texts(CORPUS).unwrap(), vocab_size).unwrap();
            let tokenizer = Tokenizer::from_str(&json).unwrap();
            assert_eq!(tokenizer.token_to_id("<|file_sep|>"), Some(vocab_size as u32 - 1));
            let message_end = StructureIds::of(vocab_size).message_end() as u32;
            assert_eq!(tokenizer.token_to_id("<|im_end|>"), Some(message_end));
            let ids = tokenizer.encode("fn main() {}<|im_end|>", false).unwrap().get_ids().to_vec();
            assert_eq!(tokenizer.decode(&ids, false).unwrap(), "fn main() {}<|im_end|>");
            assert!(ids.iter().all(|id| (*id as usize) < vocab_size));
        }
    }

    #[test]
    fn the_configuration_names_the_same_ids() {
        let config = tokenizer_config(QWEN_VOCABULARY, 32_768);
        let decoder = config["added_tokens_decoder"].as_object().unwrap();
        assert_eq!(decoder.len(), STRUCTURE_TOKENS.len());
        for (id, entry) in decoder {
            let content = entry["content"].as_str().unwrap();
            assert_eq!(TOKENIZER.token_to_id(content), Some(id.parse().unwrap()));
        }
        assert_eq!(decoder["151656"]["special"], true);
        assert_eq!(decoder["151657"]["special"], false);
    }

    #[test]
    fn the_template_is_chatml() {
        let message = |role, content| context! { role => role, content => content };
        let messages = vec![message("user", "Hi"), message("assistant", "Ho")];
        let render = |generate: bool| {
            let values = context! { messages => messages.clone(), add_generation_prompt => generate };
            minijinja::Environment::new().render_str(CHAT_TEMPLATE, values).unwrap()
        };
        let dialogue = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n";
        assert_eq!(render(false), dialogue);
        assert_eq!(render(true), format!("{dialogue}<|im_start|>assistant\n"));
    }

    #[test]
    fn a_bad_line_of_training_text_is_named() {
        let good = r#"{"messages":[{"role":"user","content":"a"}]}"#;
        assert_eq!(texts(&format!("{good}\n\n{good}\n")).unwrap().len(), 4);
        let error = texts(&format!("{good}\n{{\"messages\": 3}}")).unwrap_err().to_string();
        assert!(error.contains("line 2"), "{error}");
    }
}

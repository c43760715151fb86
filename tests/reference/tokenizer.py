"""A small tokenizer of Qwen2.5's kind, and what transformers makes of some texts with it."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

# Qwen2.5's pieces: contractions, words, single digits, punctuation, line breaks and spaces.
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCABULARY = 600

# What merges are learned from.
CORPUS = (
    "def add(a, b):\n    return a + b\n\nfor i in range(10):\n    print(add(i, i + 1))\n",
    "The function returns the sum of its arguments. It doesn't check their types, and you'll see why.\n",
    "fn main() {\n    let total: u32 = (1..=10).sum();\n    println!(\"{total}\");\n}\n",
    "while the list is not empty, take the first and the second of its elements and add them\n",
)

# Each for something that a reader of tokenizer.json can get wrong.
TEXTS = (
    "",
    "def add(a, b):\n    return a + b\n",
    "It's, they'LL and we'Ve",
    "12345 and 3.14159",
    "  leading, trailing  \n\n\n  lines \t\r\n",
    "<|im_start|>user\nWrite a loop.<|im_end|>\n<|im_start|>assistant\n",
    "naïve café, composed and decomposed: cafe\u0301",
    "日本語 и русский, مرحبا",
    "🦀🚀 emoji with a joiner: 👩\u200d🔬",
    "x" * 70,
    "\x00\x01 control",
    "<|im_start|><|endoftext|>not a token: <|im_start |>",
)


def build() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(fuse_unk=False, byte_fallback=False))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIAL])
    return tokenizer


def make(folder: Path) -> None:
    folder.mkdir(parents=True)
    build().save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    cases = [{"text": text, "ids": tokenizer(text, add_special_tokens=False)["input_ids"]} for text in TEXTS]
    (folder / "cases.json").write_text(json.dumps(cases, indent=1) + "\n")

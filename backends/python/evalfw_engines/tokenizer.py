"""The checkpoint's own tokenizer, by transformers."""

from __future__ import annotations

from pathlib import Path

from .errors import Input, Unsupported


class Tokenizer:
    """Read at the first text: a run that only trains needs none."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tokenizer = None

    def ids(self, text: str) -> list[int]:
        """The ids of a text, without special tokens."""
        if self._tokenizer is None:
            self._tokenizer = self._read()
        return [int(token) for token in self._tokenizer.encode(text, add_special_tokens=False)]

    def _read(self):
        try:
            from transformers import AutoTokenizer
        except ImportError as error:
            raise Unsupported(f"tokenizing a text without transformers: {error}") from error
        files = ("tokenizer.json", "vocab.json", "tokenizer.model")
        if not any((self.folder / name).exists() for name in files):
            raise Input.file(self.folder, f"has no tokenizer: none of {', '.join(files)}")
        try:
            return AutoTokenizer.from_pretrained(str(self.folder), local_files_only=True)
        except (OSError, ValueError) as error:
            raise Input.file(self.folder, f"its tokenizer cannot be read: {error}") from error

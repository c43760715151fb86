"""How much arithmetic and how many bytes the work is, from the model's shapes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from settings import Settings

# NF4 with blocks of 64: 4 bits, a byte of scale for each block, an f32 for each 256 of those.
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)


@dataclass(frozen=True)
class Shapes:
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int

    @classmethod
    def read(cls, checkpoint: Path) -> Shapes:
        config = json.loads((checkpoint / "config.json").read_text())
        heads = config["num_attention_heads"]
        return cls(
            hidden=config["hidden_size"],
            intermediate=config["intermediate_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config["num_key_value_heads"],
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            vocab=config["vocab_size"],
        )

    def projections(self) -> list[tuple[int, int]]:
        """(inputs, outputs) of the seven projections of a layer."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return [
            (self.hidden, queries),
            (self.hidden, keys),
            (self.hidden, keys),
            (queries, self.hidden),
            (self.hidden, self.intermediate),
            (self.hidden, self.intermediate),
            (self.intermediate, self.hidden),
        ]

    def step_flops(self, settings: Settings, recompute: bool) -> float:
        """Of one training step, with or without the second forward pass of checkpointing.

        The base is frozen: backward is one product per weight, not two. The head works on positions
        with a loss only. Causal attention is half of the square."""
        tokens = settings.sequence
        base = sum(2 * tokens * i * o for i, o in self.projections())
        lora = sum(2 * tokens * settings.lora_r * (i + o) for i, o in self.projections())
        attention = 2 * tokens**2 * self.heads * self.head_dim
        head = 2 * settings.trained_tokens * self.hidden * self.vocab
        forward = self.layers * (base + lora + attention)
        backward = self.layers * (base + 2 * lora + 2 * attention)
        return (2 if recompute else 1) * forward + backward + 2 * head

    def nf4_weight_bytes(self) -> int:
        """The projections in NF4 and a 16-bit head, as they are stored."""
        projections = self.layers * sum(i * o for i, o in self.projections())
        return round(NF4_BYTES * projections) + 2 * self.hidden * self.vocab

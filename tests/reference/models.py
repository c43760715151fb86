"""Tiny random Qwen2 models, written by transformers itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM


class Unsuitable(Exception):
    """This seed makes a model that would test too little: another one has to be chosen."""


@dataclass(frozen=True)
class ModelSpec:
    name: str
    seed: int
    dtype: torch.dtype
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    tied: bool
    rope_theta: float
    lora_r: int
    max_shard_size: str = "5GB"
    lora_alpha: int = 16
    rms_norm_eps: float = 1e-6
    head_dim: int | None = None

    def config(self) -> Qwen2Config:
        # Absent, as in the checkpoints of Qwen, it is hidden_size / heads.
        head_dim = {} if self.head_dim is None else {"head_dim": self.head_dim}
        return Qwen2Config(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=128,
            tie_word_embeddings=self.tied,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
            rms_norm_eps=self.rms_norm_eps,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
            dtype=self.dtype,
            **head_dim,
        )

    def rng(self, purpose: str) -> np.random.Generator:
        """A stream of its own for each purpose, so that one more draw in one changes no other."""
        return np.random.default_rng([self.seed, *purpose.encode()])


SPECS = (
    ModelSpec("tied-4q2kv", 7, torch.float32, 97, 32, 80, 2, 4, 2, True, 10_000.0, 4),
    ModelSpec("untied-6q3kv", 1, torch.bfloat16, 131, 48, 112, 2, 6, 3, False, 250_000.0, 8),
    ModelSpec("sharded-4q1kv", 2, torch.bfloat16, 89, 64, 48, 3, 4, 1, False, 1_000_000.0, 4, "50KB"),
    ModelSpec("odd-2q2kv", 12, torch.float16, 113, 40, 100, 2, 2, 2, True, 10_000.0, 4),
)


def random_spec(seed: int, number: int, attempt: int) -> ModelSpec:
    """A model of a shape that is not in `SPECS`. A few attempts differ in the weights only."""
    rng = np.random.default_rng([seed, number, attempt // 6])

    def choose(*options):
        return options[int(rng.integers(len(options)))]

    heads = int(rng.integers(1, 9))
    kv_heads = choose(*(n for n in range(1, heads + 1) if heads % n == 0))
    head_dim = 2 * int(rng.integers(3, 13))
    hidden = heads * head_dim
    # Heads need not be as wide together as the hidden state.
    own_head_dim = hidden % 64 == 0 or hidden < 24 or rng.random() < 0.25
    if own_head_dim:
        hidden = choose(26, 40, 52, 66, 90, 100)
    layers = int(rng.integers(1, 5))
    tied = bool(rng.integers(2))
    dtype = choose(torch.float32, torch.bfloat16, torch.float16)
    lora_r = int(rng.integers(1, 10))
    return ModelSpec(
        name=f"{number}-{heads}q{kv_heads}kv-{hidden}-{layers}l-{'tied' if tied else 'untied'}",
        seed=int(np.random.default_rng([seed, number, attempt]).integers(2**31)),
        dtype=dtype,
        vocab_size=int(rng.integers(60, 400)),
        hidden_size=hidden,
        intermediate_size=int(rng.integers(30, 200)),
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        tied=tied,
        rope_theta=float(choose(5_000, 10_000, 77_777, 500_000, 1_000_000, 5_000_000)),
        lora_r=lora_r,
        max_shard_size=choose("5GB", "40KB"),
        lora_alpha=choose(lora_r, 2 * lora_r, 3 * lora_r + 1),
        rms_norm_eps=choose(1e-6, 1e-5, 1e-3),
        head_dim=head_dim if own_head_dim else None,
    )


def build(spec: ModelSpec) -> Qwen2ForCausalLM:
    """A model in which every part matters: biases and norm weights are random, attention is far from
    uniform, some weights are outliers and one quantisation block is all zeros."""
    model = Qwen2ForCausalLM(spec.config()).to(spec.dtype)
    rng = spec.rng("weights")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = _values(name, tuple(parameter.shape), spec, rng)
            parameter.copy_(torch.from_numpy(values))
        layer = model.model.layers[0]
        layer.mlp.gate_proj.weight.view(-1)[64:128] = 0.0
    return model.eval()


def _values(
    name: str, shape: tuple[int, ...], spec: ModelSpec, rng: np.random.Generator
) -> np.ndarray:
    values = rng.standard_normal(shape)
    if "norm" in name:
        values = 1.0 + 0.2 * values
    elif name.endswith("bias"):
        values = 0.3 * values
    elif "embed_tokens" in name:
        # As a head it must not drown what the layers say, or decoding repeats one token.
        gain = 0.25 * min(1.0, np.sqrt(40 / spec.hidden_size)) if spec.tied else 0.6
        values = gain * values
    else:
        gain = 1.4 if "self_attn" in name else 1.0
        values = gain * values / np.sqrt(shape[1])
        outliers = rng.choice(values.size, size=3, replace=False)
        values.reshape(-1)[outliers] *= 6.0
    return values.astype(np.float32)


def save(model: Qwen2ForCausalLM, spec: ModelSpec, folder: Path) -> None:
    model.save_pretrained(folder, max_shard_size=spec.max_shard_size)


def load(folder: Path) -> Qwen2ForCausalLM:
    """The stored weights, widened to f32: the reference computes in f32 whatever the storage type."""
    model = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model.name_or_path = folder.parent.name
    return model.eval()

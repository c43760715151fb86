"""Logits, greedy decoding and evaluation losses."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from data import Batch
from models import Unsuitable

NEW_TOKENS = 12
# No f32 noise can turn a choice of token with this distance to the next best.
SMALLEST_GAP = 5e-3
# One token over and over would hide a wrong position or a wrong key in the cache.
FEWEST_DIFFERENT = 4


@dataclass(frozen=True)
class Continuation:
    tokens: list[int]
    # Of each token: from the best logit to the next best.
    gaps: list[float]


@torch.no_grad()
def logits(model: torch.nn.Module, tokens: list[int]) -> torch.Tensor:
    """`[tokens, vocab_size]`"""
    return model(input_ids=torch.tensor([tokens])).logits[0].contiguous()


@torch.no_grad()
def greedy(model: torch.nn.Module, prompt: list[int]) -> Continuation:
    """Continues `prompt` through the KV cache, and checks each token against a forward pass without."""
    tokens: list[int] = []
    gaps: list[float] = []
    cache = None
    pending = prompt
    for _ in range(NEW_TOKENS):
        output = model(input_ids=torch.tensor([pending]), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        token, gap = _best(output.logits[0, -1])
        without_cache, _ = _best(logits(model, prompt + tokens)[-1])
        assert token == without_cache, "the KV cache changed a token"
        tokens.append(token)
        gaps.append(gap)
        pending = [token]
    if min(gaps) < SMALLEST_GAP:
        raise Unsuitable(f"a gap of {min(gaps)} between the two best logits")
    if len(set(tokens)) < FEWEST_DIFFERENT:
        raise Unsuitable(f"the continuation has only {len(set(tokens))} different tokens")
    return Continuation(tokens, gaps)


def _best(row: torch.Tensor) -> tuple[int, float]:
    top = torch.topk(row, 2)
    return int(top.indices[0]), float(top.values[0] - top.values[1])


@torch.no_grad()
def evaluation_losses(model: torch.nn.Module, batches: list[Batch]) -> list[float]:
    """The mean over the supervised positions of each batch, in nats."""
    model.eval()
    return [float(model(**batch.inputs()).loss) for batch in batches]

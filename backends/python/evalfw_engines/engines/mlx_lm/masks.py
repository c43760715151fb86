"""Gradient checkpointing that keeps its dropout masks.

`mlx_lm.tuner.trainer.grad_checkpoint` computes a block again with new masks, drawn from MLX's global state, so that the
gradients are those of neither pass. Here a block takes one key from that state, hands it to both passes, and its dropouts
draw from it in the order in which they come.
"""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx
import mlx.nn as nn

# More than a block has adapters.
KEYS = 16


class Keys:
    """The keys of the block that is being computed."""

    def __init__(self) -> None:
        self.left: Iterator[mx.array] = iter(())

    def begin(self, key: mx.array) -> None:
        self.left = iter(mx.random.split(key, KEYS))


class KeyedDropout(nn.Module):
    """`mlx.nn.Dropout` with keys."""

    def __init__(self, rate: float, keys: Keys) -> None:
        super().__init__()
        self._kept = 1 - rate
        # No part of the model's state.
        self._keys = keys

    def __call__(self, x: mx.array) -> mx.array:
        if not self.training:
            return x
        mask = mx.random.bernoulli(self._kept, x.shape, key=next(self._keys.left))
        return (1 / self._kept) * mask * x


def install(model: nn.Module, block: type[nn.Module], *, checkpointing: bool) -> None:
    """Every block of this class, whose adapters drop, with the same masks whether its gradients are checkpointed or not."""
    keys = Keys()
    for layer in model.layers:
        for _, module in layer.named_modules():
            dropout = getattr(module, "dropout", None)
            if isinstance(dropout, nn.Dropout):
                module.dropout = KeyedDropout(1 - dropout._p_1, keys)
    call = block.__call__

    def keyed(layer: nn.Module, *args, **kwargs):
        def inner(parameters, key, *args, **kwargs):
            layer.update(parameters)
            # A mask has no gradient.
            keys.begin(mx.stop_gradient(key))
            return call(layer, *args, **kwargs)

        key = mx.random.randint(0, 1 << 30, (2,)).astype(mx.uint32)
        compute = mx.checkpoint(inner) if checkpointing else inner
        return compute(layer.trainable_parameters(), key, *args, **kwargs)

    block.__call__ = keyed

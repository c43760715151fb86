"""Adapters and training steps, by mlx-lm's own tuner.

A step is the one of `mlx_lm.tuner.trainer.train`: compiled, the gradients of micro-batches added up, the state
evaluated after each, the allocator's cache given back. In it, where the harness asks for something else than mlx-lm's
defaults:

- the loss is divided by the supervised positions of all micro-batches together, not batch by batch;
- with dropout, a block that is computed again drops what it dropped before (`masks`);
- positions without a label are left out wherever they stand, not only before and after an answer;
- AdamW corrects its bias, as PyTorch's always does, and gradients are clipped by `mlx.optimizers` where that is asked
  for. Their norm is always computed, for it is reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_reduce
from mlx_lm.tuner.trainer import TrainingArgs, grad_checkpoint
from mlx_lm.tuner.utils import linear_to_lora_layers, remove_lora_layers

from ...batches import trained_tokens
from ...checkpoint import PROJECTIONS, module_path
from ...engine import Tensors
from ...lora import tensor_name
from . import masks

if TYPE_CHECKING:
    from ...batches import Batch
    from ...lora import Adapter
    from ...training import TrainingConfig

CLEAR_CACHE_THRESHOLD = TrainingArgs().clear_cache_threshold
# PEFT's factors and MLX's, which are their transposes.
FACTORS = {"A": "lora_a", "B": "lora_b"}
# An odd number with no pattern in its bits, so that neighbouring seeds and steps do not share masks.
SEED_MULTIPLIER = 0x9E37_79B9_7F4A_7C15


class Tuner:
    def __init__(self, model: nn.Module) -> None:
        self.model = model
        # `grad_checkpoint` replaces this in the class, for good.
        block = type(model.layers[0])
        self.block, self.block_call = block, block.__call__

    def attach(self, adapter: Adapter, training: TrainingConfig) -> None:
        """Wraps the projections anew, loads the given initialisation and compiles a step."""
        model, config = self.model, adapter.config
        self.block.__call__ = self.block_call
        remove_lora_layers(model)
        model.freeze()
        keys = {module_path(projection) for projection in PROJECTIONS}
        lora = {"rank": config.r, "scale": config.scale, "dropout": config.lora_dropout, "keys": keys}
        linear_to_lora_layers(model, len(model.layers), lora)
        given = adapter.tensors()
        weights = [(mlx_name, mx.array(given[name].T)) for name, mlx_name in self._names()]
        model.load_weights(weights, strict=False)
        mx.eval(model.trainable_parameters())
        # The layers are new, and know no mode yet.
        model.train()
        if config.lora_dropout > 0:
            masks.install(model, self.block, checkpointing=training.gradient_checkpointing)
        elif training.gradient_checkpointing:
            grad_checkpoint(model.layers[0])
        self.optimizer = optim.AdamW(
            learning_rate=training.learning_rate,
            betas=[training.beta1, training.beta2],
            eps=training.epsilon,
            weight_decay=training.weight_decay,
            bias_correction=True,
        )
        self.state = [model.state, self.optimizer.state, mx.random.state]
        self.step = self._compiled(training.max_grad_norm)

    def train_step(self, step: int, dropout_seed: int, micro_batches: Sequence[Batch]) -> tuple[float, float]:
        loss, norm, _ = self._run(step, dropout_seed, micro_batches, update=True)
        return loss, norm

    def gradients(
        self, step: int, dropout_seed: int, micro_batches: Sequence[Batch]
    ) -> tuple[float, float, Tensors]:
        loss, norm, found = self._run(step, dropout_seed, micro_batches, update=False)
        by_name = dict(tree_flatten(found))
        return loss, norm, {name: np.array(by_name[mlx_name].T) for name, mlx_name in self._names()}

    def adapter(self) -> Tensors:
        values = dict(tree_flatten(self.model.trainable_parameters()))
        return {name: np.array(values[mlx_name].T) for name, mlx_name in self._names()}

    def _names(self) -> list[tuple[str, str]]:
        """PEFT's name of each tensor and MLX's."""
        return [
            (tensor_name(layer, projection, factor), f"model.layers.{layer}.{module_path(projection)}.{mlx_factor}")
            for layer in range(len(self.model.layers))
            for projection in PROJECTIONS
            for factor, mlx_factor in FACTORS.items()
        ]

    def _compiled(self, max_grad_norm: float | None):
        model, optimizer = self.model, self.optimizer
        loss_and_grad = nn.value_and_grad(model, _loss)

        @partial(mx.compile, inputs=self.state, outputs=self.state)
        def step(ids, targets, items, previous, is_last, update):
            loss, grad = loss_and_grad(model, ids, targets, items)
            if previous is not None:
                grad = tree_map(mx.add, grad, previous)
            if not is_last:
                return loss, None, grad
            if max_grad_norm is None or not update:
                norm = tree_reduce(lambda total, g: total + g.square().sum(), grad, mx.array(0.0)).sqrt()
            else:
                grad, norm = optim.clip_grad_norm(grad, max_grad_norm)
            if update:
                optimizer.update(model, grad)
                grad = None
            return loss, norm, grad

        return step

    def _run(self, number: int, dropout_seed: int, micro_batches: Sequence[Batch], *, update: bool):
        if not self.model.training:
            self.model.train()
        mx.random.seed((dropout_seed * SEED_MULTIPLIER + number) % 2**64)
        items = mx.array(trained_tokens(micro_batches), mx.float32)
        total, norm, grad = mx.array(0.0), None, None
        for index, batch in enumerate(micro_batches, start=1):
            is_last = index == len(micro_batches)
            loss, norm, grad = self.step(*_inputs(batch), items, grad, is_last, update)
            total += loss
            mx.eval(self.state, total, norm, grad)
            if mx.get_cache_memory() > CLEAR_CACHE_THRESHOLD:
                mx.clear_cache()
        return total.item(), norm.item(), grad


def loss_sum(model: nn.Module, batch: Batch) -> mx.array:
    ids, targets = _inputs(batch)
    return _loss(model, ids, targets, 1)


def _loss(model: nn.Module, ids: mx.array, targets: mx.array, items: mx.array | int) -> mx.array:
    """`mlx_lm.tuner.trainer.default_loss` over the supervised positions, divided by `items`."""
    logits = model(ids)
    mask = targets >= 0
    cross_entropy = nn.losses.cross_entropy(logits, mx.maximum(targets, 0)) * mask
    return cross_entropy.astype(mx.float32).sum() / items


def _inputs(batch: Batch) -> tuple[mx.array, mx.array]:
    """All slots, and what to predict at each; nothing comes after the last one. A causal mask hides the padding, which
    stands on the right. mlx-lm itself pads to one slot more than a multiple of 32 and leaves the last one out, so that
    as many are computed."""
    ids = np.array(batch.input_ids, np.int32)
    targets = np.full_like(ids, -1)
    targets[:, :-1] = np.array(batch.labels, np.int32)[:, 1:]
    return mx.array(ids), mx.array(targets)

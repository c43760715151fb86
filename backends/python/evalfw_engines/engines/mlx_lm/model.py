"""A loaded model: inference, evaluation and the weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.tuner.lora import LoRALinear

from ...checkpoint import PROJECTIONS, module_path
from ...engine import Model, Tensors
from ...errors import Protocol
from .tuner import Tuner, loss_sum

if TYPE_CHECKING:
    from ...batches import Batch
    from ...lora import Adapter
    from ...training import TrainingConfig

# Tokens of a prompt that go through the model at once, as in `mlx_lm.generate`.
PREFILL_STEP_SIZE = 2048


class MlxModel(Model):
    def __init__(self, model: nn.Module, *, on_gpu: bool) -> None:
        self.model = model
        self.on_gpu = on_gpu
        self.tuner = Tuner(model)
        self.cache: list | None = None

    def attach_adapter(self, adapter: Adapter, training: TrainingConfig) -> None:
        self.cache = None
        self.tuner.attach(adapter, training)

    def train_step(self, step: int, dropout_seed: int, micro_batches: Sequence[Batch]) -> tuple[float, float]:
        return self.tuner.train_step(step, dropout_seed, micro_batches)

    def gradients(
        self, step: int, dropout_seed: int, micro_batches: Sequence[Batch]
    ) -> tuple[float, float, Tensors]:
        return self.tuner.gradients(step, dropout_seed, micro_batches)

    def evaluate(self, batches: Sequence[Batch]) -> tuple[float, int]:
        evaluating(self.model)
        total, tokens = 0.0, 0
        for batch in batches:
            # Waits for each, as mlx-lm's evaluation does: the logits of one batch at a time.
            total += loss_sum(self.model, batch).item()
            tokens += batch.trained_tokens()
        return total, tokens

    def prefill(self, tokens: Sequence[int]) -> int:
        """As `mlx_lm.generate.generate_step`: only the last token's logits are computed, for MLX is lazy."""
        evaluating(self.model)
        self.cache = make_prompt_cache(self.model)
        *before, last = tokens
        for start in range(0, len(before), PREFILL_STEP_SIZE):
            self.model(mx.array([before[start : start + PREFILL_STEP_SIZE]]), cache=self.cache)
            mx.eval([layer.state for layer in self.cache])
            mx.clear_cache()
        return self.decode(last)

    def decode(self, token: int) -> int:
        if self.cache is None:
            raise Protocol("decode continues a prefill, and an adapter was attached since")
        evaluating(self.model)
        logits = self.model(mx.array([[token]]), cache=self.cache)[0, -1]
        return mx.argmax(logits).item()

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        evaluating(self.model)
        return np.array(self.model(mx.array([list(tokens)]))[0].astype(mx.float32))

    def decoded_weights(self) -> Tensors:
        weights = {}
        for number, layer in enumerate(self.model.layers):
            modules = dict(layer.named_modules())
            for projection in PROJECTIONS:
                path = module_path(projection)
                values = _decoded(modules[path]).astype(mx.float32)
                weights[f"model.layers.{number}.{path}.weight"] = np.array(values)
        return weights

    def adapter(self) -> Tensors:
        return self.tuner.adapter()

    def synchronize(self) -> None:
        mx.synchronize()

    def memory(self) -> dict[str, int | None]:
        if not self.on_gpu:
            return super().memory()
        active = mx.get_active_memory()
        return {
            "in_use_bytes": active,
            "reserved_bytes": active + mx.get_cache_memory(),
            "peak_bytes": mx.get_peak_memory(),
        }


def evaluating(model: nn.Module) -> None:
    """A walk over all modules, so only where the mode changes."""
    if model.training:
        model.eval()


def _decoded(module: nn.Module) -> mx.array:
    if isinstance(module, LoRALinear):
        module = module.linear
    if not isinstance(module, nn.QuantizedLinear):
        return module.weight
    return mx.dequantize(
        module.weight, module.scales, module.biases, module.group_size, module.bits, mode=module.mode
    )

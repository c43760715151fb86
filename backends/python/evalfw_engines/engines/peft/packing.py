"""Where the 4-bit weights of a CPU are kept in which order.

On a CPU with instructions for bf16, bitsandbytes reorders a weight for inference at the first forward pass outside of
training, and rounds its scales to bf16. No gradient goes through a reordered weight, not every shape can be reordered,
and its way back quantizes the rounded scales once more. So weights are reordered for generation only, where that can be
done, and come back with their own scales before anything is trained or evaluated.
"""

from __future__ import annotations

import copy

import torch
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit

# Rows that are reordered together.
ROWS = 32


class Packing:
    def __init__(self, model: torch.nn.Module, dtype: torch.dtype, device: str) -> None:
        self.layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
        self.happens = bool(self.layers) and device == "cpu" and bool(functional.has_avx512bf16())
        shapes = [(layer.out_features, layer.in_features, layer.weight.quant_state) for layer in self.layers]
        fits = all(rows % ROWS == 0 and columns % state.blocksize == 0 for rows, columns, state in shapes)
        # A reordered weight is multiplied in bf16 whatever was asked for.
        self.allowed = self.happens and fits and dtype == torch.bfloat16
        # What the scales were, by layer, while the weights are reordered.
        self.scales: list[functional.QuantState] | None = None

    def for_generation(self) -> None:
        """After the model was put into evaluation mode."""
        if self.allowed:
            # The reordering gives the state other tensors and leaves these as they are.
            self.scales = self.scales or [copy.copy(layer.weight.quant_state) for layer in self.layers]
        else:
            self.keep()

    def keep(self) -> None:
        """After the model was put into either mode: the weights stay as they were loaded, or become so again."""
        if not self.happens:
            return
        for layer in self.layers:
            # No layer in training mode is reordered, and nothing else in it depends on the mode.
            layer.training = True
        for layer, scales in zip(self.layers, self.scales or ()):
            weight = layer.weight
            if getattr(weight.quant_state, "packing_format_for_cpu", False):
                weight.data, _ = functional._convert_weight_packed_for_cpu_inverse(weight.data, weight.quant_state)
            weight.quant_state = layer.quant_state = scales
        self.scales = None

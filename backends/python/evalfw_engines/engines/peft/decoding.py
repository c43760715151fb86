"""NF4 on a CPU for matrices whose rows are no whole blocks.

The blocks go on from row to row. bitsandbytes 0.50 decodes such a matrix wrongly on CPUs with AVX-512, and rightly on
those without. No Qwen2.5 has rows like that, but small models do. So one of each row length is decoded in both ways, and
where the two differ torch decodes in place of bitsandbytes, for as long as the process runs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from math import prod

import torch
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit

# Keeps what was registered.
_library: torch.library.Library | None = None


def check(model: torch.nn.Module) -> None:
    """Looks at the first matrix of each row length."""
    looked_at = set()
    for layer in model.modules():
        if not isinstance(layer, Linear4bit) or layer.in_features in looked_at:
            continue
        looked_at.add(layer.in_features)
        if layer.in_features % layer.weight.quant_state.blocksize and not decodes_right(layer):
            message = f"bitsandbytes decodes rows of {layer.in_features} wrongly on this CPU: torch decodes them"
            print(message, file=sys.stderr)
            replace()
            return


def decodes_right(layer: Linear4bit) -> bool:
    state = layer.weight.quant_state
    absmax = state.absmax
    if state.nested:
        absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
    packed = layer.weight.data
    arguments = (packed, absmax.float(), state.blocksize, state.quant_type, list(state.shape), torch.float32)
    return torch.equal(torch.ops.bitsandbytes.dequantize_4bit(*arguments), decode(*arguments))


def decode(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    """Two values a byte, the first one in its upper half."""
    values = functional.get_4bit_type(quant_type, device=packed.device)
    packed = packed.reshape(-1).view(torch.uint8)
    codes = torch.stack((packed >> 4, packed & 15), dim=1).reshape(-1)[: prod(shape)]
    scales = absmax.repeat_interleave(blocksize)[: prod(shape)]
    return (values[codes.long()] * scales).to(dtype).reshape(tuple(shape))


def replace() -> None:
    global _library
    if _library is None:
        _library = torch.library.Library("bitsandbytes", "IMPL")
        _library.impl("dequantize_4bit", decode, "CPU", allow_override=True)

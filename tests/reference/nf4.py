"""NF4 with double quantisation, by bitsandbytes on the CPU."""

from __future__ import annotations

import copy

import bitsandbytes.functional as bnb
import numpy as np
import torch
from bitsandbytes.nn import Linear4bit
from transformers import Qwen2ForCausalLM

import nf4_rules
from adapters import PROJECTIONS

BLOCK = 64


def quantize(values: torch.Tensor) -> tuple[torch.Tensor, bnb.QuantState]:
    return bnb.quantize_4bit(values, blocksize=BLOCK, compress_statistics=True, quant_type="nf4")


def decode(codes: torch.Tensor, state: bnb.QuantState) -> torch.Tensor:
    """Decodes to f32, as one long row.

    bitsandbytes decodes into the type of the source; the state is told that the source was f32, so that
    a bf16 or f16 source is not rounded once more at the end. And its CPU kernel (0.50.2, with AVX-512)
    takes the scale of a wrong block where rows are a multiple of 16 but not of 64 long, other than its
    generic kernel; a single row it decodes rightly."""
    row = copy.copy(state)
    row.dtype = torch.float32
    row.shape = torch.Size([1, state.shape.numel()])
    return bnb.dequantize_4bit(codes.reshape(-1, 1), row).reshape(-1)[: row.shape[1]].reshape(state.shape)


def golden(values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Everything that bitsandbytes makes of a matrix, checked against the rules written out in numpy."""
    codes, state = quantize(values)
    tensors = {
        "source": values,
        "codes": codes.reshape(-1),
        "absmax_codes": state.absmax,
        "nested_absmax": state.state2.absmax,
        "offset": state.offset.reshape(1),
        "decoded": decode(codes, state).contiguous(),
    }
    assert state.state2.blocksize == nf4_rules.NESTED_BLOCK and state.blocksize == BLOCK
    ours = nf4_rules.quantize(values.float().numpy(), levels().numpy(), dynamic_map().numpy())
    for name, expected in ours.items():
        found = tensors[name].numpy()
        assert np.array_equal(found, expected), f"{name}: bitsandbytes does not follow the rules"
    return tensors


def levels() -> torch.Tensor:
    return bnb.get_4bit_type("nf4", device="cpu")


def dynamic_map() -> torch.Tensor:
    return bnb.create_dynamic_map()


def round_trip(model: Qwen2ForCausalLM) -> Qwen2ForCausalLM:
    """Replaces the weights of the seven projections by what bitsandbytes decodes of them in f32.

    `Linear4bit` itself is not used: on a CPU with AVX512-BF16 it leaves f32 for bf16 in evaluation.
    In training it computes just this, which is checked here for rows that it decodes rightly."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in PROJECTIONS:
            codes, state = quantize(module.weight.data)
            decoded = decode(codes, state)
            if decoded.shape[1] % BLOCK == 0:
                _check_linear4bit(module.weight.data, decoded)
            module.weight.data = decoded
    return model


def _check_linear4bit(weight: torch.Tensor, decoded: torch.Tensor) -> None:
    rows, columns = weight.shape
    layer = Linear4bit(columns, rows, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.weight.data = weight.clone()
    layer = layer.to("cpu").train()
    x = torch.linspace(-1, 1, 3 * columns).reshape(3, columns).requires_grad_()
    output = layer(x)
    assert layer.weight.dtype == torch.uint8, "Linear4bit has not quantized its weight"
    torch.testing.assert_close(output, x @ decoded.t(), rtol=1e-5, atol=1e-5)

"""evalfw's dropout masks, and PEFT with these masks in place of torch's random ones.

A mask is a function of who asks (`backends/engine/src/dropout.rs`), so that every engine and the
reference drop the same values. This is that function once more, in numpy.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from peft import PeftModel

from adapters import PROJECTIONS

u32, u64 = np.uint32, np.uint64


@dataclass(frozen=True)
class MaskKey:
    """The input of one adapter in one layer at one micro-batch of one step."""

    seed: int
    step: int
    micro_batch: int
    layer: int
    projection: str

    def mask(self, rate: float, size: int) -> np.ndarray:
        """0 where the value is dropped, `1 / (1 - rate)` where it is kept."""
        key = self._word()
        low, high = u32(key & 0xFFFF_FFFF), u32(key >> 32)
        elements = np.arange(size, dtype=u32) * u32(0x9E37_79B9)
        hashes = _mix32(_mix32(elements ^ low) ^ high)
        rate32 = np.float32(rate)
        threshold = u32(int(float(rate32) * 2**32))
        kept = np.float32(1) / (np.float32(1) - rate32)
        return np.where(hashes < threshold, np.float32(0), kept)

    def _word(self) -> int:
        place = self.micro_batch << 32 | self.layer << 8 | PROJECTIONS.index(self.projection)
        return _mix64(_mix64(_mix64(self.seed) ^ self.step) ^ place)


def _mix64(value: int) -> int:
    """The finalizer of SplitMix64, with its increment."""
    wrap = 2**64 - 1
    z = (value + 0x9E37_79B9_7F4A_7C15) & wrap
    z = ((z ^ z >> 30) * 0xBF58_476D_1CE4_E5B9) & wrap
    z = ((z ^ z >> 27) * 0x94D0_49BB_1331_11EB) & wrap
    return z ^ z >> 31


def _mix32(h: np.ndarray) -> np.ndarray:
    """The 32-bit finalizer of MurmurHash3."""
    h = (h ^ h >> u32(16)) * u32(0x85EB_CA6B)
    h = (h ^ h >> u32(13)) * u32(0xC2B2_AE35)
    return h ^ h >> u32(16)


class MaskedDropout(torch.nn.Module):
    """Stands where PEFT has `torch.nn.Dropout`: the same, but for where the mask comes from."""

    def __init__(self, key: MaskKey, rate: float) -> None:
        super().__init__()
        self.key = key
        self.rate = rate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        mask = self.key.mask(self.rate, x.numel())
        return x * torch.from_numpy(mask).reshape(x.shape)


def install(adapted: PeftModel, rate: float, seed: int) -> None:
    """Puts a masked dropout before each adapter."""
    _check_against_torch(rate)
    installed = 0
    for name, module in adapted.named_modules():
        projection = name.rpartition(".")[2]
        if projection in PROJECTIONS:
            layer = int(name.split(".layers.")[1].split(".")[0])
            key = MaskKey(seed, 0, 0, layer, projection)
            module.lora_dropout["default"] = MaskedDropout(key, rate).train(module.training)
            installed += 1
    assert installed == len(PROJECTIONS) * adapted.config.num_hidden_layers


def turn_to(adapted: PeftModel, step: int, micro_batch: int) -> None:
    """The next forward pass in training is this micro-batch of this step. Without installed masks
    nothing changes."""
    for module in adapted.modules():
        if isinstance(module, MaskedDropout):
            module.key = replace(module.key, step=step, micro_batch=micro_batch)


def _check_against_torch(rate: float) -> None:
    """The masks do what `torch.nn.Dropout` does to a tensor, but for the place of the zeros."""
    torch.manual_seed(0)
    dropout = torch.nn.Dropout(rate)
    size = 200_000
    ours = torch.from_numpy(MaskKey(7, 3, 1, 2, "up_proj").mask(rate, size))
    theirs = dropout(torch.ones(size))
    assert torch.equal(ours.unique(), theirs.unique()), "other values than 0 and torch's 1 / (1 - p)"
    # Five standard deviations of a binomial.
    allowed = 5 * (rate * (1 - rate) / size) ** 0.5
    for mask in (ours, theirs):
        assert abs(float((mask == 0).double().mean()) - rate) < allowed, "another rate"
        assert abs(float(mask.double().mean()) - 1) < allowed / (1 - rate), "the mean is not preserved"
    masked = MaskedDropout(MaskKey(7, 3, 1, 2, "up_proj"), rate)
    x = torch.linspace(-1, 1, size)
    assert torch.equal(masked.train()(x), x * ours)
    assert torch.equal(masked.eval()(x), dropout.eval()(x)), "evaluation drops something"

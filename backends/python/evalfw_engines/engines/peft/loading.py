"""The engine: what it says of itself, and how a checkpoint gets onto the device."""

from __future__ import annotations

from abc import abstractmethod

import bitsandbytes
import peft
import torch
import transformers
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from ...checkpoint import PROJECTIONS, Checkpoint
from ...engine import NF4, NONE, Engine, LoadTimes
from ...errors import Framework
from . import decoding, limits
from .device import Device
from .model import PeftModelOnDevice

# transformers' default where torch has it; asked for by name so that what is reported is what runs.
ATTENTION = "sdpa"


class TorchEngine(Engine):
    """What engines on torch, transformers and bitsandbytes have in common."""

    def __init__(self, name: str, version: str, device: Device) -> None:
        self.name, self.version, self.device = name, version, device
        transformers.utils.logging.disable_progress_bar()

    def info(self) -> dict[str, object]:
        return {
            "engine": self.name,
            "framework": self.name,
            "framework_version": self.version,
            "device": self.device.info(),
            "compute_dtype": self.device.compute,
            "features": self.features(),
            "quantizations": [NONE, NF4],
            "threads": torch.get_num_threads(),
            "own_dropout": True,
        }

    @abstractmethod
    def features(self) -> list[str]:
        """What changes speed: versions, and what was fallen back from."""

    def limits(self) -> dict[str, float | None]:
        if self.device.kind == "cpu":
            return super().limits()
        measured = limits.measure()
        # No model's memory.
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return measured


class PeftEngine(TorchEngine):
    def __init__(self, device: Device) -> None:
        super().__init__("peft", peft.__version__, device)

    def features(self) -> list[str]:
        features = [
            f"torch {torch.__version__}",
            f"transformers {transformers.__version__}",
            f"bitsandbytes {bitsandbytes.__version__}",
            f"attention {ATTENTION}",
        ]
        if self.device.kind == "cpu":
            features += cpu_kernels()
        return features

    def load(self, checkpoint: Checkpoint, quantization: str, times: LoadTimes) -> PeftModelOnDevice:
        # transformers reads, quantizes and moves one tensor after the other, and does not tell the parts apart.
        model = AutoModelForCausalLM.from_pretrained(
            str(checkpoint.folder),
            quantization_config=self.nf4() if quantization == NF4 else None,
            dtype=self.device.dtype,
            device_map={"": self.device.torch},
            attn_implementation=ATTENTION,
            local_files_only=True,
        )
        check_quantized(model, quantization)
        if self.device.kind == "cpu":
            decoding.check(model)
        return PeftModelOnDevice(model, self.device)

    def nf4(self) -> BitsAndBytesConfig:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=self.device.dtype,
            llm_int8_skip_modules=["lm_head"],
        )


def cpu_kernels() -> list[str]:
    """What bitsandbytes fell back from without a word."""
    kernels = []
    if isinstance(bitsandbytes.cextension.lib, bitsandbytes.cextension.ErrorHandlerMockBNBNativeLibrary):
        kernels.append("no bitsandbytes native library")
    elif bitsandbytes.functional.has_avx512bf16():
        # It asks a hub for this kernel when it is imported, and a hub is never asked here.
        found = getattr(bitsandbytes.backends.cpu.ops, "gemm_4bit_forward_kernel", None)
        kernels.append(f"{'a' if found else 'no'} bitsandbytes cpu kernel from the hub")
    return kernels


def check_quantized(model: PreTrainedModel, quantization: str) -> None:
    """The seven projections of every layer and nothing else, each with its data in place."""
    quantized = {
        name: module for name, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)
    }
    expected = len(PROJECTIONS) * model.config.num_hidden_layers if quantization == NF4 else 0
    empty = [name for name, module in quantized.items() if module.weight.quant_state is None]
    others = [name for name in quantized if name.rpartition(".")[2] not in PROJECTIONS]
    if len(quantized) != expected or empty or others:
        raise Framework(
            f"{len(quantized)} modules are quantized, expected {expected}; without data: {empty}, "
            f"none of the projections: {others}"
        )

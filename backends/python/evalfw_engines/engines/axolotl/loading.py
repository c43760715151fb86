"""The engine: what it says of itself, and how axolotl loads a checkpoint."""

from __future__ import annotations

import tempfile
from importlib import metadata
from pathlib import Path

import bitsandbytes
import peft
import torch
import transformers
from axolotl.loaders import ModelLoader
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from ...checkpoint import Checkpoint
from ...engine import LoadTimes
from ..peft import decoding
from ..peft.device import Device
from ..peft.loading import TorchEngine, check_quantized, cpu_kernels
from .config import Configuration
from .model import AxolotlModel


def open_device() -> Device:
    """As `peft` opens it, but for the type on a CPU: axolotl refuses bf16 where there is no GPU."""
    device = Device.open()
    return device if device.kind == "cuda" else Device(device.kind, "f32")


class AxolotlEngine(TorchEngine):
    def __init__(self, device: Device) -> None:
        super().__init__("axolotl", metadata.version("axolotl"), device)
        # Removed when the process ends.
        self.scratch = tempfile.TemporaryDirectory(prefix="evalfw-axolotl-", ignore_cleanup_errors=True)

    def features(self) -> list[str]:
        features = [
            f"torch {torch.__version__}",
            f"transformers {transformers.__version__}",
            f"peft {peft.__version__}",
            f"bitsandbytes {bitsandbytes.__version__}",
            "attention sdpa",
        ]
        if self.device.kind == "cpu":
            features += ["no LoRA kernels of axolotl", *cpu_kernels()]
        return features

    def load(self, checkpoint: Checkpoint, quantization: str, times: LoadTimes) -> AxolotlModel:
        configuration = Configuration(checkpoint.folder, quantization, self.device, Path(self.scratch.name))
        tokenizer = no_tokenizer()
        loader = BaseLoader(configuration.base(), tokenizer)
        # Reads and quantizes one tensor after the other, and does not tell the parts apart.
        model, _ = loader.load()
        check_quantized(model, quantization)
        if self.device.kind == "cpu":
            decoding.check(model)
        return AxolotlModel(model, self.device, configuration, tokenizer)


class BaseLoader(ModelLoader):
    """axolotl's loader, without the adapter that it would make: the harness brings one later, and another after it."""

    def _load_adapters(self) -> None:
        return None


def no_tokenizer() -> PreTrainedTokenizerFast:
    """axolotl takes the size of the vocabulary and the special tokens from a tokenizer. Here no text comes by, and a
    checkpoint need not have one."""
    empty = Tokenizer(WordLevel({"<pad>": 0}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=empty, pad_token="<pad>")

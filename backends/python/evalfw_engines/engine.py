"""The two classes that an engine implements, and what they are handed.

A module in `engines/` holds one engine, and a function `open_engine() -> Engine` that opens the device and raises
`errors.Unavailable` where there is none. The module is imported when `hello` comes, not before: an `ImportError` in it
becomes an `unavailable` error. Its name and its packages stand in `engines/__init__.py`.

Errors are raised as `errors.Input`, `errors.Unsupported` and so on; any other exception travels as `framework`, or as
`out_of_memory` where it is a `MemoryError` or its words say so. Clocks, batches, ids, the state of the conversation and
all files but the model's are the serve loop's: an engine only computes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import Unsupported
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    import numpy

    from .batches import Batch
    from .checkpoint import Checkpoint
    from .lora import Adapter
    from .training import TrainingConfig

# Names of PEFT tensors, e.g. `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`: `lora.tensor_name`
# makes them. Values are float32; A is [r, in_features], B is [out_features, r].
Tensors = dict[str, "numpy.ndarray"]

# How the frozen base is stored.
NONE = "none"  # as in the checkpoint
NF4 = "nf4"  # NF4 with double quantisation for the seven projections; embedding, head and norms as they are
NATIVE = "native"  # the framework's own quantized format for the seven projections


@dataclass
class LoadTimes:
    """Where the time of a load went, as far as the engine can tell. The serve loop counts what is left of the total
    as `upload_seconds`, so an engine that cannot tell the parts apart leaves zeros."""

    read_seconds: float = 0.0
    quantize_seconds: float = 0.0


class Engine(ABC):
    """A framework on an opened device."""

    @abstractmethod
    def info(self) -> dict[str, object]:
        """The fields of the protocol's `EngineInfo` but for `protocol` and `engine_version`, which the serve loop
        adds. `about.cpu_device` makes the `device` of an engine on the CPU.

        `engine` is the name on the command line; `framework`, `framework_version`, `device`, `compute_dtype`,
        `features` (a list of strings), `quantizations` and `threads` are required; `own_dropout` is true where the
        masks are the framework's own. Cheap, and cannot fail.
        """

    @abstractmethod
    def load(self, checkpoint: Checkpoint, quantization: str, times: LoadTimes) -> Model:
        """Loads the frozen base from `checkpoint.folder`. The folder was checked: it is a complete Qwen2 checkpoint.
        `quantization` is one of those that `info` lists."""

    def limits(self) -> dict[str, float | None]:
        """What the device can do at best. A CPU needs no answer: the harness measures it itself."""
        return {"memory_bytes_per_second": None, "f32_flops": None, "bf16_flops": None}

    def tokenize(self, folder: Path, text: str) -> list[int]:
        """The ids of a text by the tokenizer of a checkpoint's folder, without special tokens added. All frameworks
        here read it with transformers."""
        return Tokenizer(folder).ids(text)


class Model(ABC):
    """A loaded model. Every method may return before the device has finished: the serve loop calls `synchronize`
    before it stops a clock. Losses are in nats; numbers are plain Python numbers."""

    @abstractmethod
    def attach_adapter(self, adapter: Adapter, training: TrainingConfig) -> None:
        """Attaches a LoRA adapter (`adapter.folder`, `adapter.config`, `adapter.tensors()`) and prepares AdamW for it.
        The adapter's files were checked against the model. A second call takes the place of the first."""

    @abstractmethod
    def train_step(self, step: int, dropout_seed: int, micro_batches: Sequence[Batch]) -> tuple[float, float]:
        """One optimizer step: loss and gradient norm. The loss is the mean over the supervised positions of all
        micro-batches together, before the update; the norm is the L2 norm before clipping."""

    @abstractmethod
    def gradients(
        self, step: int, dropout_seed: int, micro_batches: Sequence[Batch]
    ) -> tuple[float, float, Tensors]:
        """As `train_step`, with no update: the gradients of the adapter's tensors by their names."""

    @abstractmethod
    def evaluate(self, batches: Sequence[Batch]) -> tuple[float, int]:
        """The sum of the losses over all supervised positions, and their number; without dropout and gradients."""

    @abstractmethod
    def prefill(self, tokens: Sequence[int]) -> int:
        """Starts a new sequence: fills the KV cache and returns the most likely next token."""

    @abstractmethod
    def decode(self, token: int) -> int:
        """Appends `token` to the sequence and returns the most likely next token. End-of-sequence is a token as any
        other."""

    @abstractmethod
    def logits(self, tokens: Sequence[int]) -> numpy.ndarray:
        """float32 `[tokens, vocab_size]`, by one forward pass without a KV cache."""

    def decoded_weights(self) -> Tensors:
        """The projections as they are stored, decoded to float32, by the checkpoint's names and in its shapes."""
        raise Unsupported("telling the decoded weights")

    @abstractmethod
    def adapter(self) -> Tensors:
        """The adapter's current weights, by their names."""

    @abstractmethod
    def synchronize(self) -> None:
        """Waits until the device has finished all work given to it."""

    def memory(self) -> dict[str, int | None]:
        """The device allocator's own figures. Asked for after each call, off every clock."""
        return {"in_use_bytes": None, "reserved_bytes": None, "peak_bytes": None}

"""A tiny checkpoint, an adapter for it, an engine that computes nothing, and a conversation with it: all by the
standard library alone."""

from __future__ import annotations

import io
import json
import math
import struct
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from evalfw_engines import checkpoint, lora, protocol, tensor_file  # noqa: E402
from evalfw_engines.engine import Engine, Model  # noqa: E402

CONFIG = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 10,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
}
SHAPE = checkpoint.ModelConfig(10, 8, 12, 2, 2, 1, 4, True)
TRAINING = {
    "learning_rate": 2e-4,
    "beta1": 0.9,
    "beta2": 0.999,
    "epsilon": 1e-8,
    "weight_decay": 0.01,
    "max_grad_norm": None,
    "gradient_checkpointing": True,
    "kept_activation_bytes": 0,
}
RANK = 2


class Values:
    """As much of a numpy array as the writer of tensors asks for."""

    def __init__(self, shape: tuple[int, ...], value: float = 0.0) -> None:
        self.shape = shape
        self.value = value

    def astype(self, _dtype: str) -> Values:
        return self

    def tobytes(self) -> bytes:
        return struct.pack("<f", self.value) * math.prod(self.shape)


def write_checkpoint(folder: Path, config: dict | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or CONFIG))
    tensor_file.write(folder / "model.safetensors", {name: Values(shape) for name, shape in SHAPE.tensors().items()})
    return folder


def write_adapter(folder: Path) -> Path:
    lora.write(folder, lora.LoraConfig(RANK, 4.0, 0.1), adapter_values(0.5), SHAPE, Path("base"))
    return folder


def adapter_values(value: float) -> dict[str, Values]:
    return {name: Values(shape, value) for name, shape in lora.tensor_shapes(SHAPE, RANK).items()}


def write_batches(path: Path, *batches: dict) -> Path:
    path.write_text("".join(json.dumps(batch) + "\n" for batch in batches or (BATCH,)))
    return path


BATCH = {
    "input_ids": [[5, 6, 7, 0], [8, 9, 1, 2]],
    "labels": [[-100, -100, 7, -100], [-100, 9, 1, 2]],
    "lengths": [3, 4],
}


class FakeModel(Model):
    """Answers with what it was told to: a number, or an exception to raise."""

    loss: object = 1.5
    norm = 0.25
    logits_shape: tuple[int, ...] | None = None

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def attach_adapter(self, adapter, training):
        self.calls.append(("attach_adapter", adapter.config, training))

    def train_step(self, step, dropout_seed, micro_batches):
        self.calls.append(("train_step", step, dropout_seed, len(micro_batches)))
        return self.told(self.loss), self.norm

    def gradients(self, step, dropout_seed, micro_batches):
        return self.told(self.loss), self.norm, adapter_values(2.0)

    def evaluate(self, batches):
        tokens = sum(batch.trained_tokens() for batch in batches)
        return self.told(self.loss) * tokens, tokens

    def prefill(self, tokens):
        return tokens[-1]

    def decode(self, token):
        return (token + 1) % SHAPE.vocab_size

    def logits(self, tokens):
        return Values(self.logits_shape or (len(tokens), SHAPE.vocab_size))

    def adapter(self):
        return adapter_values(3.0)

    def synchronize(self):
        self.calls.append(("synchronize",))

    @staticmethod
    def told(value):
        if isinstance(value, BaseException):
            raise value
        return value


class FakeEngine(Engine):
    def __init__(self) -> None:
        self.model = FakeModel()

    def info(self):
        return {
            "engine": "fake",
            "framework": "none",
            "framework_version": "0",
            "device": {"kind": "cpu", "name": "", "driver": None, "software": False, "memory_bytes": None},
            "compute_dtype": "f32",
            "features": [],
            "quantizations": ["none", "nf4"],
            "threads": 1,
        }

    def load(self, checkpoint, quantization, times):
        times.quantize_seconds = 1e-9
        return self.model


class Conversation:
    """Requests that are answered in one go; ids count from 1."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []

    def say(self, method: str, **params: object) -> Conversation:
        return self.line({"id": len(self.lines) + 1, "method": method, "params": params})

    def line(self, value: object) -> Conversation:
        self.lines.append(value if isinstance(value, bytes) else json.dumps(value).encode())
        return self

    def hello(self) -> Conversation:
        return self.say("hello", protocol=protocol.VERSION)

    def answers(self, engine=FakeEngine) -> list[dict]:
        """`engine` opens an engine, or is one."""
        replies = io.BytesIO()
        opened = engine if callable(engine) else lambda: engine
        protocol.serve(opened, io.BytesIO(b"\n".join(self.lines)), replies)
        return [json.loads(line) for line in replies.getvalue().splitlines()]

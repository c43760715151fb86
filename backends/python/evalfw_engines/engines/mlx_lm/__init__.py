"""MLX-LM on Metal, on CUDA or on a CPU: its own model, its own tuner, its trainer's step.

On a GPU it computes in bf16, as checkpoints for it are made. On a CPU it computes in f32: there its bf16 is ten times
slower. Its own format has 4 bits in groups of 64 with a scale and an offset each; NF4 it has none.
"""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path

import mlx.core as mx
from mlx_lm.utils import load_model, maybe_set_recommended_wired_limit, quantize_model

from ... import about, checkpoint as checkpoints
from ...checkpoint import Checkpoint
from ...engine import NATIVE, NONE, Engine, LoadTimes
from ...errors import Unsupported
from .limits import measure
from .model import MlxModel

GROUP_SIZE = 64
BITS = 4


def open_engine() -> Engine:
    return MlxLm()


class MlxLm(Engine):
    def __init__(self) -> None:
        self.on_gpu = mx.default_device() == mx.gpu
        self.dtype = mx.bfloat16 if self.on_gpu else mx.float32
        # As mlx-lm does before it trains or generates: macOS then does not page the weights out.
        maybe_set_recommended_wired_limit()

    def info(self) -> dict[str, object]:
        return {
            "engine": "mlx-lm",
            "framework": "mlx-lm",
            "framework_version": metadata.version("mlx-lm"),
            "device": self._device(),
            "compute_dtype": "bf16" if self.on_gpu else "f32",
            "features": self._features(),
            "quantizations": [NONE, NATIVE],
            # On a CPU, MLX computes in one thread for each of its streams, and mlx-lm has one.
            "threads": 1,
            "own_dropout": True,
        }

    def _device(self) -> dict[str, object]:
        if not self.on_gpu:
            return about.cpu_device()
        found = mx.device_info()
        driver, shared = ("Metal", True) if mx.metal.is_available() else ("CUDA", False)
        return {
            "kind": "unified_gpu" if shared else "discrete_gpu",
            "name": str(found.get("device_name", driver)),
            "driver": driver,
            "software": False,
            "memory_bytes": None if shared else found.get("total_memory"),
        }

    def _features(self) -> list[str]:
        """What changes its speed."""
        backend = "cpu" if not self.on_gpu else "metal" if mx.metal.is_available() else "cuda"
        features = [f"mlx {metadata.version('mlx')}", backend, "compiled step"]
        if not self.on_gpu and _has_reference_blas():
            features.append("reference BLAS")
        return features

    def limits(self) -> dict[str, float | None]:
        return measure() if self.on_gpu else super().limits()

    def load(self, checkpoint: Checkpoint, quantization: str, times: LoadTimes) -> MlxModel:
        _check_readable(checkpoint)
        model, config = load_model(checkpoint.folder, lazy=True, model_config=_defaults(checkpoint))
        model.set_dtype(self.dtype)
        if quantization == NATIVE:
            # What a group does not divide stays as it is, as `mlx_lm.convert` has it.
            quantize_model(model, config, GROUP_SIZE, BITS, quant_predicate=_is_projection)
        # Reads and quantizes: MLX is lazy, so that the two cannot be told apart.
        mx.eval(model.parameters())
        return MlxModel(model, on_gpu=self.on_gpu)


def _has_reference_blas() -> bool:
    """The wheels of MLX for a CPU on Linux bring the reference implementation of BLAS, which is none for speed."""
    return any((Path(mx.__file__).parent.parent / "mlx_cpu.libs").glob("libblas-*"))


def _is_projection(path: str, _module: object) -> bool:
    return path.rpartition(".")[2] in checkpoints.PROJECTIONS


def _defaults(checkpoint: Checkpoint) -> dict[str, object]:
    """What mlx-lm reads otherwise than transformers where a configuration leaves it out. The base of the rotary
    positions above all: transformers 5 writes it into `rope_parameters`, and there mlx-lm does not look."""
    raw = json.loads((checkpoint.folder / "config.json").read_text(encoding="utf-8"))
    in_parameters = (raw.get("rope_parameters") or {}).get("rope_theta")
    return {
        "rope_theta": in_parameters or raw.get("rope_theta") or 10_000.0,
        # It was checked to be none; as `{"rope_type": "default"}` it would have to name a base again.
        "rope_scaling": None,
        "rms_norm_eps": raw.get("rms_norm_eps") or 1e-6,
        "num_key_value_heads": checkpoint.config.num_key_value_heads,
        "tie_word_embeddings": checkpoint.config.tie_word_embeddings,
        # A custom model class would be another model.
        "model_file": None,
    }


def _check_readable(checkpoint: Checkpoint) -> None:
    """mlx-lm has no heads of another width than the hidden state gives them, and reads each file of weights that it
    finds, an index or not."""
    config = checkpoint.config
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        raise Unsupported(f"mlx-lm has no head_dim of its own, and {checkpoint.folder} has {config.head_dim}")
    read = set(checkpoint.folder.glob("model*.safetensors"))
    named = {Path(tensor.file) for tensor in checkpoint.tensors.values()}
    if stray := sorted(path.name for path in read ^ named):
        raise Unsupported(f"mlx-lm reads model*.safetensors, whatever belongs together: {', '.join(stray)}")

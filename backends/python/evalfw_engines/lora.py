"""LoRA adapters, on disk in the format of Hugging Face PEFT.

PEFT has dozens of options that change the computation, and every version adds some. Read as plain LoRA by an engine
that does not know one, an adapter would give another loss without a word. So what is known to be plain is listed, and
any other field must be null or false.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from . import tensor_file
from .checkpoint import PROJECTIONS, ModelConfig, module_path
from .errors import Framework, Input

if TYPE_CHECKING:
    import numpy

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

KNOWN = {
    "peft_type", "task_type", "r", "lora_alpha", "lora_dropout", "bias", "init_lora_weights", "target_modules",
}
# Fields with any value: they tell where the adapter comes from, or are read by PEFT only along with another field
# that is refused, or only where a new adapter is initialised.
WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "eva_config", "inference_mode", "lora_ga_config", "megatron_core",
    "peft_version", "qalora_group_size", "revision",
}
# Fields for which empty means absent. Of others PEFT asks only whether they are null.
MAY_BE_EMPTY = {
    "alpha_pattern", "exclude_modules", "layers_pattern", "layers_to_transform", "loftq_config", "modules_to_save",
    "rank_pattern", "target_parameters",
}
# Initialisations that leave the base weights alone when PEFT loads the adapter.
INITIALIZATIONS = {"eva", "gaussian", "lora_ga", "orthogonal"}
ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class LoraConfig:
    """The part of PEFT's `LoraConfig` that changes the computation."""

    r: int
    lora_alpha: float
    # Probability with which an input of an adapter is dropped in training.
    lora_dropout: float

    @property
    def scale(self) -> float:
        """The factor of the adapter's output."""
        return self.lora_alpha / self.r


@dataclass(frozen=True)
class Adapter:
    """An adapter for all seven projections of every layer, checked against its model."""

    folder: Path
    config: LoraConfig
    found: Mapping[str, tensor_file.Found]

    @classmethod
    def read(cls, folder: Path, model: ModelConfig) -> Adapter:
        """Checks the files of a folder. The tensors' values stay on disk."""
        config = read_config(folder / CONFIG_FILE, model)
        found = _check_shapes(folder / WEIGHTS_FILE, tensor_shapes(model, config.r))
        return cls(folder, config, found)

    def parameters(self) -> int:
        return sum(tensor.elements for tensor in self.found.values())

    def tensors(self) -> dict[str, numpy.ndarray]:
        """The values as float32 by PEFT's names, all of them finite."""
        return {name: tensor_file.read_values(name, tensor) for name, tensor in self.found.items()}


def tensor_name(layer: int, projection: str, factor: str) -> str:
    """The name of factor `A` or `B` of an adapted projection."""
    return f"base_model.model.model.layers.{layer}.{module_path(projection)}.lora_{factor}.weight"


def tensor_shapes(model: ModelConfig, r: int) -> dict[str, tuple[int, int]]:
    """Both factors of all seven projections of every layer."""
    shapes = {}
    for layer in range(model.num_hidden_layers):
        for projection in PROJECTIONS:
            outputs, inputs = model.projection_shape(projection)
            shapes[tensor_name(layer, projection, "A")] = (r, inputs)
            shapes[tensor_name(layer, projection, "B")] = (outputs, r)
    return shapes


def write_tensors(path: Path, tensors: Mapping[str, numpy.ndarray], model: ModelConfig, r: int) -> None:
    """Writes what an engine gave: adapter tensors, or gradients of the same names. All have to be there."""
    shapes = tensor_shapes(model, r)
    for name, shape in shapes.items():
        got = tuple(tensors[name].shape) if name in tensors else None
        if got != shape:
            raise Framework(f"the engine gave {name} with shape {got}, expected {shape}")
    tensor_file.write(path, {name: tensors[name] for name in shapes})


def write(
    folder: Path, config: LoraConfig, tensors: Mapping[str, numpy.ndarray], model: ModelConfig, base_model: Path
) -> None:
    """Writes a folder that `peft.PeftModel.from_pretrained` loads. `base_model` is for its reader's information."""
    path = folder / CONFIG_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(to_json(config, base_model), encoding="utf-8")
    except OSError as error:
        raise Input.file(path, error) from error
    write_tensors(folder / WEIGHTS_FILE, tensors, model, config.r)


def to_json(config: LoraConfig, base_model: Path) -> str:
    alpha = config.lora_alpha
    value = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base_model),
        "r": config.r,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": config.lora_dropout,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "target_modules": list(PROJECTIONS),
        "modules_to_save": None,
        "inference_mode": True,
    }
    return json.dumps(value, indent=2) + "\n"


def read_config(path: Path, model: ModelConfig) -> LoraConfig:
    """Reads and checks `adapter_config.json`; an error names the file and the field."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(raw, dict):
            raise ValueError("is not an object")
        return _checked(raw, model)
    except (OSError, ValueError, RecursionError) as error:
        raise Input.file(path, error) from error


def _checked(raw: dict[str, object], model: ModelConfig) -> LoraConfig:
    _only("peft_type", raw.get("peft_type"), "LORA")
    # Other tasks have another head.
    _only("task_type", raw.get("task_type") or "CAUSAL_LM", "CAUSAL_LM")
    _only("bias", raw.get("bias") or "none", "none")
    start = raw.get("init_lora_weights")
    if not (start is None or isinstance(start, bool) or (isinstance(start, str) and start in INITIALIZATIONS)):
        raise ValueError(f"init_lora_weights {start!r} is not supported: it may change the base")
    for name, value in raw.items():
        off = value is None or value is False
        absent = name in MAY_BE_EMPTY and value in ("", [], {})
        if not (off or absent or name in KNOWN or name in WITHOUT_EFFECT):
            raise ValueError(f"{name} is not supported, and is {json.dumps(value)}")
    _check_targets(raw.get("target_modules"), model)
    r, alpha, dropout = raw.get("r"), raw.get("lora_alpha"), raw.get("lora_dropout", 0.0)
    if type(r) is not int or r < 1:
        raise ValueError(f"r is {r!r}, which is no rank")
    if not _is_number(alpha) or not math.isfinite(alpha):
        raise ValueError(f"lora_alpha is {alpha!r}, which is not a finite number")
    if not _is_number(dropout) or not 0 <= dropout < 1:
        raise ValueError(f"lora_dropout is {dropout!r}, which is not in [0, 1)")
    return LoraConfig(r, float(alpha), float(dropout))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _only(field: str, value: object, supported: str) -> None:
    if value != supported:
        raise ValueError(f"{field} is {value}, but only {supported} is supported")


def _check_targets(targets: object, model: ModelConfig) -> None:
    """The seven projections of every layer, and no other module, as PEFT matches them."""
    if targets is None:
        raise ValueError("target_modules is missing: PEFT would choose some")
    if isinstance(targets, str):
        if targets.lower() == ALL_LINEAR:
            return
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise ValueError(f"target_modules {targets!r}: {error}") from error

        def matches(module: str) -> bool:
            return pattern.fullmatch(module) is not None
    elif isinstance(targets, list) and all(isinstance(name, str) for name in targets):

        def matches(module: str) -> bool:
            return any(module == name or module.endswith(f".{name}") for name in targets)
    else:
        raise ValueError("target_modules is neither a text nor a list of texts")
    adapted, others = _modules(model)
    for module in adapted:
        if not matches(module):
            raise ValueError(
                f"target_modules leaves out {module}, but only adapters of all seven projections of every layer "
                "are supported"
            )
    for module in others:
        if matches(module):
            raise ValueError(f"target_modules names {module}, which is none of the seven projections")


def _modules(model: ModelConfig) -> tuple[list[str], list[str]]:
    """The modules of a Qwen2 model in transformers: the projections that are adapted, and all others."""
    adapted = []
    others = ["model", "model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head"]
    for layer in range(model.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        adapted += [f"{prefix}.{module_path(projection)}" for projection in PROJECTIONS]
        inner = ("self_attn", "mlp", "mlp.act_fn", "input_layernorm", "post_attention_layernorm")
        others += [prefix, *(f"{prefix}.{module}" for module in inner)]
    return adapted, others


def _check_shapes(path: Path, shapes: Mapping[str, tuple[int, int]]) -> dict[str, tensor_file.Found]:
    found = tensor_file.read_header(path)
    for name, shape in shapes.items():
        if name not in found:
            raise Input.file(path, f"{name} is missing")
        tensor = found[name]
        if tensor.shape != shape:
            raise Input.file(path, f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")
        if tensor.dtype not in tensor_file.FLOATS:
            raise Input.file(path, f"{name} has dtype {tensor.dtype}, expected F32, BF16 or F16")
    if len(found) != len(shapes):
        raise Input.file(
            path,
            f"holds {len(found)} tensors, but LoRA on all seven projections of this model has {len(shapes)}",
        )
    return {name: found[name] for name in shapes}

"""A Hugging Face checkpoint folder of a Qwen2 model, checked as a whole before a framework reads it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from . import tensor_file
from .errors import Input

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
# The seven projections of a block, in the order of the harness.
PROJECTIONS = ATTENTION + MLP
# Qwen2 has biases on these only.
BIASED = ("q_proj", "k_proj", "v_proj")
# The largest Qwen2.5 has 80. A number far beyond would only eat memory before it failed.
MAX_LAYERS = 10_000
# Bytes that are compared at a time.
PIECE = 1 << 22


def module_path(projection: str) -> str:
    """The path of a projection below its layer."""
    return f"{'self_attn' if projection in ATTENTION else 'mlp'}.{projection}"


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a model."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    tie_word_embeddings: bool

    def projection_shape(self, projection: str) -> tuple[int, int]:
        """Output and input features."""
        query = self.num_attention_heads * self.head_dim
        key_value = self.num_key_value_heads * self.head_dim
        return {
            "q_proj": (query, self.hidden_size),
            "k_proj": (key_value, self.hidden_size),
            "v_proj": (key_value, self.hidden_size),
            "o_proj": (self.hidden_size, query),
            "gate_proj": (self.intermediate_size, self.hidden_size),
            "up_proj": (self.intermediate_size, self.hidden_size),
            "down_proj": (self.hidden_size, self.intermediate_size),
        }[projection]

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the checkpoint with its shape."""
        hidden = (self.hidden_size,)
        embedding = (self.vocab_size, self.hidden_size)
        tensors: dict[str, tuple[int, ...]] = {EMBEDDING: embedding}
        for layer in range(self.num_hidden_layers):
            prefix = f"model.layers.{layer}"
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{prefix}.{norm}.weight"] = hidden
            for projection in PROJECTIONS:
                shape = self.projection_shape(projection)
                tensors[f"{prefix}.{module_path(projection)}.weight"] = shape
                if projection in BIASED:
                    tensors[f"{prefix}.{module_path(projection)}.bias"] = shape[:1]
        tensors["model.norm.weight"] = hidden
        if not self.tie_word_embeddings:
            tensors[HEAD] = embedding
        return tensors

    def parameters(self) -> int:
        """A tied head is counted once."""
        return sum(math.prod(shape) for shape in self.tensors().values())


@dataclass(frozen=True)
class Checkpoint:
    folder: Path
    config: ModelConfig
    # The model's tensors by name.
    tensors: dict[str, tensor_file.Found]

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Checks that every tensor of the configured model is there, whole, of the right shape and of a
        floating-point type. Reads headers only, but for a tied head's copy."""
        if not folder.is_dir():
            raise Input.file(folder, "is not a folder")
        config = read_config(folder / "config.json")
        found: dict[str, tensor_file.Found] = {}
        for file in shards(folder):
            found.update(tensor_file.read_header(file))
        tensors = {}
        for name, shape in config.tensors().items():
            tensor = found.get(name)
            if tensor is None:
                raise Input.file(folder, f"tensor {name} is in none of the safetensors files")
            if tensor.shape != shape:
                raise Input.file(
                    tensor.file, f"{name} has shape {list(tensor.shape)}, but config.json implies {list(shape)}"
                )
            if tensor.dtype not in tensor_file.FLOATS:
                raise Input.file(
                    tensor.file, f"{name} has type {tensor.dtype}, but only F32, F16 and BF16 are read"
                )
            tensors[name] = tensor
        if config.tie_word_embeddings and HEAD in found:
            _check_tied(found[HEAD], tensors[EMBEDDING])
        return cls(folder, config, tensors)

    def bytes(self) -> int:
        """Of the model's tensors in the files."""
        return sum(tensor.bytes for tensor in self.tensors.values())

    def is_sharded(self) -> bool:
        return len({tensor.file for tensor in self.tensors.values()}) > 1


def read_config(path: Path) -> ModelConfig:
    """Reads and checks `config.json`, with the defaults of transformers. What changes the computation and no engine
    implements is refused by its field."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Input.file(path, error) from error
    if not isinstance(raw, dict):
        raise Input.file(path, "is not an object")
    try:
        _refuse(raw)
        return _shape(raw)
    except ValueError as problem:
        raise Input.file(path, problem) from problem


def _refuse(raw: dict[str, object]) -> None:
    kind = raw.get("model_type")
    if kind != "qwen2":
        raise ValueError(f"model_type is {kind or 'missing'}, but only qwen2 (Qwen2, Qwen2.5) is supported")
    for name in raw.get("architectures") or ():
        if name != "Qwen2ForCausalLM":
            raise ValueError(f"architectures names {name}, but only Qwen2ForCausalLM is supported")
    if raw.get("hidden_act", "silu") not in (None, "silu"):
        raise ValueError(f"hidden_act is {raw['hidden_act']}, but Qwen2 uses silu")
    if raw.get("use_sliding_window"):
        raise ValueError("use_sliding_window is true, which no engine implements")
    if raw.get("quantization_config") is not None:
        raise ValueError("quantization_config: the weights are already quantized; give the original checkpoint")
    for field in ("rope_scaling", "rope_parameters"):
        rope = raw.get(field) or {}
        if not isinstance(rope, dict):
            raise ValueError(f"{field} is not an object")
        kind = rope.get("rope_type") or rope.get("type") or "default"
        if kind != "default":
            raise ValueError(f"{field} asks for {kind} scaling, which no engine implements")


def _shape(raw: dict[str, object]) -> ModelConfig:
    def positive(field: str, default: int | None = None) -> int:
        value = raw.get(field)
        value = default if value is None else value
        if value is None:
            raise ValueError(f"{field} is missing")
        if type(value) is not int or value < 1:
            raise ValueError(f"{field} is {value!r}, which is no size")
        return value

    layers = positive("num_hidden_layers")
    if layers > MAX_LAYERS:
        raise ValueError(f"num_hidden_layers is {layers}, which is above {MAX_LAYERS}")
    hidden = positive("hidden_size")
    heads = positive("num_attention_heads")
    key_value_heads = positive("num_key_value_heads", heads)
    if heads % key_value_heads:
        raise ValueError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {key_value_heads}")
    if raw.get("head_dim") is None and hidden % heads:
        raise ValueError(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    head_dim = positive("head_dim", hidden // heads)
    if head_dim % 2:
        raise ValueError(f"head_dim is {head_dim}, but rotary positions need an even number")
    tied = raw.get("tie_word_embeddings")
    if tied is not None and not isinstance(tied, bool):
        raise ValueError(f"tie_word_embeddings is {tied!r}, which is no boolean")
    return ModelConfig(
        vocab_size=positive("vocab_size"),
        hidden_size=hidden,
        intermediate_size=positive("intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=head_dim,
        tie_word_embeddings=bool(tied),
    )


def shards(folder: Path) -> list[Path]:
    """The safetensors files: the single one, or those of the index. Where there are both, transformers takes the
    single one."""
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if single.exists():
        return [single]
    if not index.exists():
        raise Input.file(folder, f"has neither {SINGLE_FILE} nor {INDEX_FILE}")
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Input.file(index, f"weight_map cannot be read: {error!r}") from error
    files = []
    for name in names:
        # An index is data from elsewhere: it may only name its neighbours.
        if not isinstance(name, str) or name in ("", ".", "..") or "/" in name or "\\" in name:
            raise Input.file(index, f"weight_map names {name}, which is not a plain file name")
        file = folder / name
        if not file.exists():
            raise Input.file(file, "shard is missing, though the index names it")
        files.append(file)
    return files


def _check_tied(head: tensor_file.Found, embedding: tensor_file.Found) -> None:
    """The embedding is used for a tied head. Some writers store a copy, which says the same; another head would be
    computed wrongly, whichever of the two was meant."""
    same = (head.shape, head.dtype) == (embedding.shape, embedding.dtype)
    if same:
        with head.file.open("rb") as one, embedding.file.open("rb") as other:
            one.seek(head.offset)
            other.seek(embedding.offset)
            left = head.bytes
            while same and left > 0:
                count = min(PIECE, left)
                same = one.read(count) == other.read(count)
                left -= count
    if not same:
        raise Input.file(head.file, f"{HEAD} is not {EMBEDDING}, though config.json says tie_word_embeddings")

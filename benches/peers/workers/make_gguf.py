"""Writes a Qwen2 checkpoint as GGUF in llama.cpp's Q4_0: `make_gguf.py CHECKPOINT_DIR FILE`.

The file has no vocabulary: speed is measured on token ids.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import gguf
import llama_cpp
import numpy as np


def main(checkpoint: Path, target: Path) -> None:
    full = target.with_suffix(".bf16.gguf")
    partial = target.with_suffix(".partial.gguf")
    try:
        write_bf16(checkpoint, full)
        quantize(full, partial)
        partial.replace(target)
    finally:
        full.unlink(missing_ok=True)
        partial.unlink(missing_ok=True)


def write_bf16(checkpoint: Path, target: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    writer = gguf.GGUFWriter(target, "qwen2")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config["vocab_size"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config["num_hidden_layers"])
    for file in sorted(checkpoint.glob("*.safetensors")):
        for name, bits in bf16_tensors(file):
            known = names.get_name(name, try_suffixes=(".weight", ".bias"))
            if known is None:
                raise SystemExit(f"{file.name}: {name} is no tensor of Qwen2")
            if bits.ndim == 1:
                # llama.cpp adds and scales in f32 only.
                writer.add_tensor(known, (bits.astype(np.uint32) << 16).view(np.float32))
            else:
                writer.add_tensor(known, bits.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def bf16_tensors(file: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a safetensors file, as the bits of their values: NumPy has no bf16."""
    data = np.memmap(file, dtype=np.uint8, mode="r")
    length = int(data[:8].view(np.uint64)[0])
    header = json.loads(bytes(data[8 : 8 + length]))
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if entry["dtype"] != "BF16":
            raise SystemExit(f"{file.name}: {name} is {entry['dtype']}, expected BF16")
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        yield name, data[begin:end].view(np.uint16).reshape(entry["shape"])


def quantize(source: Path, target: Path) -> None:
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    if llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), params) != 0:
        raise SystemExit("llama.cpp could not quantize the model")


if __name__ == "__main__":
    match sys.argv[1:]:
        case [checkpoint, target]:
            main(Path(checkpoint), Path(target))
        case _:
            sys.exit(__doc__)

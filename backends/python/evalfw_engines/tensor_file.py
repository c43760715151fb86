"""Safetensors files, read and written with the standard library; numpy only holds values.

An engine's own libraries are not needed to check a file, so a wrong one is told as an error of its own and not as
whatever a framework makes of it.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import Input

if TYPE_CHECKING:
    import numpy

# The format's own limit on its header.
MAX_HEADER_BYTES = 100_000_000
# Bytes of an element of the types that weights may have.
FLOATS = {"F32": 4, "F16": 2, "BF16": 2}
SIZES = {
    **FLOATS, "F64": 8, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "F8_E4M3": 1, "F8_E5M2": 1, "C64": 8,
}


@dataclass(frozen=True)
class Found:
    """A tensor as a header describes it."""

    file: Path
    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.elements * SIZES[self.dtype]


def read_header(path: Path) -> dict[str, Found]:
    """The tensors of a file, which must be whole."""
    try:
        with path.open("rb") as file:
            length = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            if len(prefix) < 8:
                raise Input.file(path, f"is truncated: {length} bytes hold no header")
            (size,) = struct.unpack("<Q", prefix)
            if size + 8 > length or size > MAX_HEADER_BYTES:
                raise Input.file(
                    path, f"is truncated or not safetensors: a header of {size} bytes in a file of {length}"
                )
            header = file.read(size)
    except OSError as error:
        raise Input.file(path, error) from error
    try:
        described = json.loads(header)
        found = _tensors(path, described, 8 + size)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise Input.file(path, f"bad safetensors header: {error}") from error
    end = max((tensor.offset + tensor.bytes for tensor in found.values()), default=8 + size)
    if end != length:
        raise Input.file(path, f"is truncated or too long: {length} bytes, but its header describes {end}")
    return found


def _tensors(path: Path, described: object, data_start: int) -> dict[str, Found]:
    if not isinstance(described, dict):
        raise ValueError("is not an object")
    found = {}
    for name, entry in described.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        shape = tuple(entry["shape"])
        if not all(type(number) is int and number >= 0 for number in (begin, end, *shape)):
            raise ValueError(f"{name} has a shape or offsets that are no sizes")
        if entry["dtype"] not in SIZES:
            raise ValueError(f"{name} has the unknown type {entry['dtype']}")
        tensor = Found(path, data_start + begin, entry["dtype"], shape)
        if end - begin != tensor.bytes:
            raise ValueError(f"{name} has {end - begin} bytes, but its shape and type take {tensor.bytes}")
        found[name] = tensor
    return found


def read_values(name: str, tensor: Found) -> numpy.ndarray:
    """The values of one tensor, widened to float32, all of them finite."""
    import numpy as np

    if tensor.dtype not in FLOATS:
        raise Input.file(tensor.file, f"{name} has dtype {tensor.dtype}, expected F32, BF16 or F16")
    try:
        with tensor.file.open("rb") as file:
            file.seek(tensor.offset)
            raw = file.read(tensor.bytes)
    except OSError as error:
        raise Input.file(tensor.file, error) from error
    if len(raw) != tensor.bytes:
        raise Input.file(tensor.file, f"{name} is truncated")
    if tensor.dtype == "BF16":
        # A bf16 is the upper half of an f32.
        values = (np.frombuffer(raw, "<u2").astype("<u4") << 16).view("<f4")
    else:
        values = np.frombuffer(raw, "<f4" if tensor.dtype == "F32" else "<f2").astype(np.float32)
    finite = np.isfinite(values)
    if not finite.all():
        raise Input.file(tensor.file, f"{name} is not finite at element {int(np.argmin(finite))}")
    return values.reshape(tensor.shape)


def write(path: Path, tensors: Mapping[str, numpy.ndarray]) -> None:
    """Writes arrays as float32, with the mark that transformers looks for. An array is anything with a `shape`, and
    `astype` and `tobytes` as numpy has them."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, values in tensors.items():
        size = 4 * math.prod(values.shape)
        header[name] = {"dtype": "F32", "shape": list(values.shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    # Tensors begin at a multiple of eight bytes.
    text += b" " * (-len(text) % 8)
    try:
        with path.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for values in tensors.values():
                file.write(values.astype("<f4").tobytes())
    except OSError as error:
        raise Input.file(path, error) from error

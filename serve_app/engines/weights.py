"""What safetensors files hold, read from their headers alone.

A file is an 8-byte little-endian length, a JSON header of that length and the tensors' bytes
(https://github.com/huggingface/safetensors#format). Nothing here maps or loads a tensor.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from serve_app.domain.errors import ModelLoadFailed

MAX_HEADER_BYTES = 64 * 1024 * 1024
"""The format's own limit is 100 MB; a real header of 10,000 tensors has 1 MB."""

BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "F64": 64, "I64": 64, "U64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip

TORCH_NAMES = {
    "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64", "I8": "int8", "U8": "uint8",
    "I32": "int32", "I64": "int64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Weights:
    """The sum over one or more files: ``dtypes`` counts elements by the format's dtype names."""

    size_bytes: int = 0
    parameters: int = 0
    dtypes: Counter[str] = field(default_factory=Counter)
    tensors: frozenset[str] = frozenset()

    def __add__(self, other: Weights) -> Weights:
        return Weights(
            self.size_bytes + other.size_bytes,
            self.parameters + other.parameters,
            self.dtypes + other.dtypes,
            self.tensors | other.tensors,
        )

    @property
    def dtype(self) -> str | None:
        """torch's name of the dtype that most elements have."""
        if not self.dtypes:
            return None
        name = self.dtypes.most_common(1)[0][0]
        return TORCH_NAMES.get(name, name.lower())


def read_header(path: Path) -> Weights:
    """Check one file against its own header.

    Raises:
        ModelLoadFailed: the header is no header, or the file is shorter or longer than it says.
        OSError: the file cannot be read.
    """
    if not path.is_file():
        raise ModelLoadFailed(f"{path.name} is missing.")
    size = os.stat(path).st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ModelLoadFailed(f"{path.name} is truncated: its header is not complete. Download it again.")
        if length > MAX_HEADER_BYTES:
            raise ModelLoadFailed(f"{path.name} has a header of {length} bytes; at most {MAX_HEADER_BYTES} are read.")
        raw = file.read(length)
    try:
        return _sum_up(json.loads(raw), size - 8 - length, path.name)
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError) as fault:
        raise ModelLoadFailed(f"{path.name} is not a safetensors file: its header cannot be read.") from fault


def _sum_up(header: dict[str, Any], data_bytes: int, name: str) -> Weights:
    header.pop("__metadata__", None)
    dtypes: Counter[str] = Counter()
    spans: list[tuple[int, int]] = []
    for tensor in header.values():
        count = math.prod(_whole(n) for n in tensor["shape"])
        begin, end = (_whole(n) for n in tensor["data_offsets"])
        if end - begin != (count * BITS[tensor["dtype"]] + 7) // 8:
            raise ModelLoadFailed(f"{name} is damaged: a tensor's size and its place in the file differ.")
        dtypes[tensor["dtype"]] += count
        spans.append((begin, end))
    _check_spans(sorted(spans), data_bytes, name)
    return Weights(data_bytes, sum(dtypes.values()), dtypes, frozenset(header))


def _check_spans(spans: list[tuple[int, int]], data_bytes: int, name: str) -> None:
    position = 0
    for begin, end in spans:
        if begin != position:
            raise ModelLoadFailed(f"{name} is damaged: its tensors overlap or leave a gap.")
        position = end
    if position > data_bytes:
        raise ModelLoadFailed(
            f"{name} is truncated: {position - data_bytes} bytes of {position} are missing. Download it again."
        )
    if position < data_bytes:
        raise ModelLoadFailed(f"{name} is damaged: {data_bytes - position} bytes after the last tensor.")


def _whole(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"not a size: {value!r}")
    return value

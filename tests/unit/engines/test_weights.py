"""Headers of safetensors files: what they say, and every way in which they can be wrong."""

from __future__ import annotations

import contextlib
import json
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve_app.domain.errors import ModelLoadFailed
from serve_app.engines.weights import read_header
from tests.unit.engines.model_files import WEIGHTS, safetensors


def write(path: Path, raw: bytes) -> Path:
    (path / "model.safetensors").write_bytes(raw)
    return path / "model.safetensors"


def framed(header: object) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw


def test_a_header_tells_size_number_and_dtypes(tmp_path: Path) -> None:
    weights = read_header(write(tmp_path, WEIGHTS))
    assert (weights.size_bytes, weights.parameters, weights.dtype) == (134, 35, "float32")
    assert weights.tensors == {"a", "b"}
    assert weights.dtypes == {"F32": 32, "BF16": 3}


def test_scalars_and_empty_tensors_are_tensors(tmp_path: Path) -> None:
    assert read_header(write(tmp_path, safetensors({"s": ("F32", [], 4), "e": ("F32", [0, 5], 0)}))).parameters == 1


@pytest.mark.parametrize("length", [0, 7, 8, 20, len(WEIGHTS) - 1])
def test_every_truncation_is_noticed(tmp_path: Path, length: int) -> None:
    with pytest.raises(ModelLoadFailed, match="truncated"):
        read_header(write(tmp_path, WEIGHTS[:length]))


@pytest.mark.parametrize(
    "raw",
    [
        WEIGHTS + b"\0",
        framed(b"not json"),
        framed([]),
        framed({"a": 1}),
        framed({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}}) + bytes(8),
        framed({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}) + bytes(4),
        framed({"a": {"dtype": "NEW", "shape": [1], "data_offsets": [0, 4]}}) + bytes(4),
        framed({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}) + bytes(8),
        framed({n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in "ab"}) + bytes(4),
        framed(b"[" * 100_000),
        struct.pack("<Q", 2**63) + b"{}",
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, raw: bytes) -> None:
    with pytest.raises(ModelLoadFailed) as refused:
        read_header(write(tmp_path, raw))
    assert str(tmp_path) not in refused.value.message


def test_a_huge_header_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve_app.engines.weights.MAX_HEADER_BYTES", 10)
    with pytest.raises(ModelLoadFailed, match="header of"):
        read_header(write(tmp_path, WEIGHTS))


@given(st.binary(max_size=200))
def test_no_bytes_make_it_raise_anything_else(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    path = write(tmp_path_factory.mktemp("f"), raw)
    with contextlib.suppress(ModelLoadFailed):
        read_header(path)

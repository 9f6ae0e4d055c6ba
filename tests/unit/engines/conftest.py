"""Model folders on disk, made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.engines.model_files import LLAMA, WEIGHTS, MakeModel


@pytest.fixture
def make_model(tmp_path: Path) -> MakeModel:
    """Write a whole model into the store ``tmp_path``; a file given as None is left out."""

    def make(name: str, **files: Any) -> Path:
        path = tmp_path / name
        path.mkdir(parents=True, exist_ok=True)
        content: dict[str, Any] = {
            "config.json": LLAMA, "tokenizer.json": {}, "tokenizer_config.json": {}, "model.safetensors": WEIGHTS,
        } | files.pop("files", {})  # fmt: skip
        for file, value in content.items():
            if value is not None:
                (path / file).parent.mkdir(parents=True, exist_ok=True)
                raw = value if isinstance(value, bytes) else value if isinstance(value, str) else json.dumps(value)
                (path / file).write_bytes(raw if isinstance(raw, bytes) else raw.encode())
        return path

    return make

"""The engines by name. One registers with a line here; nothing is imported before it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from serve_app.domain.catalog import ModelInfo, Task
from serve_app.domain.errors import InvalidConfig
from serve_app.engines.base import Engine, EngineOptions, Progress, no_progress

Factory = Callable[[ModelInfo, EngineOptions, Progress], Engine]

ENGINES = {
    "transformers": "serve_app.engines.transformers",
    "scripted": "serve_app.engines.scripted",
    "embeddings": "serve_app.engines.embed",
}
"""Each name's module; its ``create(info, options, on_progress)`` makes the engine."""

AUTO = "auto"
BY_TASK = {Task.FEATURE_EXTRACTION: "embeddings"}
"""What ``auto`` means for a model of the task; transformers for every other."""

WITHOUT_FILES = frozenset({"scripted"})
"""Engines whose models are not folders of the store: ``describe(model_id)`` of their module says what they can do."""


def create(name: str, info: ModelInfo, options: EngineOptions, on_progress: Progress = no_progress) -> Engine:
    """Make an engine and load its model. Blocks, maybe for minutes: call it in a thread.

    Raises:
        InvalidConfig: no engine has the name, or an option is wrong.
        ModelLoadFailed, ModelUnsafe, CapabilityMissing, MemoryExceeded: the model cannot be used.
    """
    if name == AUTO:
        name = BY_TASK.get(info.task, "transformers") if info.task else "transformers"
    if name not in ENGINES:
        raise InvalidConfig(f"There is no engine {name!r}; there are {', '.join(sorted([*ENGINES, AUTO]))}.")
    factory: Factory = importlib.import_module(ENGINES[name]).create
    return factory(info, options, on_progress)


def describe(name: str, model_id: str) -> ModelInfo | None:
    """The model of an engine that needs no files; None for the engines whose models are folders of the store."""
    return importlib.import_module(ENGINES[name]).describe(model_id) if name in WITHOUT_FILES else None

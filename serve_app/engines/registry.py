"""The engines by name. One registers with a line here; nothing is imported before it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from serve_app.domain.catalog import ModelInfo
from serve_app.domain.errors import InvalidConfig
from serve_app.engines.base import Engine, EngineOptions, Progress, no_progress

Factory = Callable[[ModelInfo, EngineOptions, Progress], Engine]

ENGINES = {
    "transformers": "serve_app.engines.transformers",
    "scripted": "serve_app.engines.scripted",
    "auto": "serve_app.engines.transformers",
}
"""Each name's module; its ``create(info, options, on_progress)`` makes the engine. ``auto``: what suits the model."""


def create(name: str, info: ModelInfo, options: EngineOptions, on_progress: Progress = no_progress) -> Engine:
    """Make an engine and load its model. Blocks, maybe for minutes: call it in a thread.

    Raises:
        InvalidConfig: no engine has the name, or an option is wrong.
        ModelLoadFailed, ModelUnsafe, CapabilityMissing, MemoryExceeded: the model cannot be used.
    """
    if name not in ENGINES:
        raise InvalidConfig(f"There is no engine {name!r}; there are {', '.join(sorted(ENGINES))}.")
    factory: Factory = importlib.import_module(ENGINES[name]).create
    return factory(info, options, on_progress)

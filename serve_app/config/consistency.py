"""What is wrong between files that are each valid."""

from __future__ import annotations

from serve_app.config.serve_file import ServeFile
from serve_app.config.sources import Loaded


def contradictions(served: ServeFile, loaded: Loaded) -> list[str]:
    """Aliases that mean two things, and models that can never be loaded, in words for the person who wrote them."""
    return [*_ambiguous(served, loaded), *_never_fit(served, loaded)]


def _ambiguous(served: ServeFile, loaded: Loaded) -> list[str]:
    taken = {alias: model.model for model in served.models for alias in model.aliases}
    return [
        f"The alias {alias} means {target} in the platform file and {taken[alias]} in the serve configuration."
        for alias, target in loaded.platform.aliases.items()
        if alias in taken and taken[alias] != target
    ]


def _never_fit(served: ServeFile, loaded: Loaded) -> list[str]:
    """Models that declare more than the platform file lets models use of any node."""
    capacity = loaded.platform.capacity
    caps = (("memory_bytes", capacity.memory_bytes), ("num_cpus", capacity.cpus), ("num_gpus", capacity.gpus))
    return [
        f"{model.model} can never be loaded: its {name} is {needed:g}, and the platform file caps models at {cap:g}."
        for model in served.models
        for name, cap in caps
        if cap is not None and (needed := getattr(model, name) or 0) > cap
    ]

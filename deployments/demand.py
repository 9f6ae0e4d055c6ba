"""What a model asks of the cluster, from its arguments and its files, as rotation wants to know it."""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

from serve_app.config import ModelArgs
from serve_app.domain.catalog import Entry, ModelInfo
from serve_app.domain.errors import RotundaError
from serve_app.domain.placement import Resources
from serve_app.domain.rotation_events import Model
from serve_app.engines.base import EngineOptions
from serve_app.engines.memory import MemoryNeed, needed_bytes

logger = logging.getLogger(__name__)

PROCESS_S = 8.0
"""An empty replica and the imports, on a machine of two cores (measured: 8 to 10 s)."""
READ_BYTES_PER_S = 500e6
"""A guess at how fast weights come from the disk, until a load of the model was measured."""
REMOTE_S = 5.0
"""A guess at how long a remote server loads a model."""


@lru_cache(maxsize=4096)
def _need(info: ModelInfo, options: EngineOptions) -> MemoryNeed | None:
    try:
        return needed_bytes(info, options)
    except (RotundaError, OSError) as error:
        logger.warning("the need of %s cannot be told from its files: %s", info.id, error)
        return None


def need_of(args: ModelArgs, info: ModelInfo | None) -> MemoryNeed | None:
    """The bytes of one replica by part; None when the files do not say. Reads the model's config.json once."""
    return _need(info, EngineOptions(**args.engine_options())) if info and info.size_bytes else None


def demand_of(args: ModelArgs, info: ModelInfo | None) -> Resources:
    """What one replica declares; its memory is computed where the arguments give none."""
    need = need_of(args, info) if args.memory_bytes is None else None
    return Resources(args.num_cpus, args.num_gpus, args.memory_bytes or (need.total if need else 0))


def local_model(entry: Entry, args: ModelArgs) -> Model:
    """A model of the store or of ``serve_config.yaml``."""
    size = entry.info.size_bytes if entry.info else None
    return Model(
        entry.full_name,
        demand_of(args, entry.info),
        entry.provider,
        reload_s=PROCESS_S + (size or 0) / READ_BYTES_PER_S,
        pinned=args.stays,
        idle_unload_s=args.idle_unload_s,
        revision=entry.info.revision if entry.info else "",
    )


def parts_of(args: ModelArgs, info: ModelInfo | None) -> dict[str, Any]:
    """The need by part as JSON values; empty when it is not known."""
    need = need_of(args, info)
    return need.to_json() if need else {}


def remote_model(entry: Entry, resides: bool) -> Model:
    """A model of a remote provider; without ``resides`` its memory is the provider's own affair."""
    size = entry.info.size_bytes if entry.info else None
    return Model(entry.full_name, Resources(memory=size or 0), entry.provider, reload_s=REMOTE_S, resides=resides)

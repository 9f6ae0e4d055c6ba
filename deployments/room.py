"""Whether a model would find room on the cluster right now, by Ray's own ledger; nothing is changed by asking."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray

from serve_app.config import ModelArgs
from serve_app.domain.catalog import ModelInfo
from serve_app.engines.base import EngineOptions
from serve_app.engines.memory import needed_bytes


def room_for(args: ModelArgs, info: ModelInfo | None) -> dict[str, Any]:
    """``verdict`` is fits, waits (for others to leave) or never_fits; ``bytes`` the need by part. Blocks."""
    demand = wants(args)
    parts = needed_bytes(info, EngineOptions(**args.engine_options())).to_json() if info and info.size_bytes else {}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(_covers(node, demand) for node in nodes):
        verdict, reason = "never_fits", f"no node has {_words(demand)}"
    elif _covers(ray.available_resources(), demand):
        verdict, reason = "fits", f"{_words(demand)} are free"
    else:
        verdict, reason = "waits", f"{_words(demand)} are not free: it would wait until another model leaves"
    return {"verdict": verdict, "reason": reason, "bytes": parts}


def wants(args: ModelArgs) -> dict[str, float]:
    """What one replica asks of Ray, in Ray's names and units."""
    return {"CPU": args.num_cpus, "GPU": args.num_gpus, "memory": args.memory_bytes or 0}


def _covers(offered: Mapping[str, float], demand: Mapping[str, float]) -> bool:
    return all(offered.get(name, 0.0) >= amount for name, amount in demand.items())


def _words(demand: Mapping[str, float]) -> str:
    return " and ".join(f"{amount:g} {name}" for name, amount in demand.items() if amount)

"""How many replicas a model runs: the policy that Serve's controller calls.

The replicas report two figures in ``record_autoscaling_stats``: ``granted``, the most replicas the model may have right
now (0 retires it), and ``floor``, how many it keeps without any request (1 while it is not idle for too long).
The policy never raises (Serve has no guard around it) and imports nothing but the standard library.
"""

from __future__ import annotations

import math
from typing import Any

SILENCE_S = 10.0
"""Without figures the present target stands for so long: nobody is ended by mistake after a crash of the controller."""


def scale(ctx: Any) -> tuple[int, dict[str, Any]]:
    """Target replicas = min(wanted by load, granted), within the deployment's own bounds.

    Args:
        ctx: Serve's ``AutoscalingContext``.

    Returns:
        The target, and the state kept for the next call (``quiet_since``: when the figures stopped).
    """
    requests = float(ctx.total_num_requests or 0)
    target_per_replica = float(getattr(ctx.config, "target_ongoing_requests", None) or 1)
    wanted = math.ceil(requests / target_per_replica)
    if ctx.current_num_replicas == 0:
        return _bounded(ctx, wanted), {}
    granted, floor = _latest(ctx, "granted", min), _latest(ctx, "floor", max)
    if granted is None:
        return _without_figures(ctx, wanted)
    return min(_bounded(ctx, max(wanted, int(floor or 0))), int(granted)), {}


def _without_figures(ctx: Any, wanted: int) -> tuple[int, dict[str, Any]]:
    now = float(ctx.current_time or 0)
    since = float((ctx.policy_state or {}).get("quiet_since", now))
    if now - since > SILENCE_S and ctx.running_replicas:
        return _bounded(ctx, max(wanted, 1)), {"quiet_since": since}
    return int(ctx.target_num_replicas), {"quiet_since": since}


def _bounded(ctx: Any, wanted: int) -> int:
    low, high = int(ctx.capacity_adjusted_min_replicas), int(ctx.capacity_adjusted_max_replicas)
    return max(low, min(high, wanted))


def _latest(ctx: Any, name: str, reduce: Any) -> float | None:
    """The last value that each running replica reported, reduced to one; None when no replica did."""
    series_by_replica = (ctx.raw_metrics or {}).get(name) or {}
    values = [series[-1] for series in series_by_replica.values() if series]
    numbers = [float(getattr(value, "value", value)) for value in values]
    return reduce(numbers) if numbers else None

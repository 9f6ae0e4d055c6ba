"""How many replicas a model runs: the policy that Serve's controller calls.

The replicas report one figure in ``record_autoscaling_stats``: ``granted``, the most replicas that the router allows
the model right now (0 retires it). The policy never raises (Serve has no guard around it) and imports nothing but the
standard library.
"""

from __future__ import annotations

import math
from typing import Any

SILENCE_S = 10.0
"""Without figures the present target stands for so long: nobody is ended by mistake after a crash of the controller."""
CALM_S = 5.0
"""Fewer replicas are run when fewer have been enough for so long."""


def scale(ctx: Any) -> tuple[int, dict[str, Any]]:
    """Target replicas = min(wanted by load, granted), within the deployment's own bounds.

    Args:
        ctx: Serve's ``AutoscalingContext``.

    Returns:
        The target, and the state kept for the next call: ``quiet_since``, when the figures stopped; ``calm_since`` and
        ``enough``, since when how many replicas would have been enough.
    """
    requests = float(ctx.total_num_requests or 0)
    target_per_replica = float(getattr(ctx.config, "target_ongoing_requests", None) or 1)
    wanted = math.ceil(requests / target_per_replica)
    if ctx.current_num_replicas == 0:
        return _bounded(ctx, wanted), {}
    granted = _granted(ctx)
    if granted is None:
        return _without_figures(ctx, wanted)
    if granted == 0:
        return 0, {}
    wanted, state = _calmed(ctx, _bounded(ctx, max(wanted, 1)))
    return min(wanted, granted), state


def _calmed(ctx: Any, wanted: int) -> tuple[int, dict[str, Any]]:
    """``wanted``, or the present target as long as fewer have not been enough for ``CALM_S``."""
    now, target = float(ctx.current_time or 0), int(ctx.target_num_replicas)
    if wanted >= target:
        return wanted, {}
    before = ctx.policy_state or {}
    since, enough = float(before.get("calm_since", now)), max(wanted, int(before.get("enough", wanted)))
    if now - since >= CALM_S:
        return enough, {}
    return target, {"calm_since": since, "enough": enough}


def _without_figures(ctx: Any, wanted: int) -> tuple[int, dict[str, Any]]:
    now = float(ctx.current_time or 0)
    since = float((ctx.policy_state or {}).get("quiet_since", now))
    if now - since > SILENCE_S and ctx.running_replicas:
        return _bounded(ctx, max(wanted, 1)), {"quiet_since": since}
    return int(ctx.target_num_replicas), {"quiet_since": since}


def _bounded(ctx: Any, wanted: int) -> int:
    low, high = int(ctx.capacity_adjusted_min_replicas), int(ctx.capacity_adjusted_max_replicas)
    return max(low, min(high, wanted))


def _granted(ctx: Any) -> int | None:
    """The least that any running replica reported last; None when none did."""
    series_by_replica = (ctx.raw_metrics or {}).get("granted") or {}
    values = [series[-1] for series in series_by_replica.values() if series]
    numbers = [float(getattr(value, "value", value)) for value in values]
    return int(min(numbers)) if numbers else None

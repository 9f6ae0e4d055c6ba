"""Waiting for a model to come into memory, with the reason and the progress on a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from serve_app.cli.client import Client, model_path
from serve_app.cli.run import clean
from serve_app.domain.errors import DeadlineExceeded, ModelLoadFailed

LOADED = frozenset({"ready", "busy"})
HOPELESS = frozenset({"failed", "unavailable"})
LOOK_EVERY_S = 0.5


def until_loaded(
    client: Client,
    answer: Mapping[str, Any],
    timeout_s: float,
    sleep: Callable[[float], None],
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:
    """Look again and again until the model of a load command's answer is loaded; ``{model, state, reason}`` then.

    Raises:
        ModelLoadFailed: it cannot be loaded. DeadlineExceeded: it was not within the time; it may still be.
    """
    state = dict(answer)
    deadline = clock() + timeout_s
    console = Console(stderr=True, highlight=False)
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as shown:
        task = shown.add_task(_label(state), total=None)
        while state.get("state") not in LOADED:
            if state.get("state") in HOPELESS:
                raise ModelLoadFailed(str(state.get("reason") or f"{state.get('model')} cannot be loaded."))
            if clock() > deadline:
                raise DeadlineExceeded(
                    f"{state.get('model')} was not loaded within {timeout_s:g} s; it is {state.get('state')}."
                )
            sleep(LOOK_EVERY_S)
            item = client.get(model_path(str(answer["model"])))
            state = {"model": item.get("name"), "state": item.get("state"), "reason": item.get("reason")}
            known = item.get("progress")
            shown.update(task, description=_label(state), total=known and 1.0, completed=known or 0.0)
    return state


def _label(state: Mapping[str, Any]) -> str:
    reason = f" ({state['reason']})" if state.get("reason") else ""
    return clean(f"{state.get('model')}: {state.get('state')}{reason}")

"""``rotunda rotation``: which memory models hold, who waits for some, and what was decided."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from serve_app.cli.run import DEFAULT_URL, ApiKey, Json, Url, clean, guarded, outside, print_json, size, table

Row = Mapping[str, Any]


@guarded
def rotation(
    context: typer.Context,
    history: Annotated[int, typer.Option("--history", min=0, max=500, help="Show so many of the last decisions.")] = 10,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """Show what memory there is, which models hold it, who waits for some, and what was decided."""
    with outside(context).client(url, api_key) as client:
        answer = client.get(f"/api/rotation?history={history}")
    if as_json:
        return print_json(answer)
    _section("NODES", answer["nodes"], ("NODE", "PROVIDER", "MEMORY", "USED", "FREE", "CPU", "GPU"), _node)
    _section(
        "MODELS", answer["residents"], ("MODEL", "STATE", "REPLICAS", "MEMORY", "RUNNING", "SINCE", "REASON"), _resident
    )
    _section(
        "WAITING", answer["queue"], ("POSITION", "MODEL", "PRIORITY", "CALLER", "WAITED", "ETA", "REASON"), _waiting
    )
    _section("FAILED", answer["failures"], ("MODEL", "CODE", "FAILURES", "NEXT TRY", "MESSAGE"), _failure)
    _section("DECISIONS", answer["history"], ("AT", "ACTION", "MODEL", "VICTIMS", "TOOK", "REASON"), _decision)
    if answer["removed"]:
        typer.echo(clean(f"Not in the pool: {', '.join(answer['removed'])}"))


def _section(title: str, rows: Sequence[Row], headings: Sequence[str], cells: Any) -> None:
    if rows:
        typer.echo(title)
        table(headings, [cells(row) for row in rows])
        typer.echo()


def _node(row: Row) -> tuple[object, ...]:
    total, used, free = row["total"], row["used"], row["free"]
    memory = (size(amount["memoryBytes"]) for amount in (total, used, free))
    processors = (f"{used[kind]:g}/{total[kind]:g}" if total[kind] is not None else "" for kind in ("cpu", "gpu"))
    return (row["name"], row["provider"], *memory, *processors)


def _resident(row: Row) -> tuple[object, ...]:
    state = f"{row['state']}, pinned" if row["pinned"] else row["state"]
    memory = size(row["held"]["memoryBytes"])
    return (row["model"], state, row["replicas"], memory, row["running"], _time(row["since"]), row["reason"])


def _waiting(row: Row) -> tuple[object, ...]:
    return (
        row["position"],
        row["model"],
        row["priority"],
        row["caller"],
        _seconds(row["waitingMs"]),
        _seconds(row["etaMs"]),
        row["reason"],
    )


def _failure(row: Row) -> tuple[object, ...]:
    return (row["model"], row["code"], row["failures"], _time(row["nextTry"]), row["message"])


def _decision(row: Row) -> tuple[object, ...]:
    victims, took = ", ".join(row["victims"]), _seconds(row["durationMs"])
    return (_time(row["at"]), row["action"], row["model"], victims, took, row["reason"])


def _time(epoch_s: float | None) -> str | None:
    return None if epoch_s is None else datetime.fromtimestamp(epoch_s, UTC).strftime("%H:%M:%S UTC")


def _seconds(milliseconds: float | None) -> str | None:
    return None if milliseconds is None else f"{milliseconds / 1000:.1f} s"

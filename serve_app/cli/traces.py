"""``rotunda trace``: where the time of a reply went, as a waterfall in the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from serve_app.cli.run import DEFAULT_URL, ApiKey, Json, Url, clean, guarded, outside, print_json, table

BAR = 40
WIDTH = 160
"""Of the output when it goes to no terminal."""
EIGHTHS = " ▏▎▍▌▋▊▉█"
SHOWN = ("rotunda.reason", "rotunda.evicting", "error.type", "rotunda.termination.reason", "rotunda.cancelled")
"""Attributes that explain a time, beside those that begin with gen_ai.usage."""


@guarded
def trace(
    context: typer.Context,
    id: Annotated[
        str | None, typer.Argument(help="Of the trace: x-trace-id, or traceId in a reply. Without it: the newest.")
    ] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """Show where the time of a reply went, or list the newest traces."""
    with outside(context).client(url, api_key) as client:
        answer = client.get("/traces?limit=20" if id is None else f"/traces/{id}")
    if as_json:
        return print_json(answer)
    if id is None:
        return _list(answer["traces"])
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDTH)
    console.print(Text(f"trace {clean(answer['traceId'])}, {answer['durationMs']:,.1f} ms"))
    console.print(_waterfall(answer))
    for span in _spans(answer["spans"]):
        for link in span[1]["links"]:
            what = link["attributes"].get("rotunda.link", "linked")
            console.print(Text(clean(f"{span[1]['name']} -> {what}: trace {link['traceId']}"), style="dim"))


def _list(traces: list[Mapping[str, Any]]) -> None:
    table(
        ("TRACE", "NAME", "MS", "SPANS", "ERROR", "SESSION"),
        [
            (
                each["traceId"],
                each["name"],
                f"{each['durationMs']:,.1f}",
                each["spans"],
                each["error"],
                each["sessionId"],
            )
            for each in traces
        ],
    )


def _waterfall(answer: Mapping[str, Any]) -> Table:
    whole = max(answer["durationMs"], 0.001)
    made = Table(box=None, padding=(0, 1), show_edge=False, header_style="dim")
    for name, justify in (("SPAN", "left"), ("MS", "right"), ("", "left"), ("ABOUT", "left")):
        made.add_column(name, justify=justify, no_wrap=name != "ABOUT")  # type: ignore[arg-type]
    for depth, span in _spans(answer["spans"]):
        style = "red" if span["status"] == "error" else {0: "bold", 1: ""}.get(depth, "")
        made.add_row(
            Text("  " * depth + clean(span["name"]), style),
            f"{span['durationMs']:,.1f}",
            Text(bar(span["startMs"] / whole, span["durationMs"] / whole), "red" if style == "red" else "cyan"),
            Text(clean(_about(span)), "dim"),
        )
    return made


def _spans(spans: list[Mapping[str, Any]], depth: int = 0) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for span in spans:
        yield depth, span
        yield from _spans(span["children"], depth + 1)


def bar(start: float, length: float) -> str:
    """A bar of a waterfall; ``start`` and ``length`` are fractions of its width. It is never invisible."""
    first, last = start * BAR, min((start + length) * BAR, BAR)
    begin = min(int(first), BAR - 1)
    full = int(last) - begin
    if full < 1:
        return " " * begin + (EIGHTHS[max(1, round((last - first) * 8))] if last - first < 1 else EIGHTHS[8])
    return " " * begin + EIGHTHS[8] * full + EIGHTHS[round((last % 1) * 8)].strip()


def _about(span: Mapping[str, Any]) -> str:
    attributes = span["attributes"]
    told = [f"{_value(attributes[name])}" for name in SHOWN if attributes.get(name) not in (None, "", [])]
    told += [f"{name.split('.')[-1]} {value}" for name, value in attributes.items() if name.startswith("gen_ai.usage")]
    return ", ".join(told)


def _value(value: Any) -> str:
    if value is True:
        return "cancelled"
    return "evicting " + ", ".join(value) if isinstance(value, list) else str(value)

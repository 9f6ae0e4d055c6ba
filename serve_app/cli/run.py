"""How every command runs: what it may touch, what it prints, and how it fails."""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ParamSpec

import httpx
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from serve_app.cli.client import Client
from serve_app.domain.errors import AccessError, InvalidConfig, InvalidInput, NotFound, RotundaError

BAD_INPUT, FAILURE, INTERRUPTED = 2, 1, 130
P = ParamSpec("P")
_PIPE_WIDTH = 10_000

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Url = Annotated[str, typer.Option("--url", envvar="ROTUNDA_URL", help="Address of the server.")]
ApiKey = Annotated[
    str | None,
    typer.Option("--api-key", envvar="ROTUNDA_API_KEY", show_default=False, help="Key, when the server asks for one."),
]
DEFAULT_URL = "http://127.0.0.1:8000"


@dataclass
class Outside:
    """What a command touches beyond its arguments; tests put their own into ``ctx.obj``."""

    transport: httpx.BaseTransport | None = None
    sleep: Callable[[float], None] = time.sleep
    interactive: Callable[[], bool] = lambda: sys.stdin.isatty()

    def client(self, url: str, api_key: str | None) -> Client:
        return Client(url, api_key, self.transport)


def outside(context: typer.Context) -> Outside:
    """What was put into the context, or the real world."""
    return context.ensure_object(Outside)


def guarded(command: Callable[P, None]) -> Callable[P, None]:
    """End ``command`` with one readable line and an exit code instead of a traceback."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except RotundaError as error:
            report(error, bool(kwargs.get("as_json")))
            raise typer.Exit(exit_code(error)) from None
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None

    return run


def exit_code(error: RotundaError) -> int:
    """2 for what the caller can mend, 1 for what failed."""
    return BAD_INPUT if isinstance(error, InvalidInput | InvalidConfig | NotFound | AccessError) else FAILURE


def report(error: RotundaError, as_json: bool) -> None:
    """Say what went wrong, on the error stream."""
    if as_json:
        typer.echo(json.dumps({"error": error.to_dict()}, ensure_ascii=False), err=True)
    else:
        typer.echo(clean(error.message), err=True)


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def warn(sentences: Iterable[str]) -> None:
    for sentence in sentences:
        typer.echo(f"warning: {clean(sentence)}", err=True)


def clean(text: str) -> str:
    """Text from elsewhere without the control characters that steer a terminal."""
    safe = text.encode("utf-8", "replace").decode("utf-8")
    return "".join(char for char in safe if char in "\n\t" or char.isprintable() or ord(char) > 0x9F)


def table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print aligned columns; None is shown as a dash. Narrowed to the terminal, never when piped."""
    grid = Table(*headings, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        grid.add_row(*(Text("-" if cell is None or cell == "" else clean(str(cell))) for cell in row))
    console = Console(highlight=False)
    if console.is_terminal:
        return console.print(grid)
    console.width = _PIPE_WIDTH
    with console.capture() as written:
        console.print(grid)
    for line in written.get().splitlines():
        typer.echo(line.rstrip())


def size(count: int | None) -> str | None:
    """Bytes for people, in decimal units.

    >>> size(1_234_567)
    '1.2 MB'
    """
    if count is None:
        return None
    value, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while value >= 999.95 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.0f} {units[0]}" if units[0] == "B" else f"{value:.1f} {units[0]}"

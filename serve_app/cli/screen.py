"""Where a reply is shown: its text on standard output, everything about it on the error stream."""

from __future__ import annotations

from types import TracebackType
from typing import Self

import typer
from rich.console import Console
from rich.status import Status
from rich.text import Text

from serve_app.cli.run import clean


class Screen:
    """Shows one reply; use it as a context manager. The spinner appears on a terminal only.

    Args:
        silent: show nothing.
    """

    def __init__(self, silent: bool = False) -> None:
        self._silent = silent
        self._console = Console(stderr=True, highlight=False)
        self._spinner: Status | None = None
        self._open_line = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop()
        self._end_line()

    def waiting(self, reason: str) -> None:
        """Why nothing comes yet, beside a spinner."""
        if self._silent or not self._console.is_terminal:
            return
        self._end_line()
        label = Text(clean(reason))
        if self._spinner is None:
            self._spinner = self._console.status(label)
            self._spinner.start()
        else:
            self._spinner.update(label)

    def text(self, text: str) -> None:
        """More of the reply."""
        if self._silent or not text:
            return
        self._stop()
        shown = clean(text)
        typer.echo(shown, nl=False)
        self._open_line = not shown.endswith("\n")

    def restart(self, kept: str) -> None:
        """What was shown beyond ``kept`` is void: say so, and show the whole again."""
        self.note("The end of this reply was lost; it is shown again.")
        self.text(kept)

    def note(self, sentence: str) -> None:
        """A remark about the reply."""
        if self._silent:
            return
        self._stop()
        self._end_line()
        typer.echo(f"[{clean(sentence)}]", err=True)

    def _stop(self) -> None:
        if self._spinner is not None:
            self._spinner.stop()
            self._spinner = None

    def _end_line(self) -> None:
        if self._open_line:
            typer.echo()
            self._open_line = False

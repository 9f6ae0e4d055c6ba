"""All commands in one place, and the entry point."""

from __future__ import annotations

import logging
import sys
from importlib.metadata import version
from typing import Annotated

import typer

from serve_app.cli import bench, chat, models, pull, rotation, traces
from serve_app.cli.database import db
from serve_app.cli.run import FAILURE
from serve_app.cli.settings import config

app = typer.Typer(
    name="rotunda",
    help="Serve many language models from one Ray cluster, and talk to them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(version("rotunda"))
        raise typer.Exit


@app.callback()
def _common(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    # The commands say themselves what the reader needs; without this, Python prints log records to the terminal.
    logging.getLogger("serve_app").addHandler(logging.NullHandler())


app.command("models")(models.models)
app.command("ps")(models.ps)
app.command("load")(models.load_model)
app.command("unload")(models.unload)
app.command("pin")(models.pin)
app.command("plan")(models.plan)
app.command("rotation")(rotation.rotation)
app.command("pull")(pull.pull)
app.command("chat")(chat.chat)
app.command("trace")(traces.trace)
app.command("bench")(bench.bench)
app.add_typer(config, name="config")
app.add_typer(db, name="db")


def main() -> None:
    """The program ``rotunda``."""
    try:
        app()
    except Exception as error:  # the process boundary: one line for the reader, never a traceback
        typer.echo(f"rotunda: this is a fault in the program ({type(error).__name__}: {error}).", err=True)
        sys.exit(FAILURE)

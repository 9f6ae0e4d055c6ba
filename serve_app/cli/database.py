"""``rotunda db``: the schema of the store."""

from __future__ import annotations

import typer

from serve_app.cli.run import Json, guarded, print_json, warn
from serve_app.config import Settings, load

db = typer.Typer(help="The schema of the database (DATABASE_URL).", no_args_is_help=True)


def _settings() -> Settings:
    loaded = load()
    warn(loaded.warnings)
    return loaded.settings


@db.command()
@guarded
def upgrade(as_json: Json = False) -> None:
    """Bring the database up to date, creating it when it is a missing SQLite file."""
    from serve_app.store import migrate  # SQLAlchemy and Alembic; the other commands start without them

    url = _settings().database_url
    before = migrate.current(url.get_secret_value())
    migrate.upgrade(url.get_secret_value())
    after = migrate.current(url.get_secret_value())
    if as_json:
        return print_json({"url": str(url), "before": before, "current": after})
    step = "already at" if before == after else f"from {before or 'nothing'} to"
    typer.echo(f"{url}: {step} revision {after}.")


@db.command()
@guarded
def current(as_json: Json = False) -> None:
    """Show the revision of the database and the one that this version needs."""
    from serve_app.store import migrate

    url = _settings().database_url
    found, needed = migrate.current(url.get_secret_value()), migrate.head()
    if as_json:
        return print_json({"url": str(url), "current": found, "head": needed})
    advice = "" if found == needed else " Run `rotunda db upgrade`."
    typer.echo(f"{url}: revision {found or 'none'}, needed {needed}.{advice}")

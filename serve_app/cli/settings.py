"""``rotunda config``: the configuration judged and shown before a server runs with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from serve_app.cli.run import BAD_INPUT, Json, guarded, print_json, table, warn
from serve_app.config import (
    DOTENV,
    PLATFORM,
    SETTINGS,
    Loaded,
    ServeFile,
    check_exposure,
    load,
    read_models,
    read_serve_file,
)
from serve_app.config.consistency import contradictions
from serve_app.config.redaction import MASK
from serve_app.config.report import invalid
from serve_app.config.table import plain
from serve_app.domain.errors import InvalidConfig

config = typer.Typer(help="Check, show and document the configuration.", no_args_is_help=True)
SERVE_FILE = Path("serve_config.yaml")
Result = TypeVar("Result")

ServeConfig = Annotated[
    Path | None,
    typer.Option("--serve-config", help="What is deployed. Default: serve_config.yaml, when there is one."),
]
PlatformFile = Annotated[
    Path | None,
    typer.Option("--platform", help="Platform file. Default: that of the gateway's args, else configs/platform.yaml."),
]
EnvFile = Annotated[Path, typer.Option("--env-file", help="File of environment variables.")]


@config.command()
@guarded
def check(
    serve_config: ServeConfig = None, platform: PlatformFile = None, env_file: EnvFile = DOTENV, as_json: Json = False
) -> None:
    """Validate the environment, .env, the platform file, configs/models and serve_config.yaml. Exit code 2 when wrong.

    The environment is that of this command; Ray's processes have that of `ray start`.
    """
    problems: list[str] = []
    file = serve_config or (SERVE_FILE if SERVE_FILE.exists() else None)
    served = _collect(problems, lambda: read_serve_file(file)) if file else None
    loaded = _collect(problems, lambda: _load(served, platform, env_file))
    home = loaded.settings.rotunda_home if loaded else Path()
    _collect(problems, lambda: read_models(home / "configs/models"))
    warnings = list(loaded.warnings) if loaded else []
    if served and loaded:
        warnings += _collect(problems, lambda: check_exposure(served.host, loaded.settings)) or ()
        problems += contradictions(served, loaded)
    if as_json:
        print_json({"ok": not problems, "problems": problems, "warnings": warnings})
        raise typer.Exit(BAD_INPUT if problems else 0)
    warn(warnings)
    if problems:
        raise invalid(problems)
    typer.echo(f"The configuration is valid ({_extent(served, file)}).")


def _load(served: ServeFile | None, platform: Path | None, env_file: Path) -> Loaded:
    gateway = served.gateway if served else None
    named = platform or (gateway.platform_path() if gateway else None) or PLATFORM
    return load(dotenv=env_file, platform=named, args=gateway.settings if gateway else None)


def _collect(problems: list[str], step: Callable[[], Result]) -> Result | None:
    """The result of ``step``; None when it found problems, which join the others."""
    try:
        return step()
    except InvalidConfig as error:
        problems.extend(error.details.get("problems", [error.message]))
        return None


def _extent(served: ServeFile | None, file: Path | None) -> str:
    if not served:
        return "no serve_config.yaml was read"
    return f"{file}: {len(served.models)} models, {len(served.upstreams)} upstreams"


@config.command()
@guarded
def show(
    serve_config: ServeConfig = None, platform: PlatformFile = None, env_file: EnvFile = DOTENV, as_json: Json = False
) -> None:
    """Print every setting with the place that it comes from. Secrets are left out."""
    file = serve_config or (SERVE_FILE if SERVE_FILE.exists() else None)
    loaded = _load(read_serve_file(file) if file else None, platform, env_file)
    warn(loaded.warnings)
    rows = [(row.name, _shown(loaded, row.field, row.secret), loaded.sources[row.field]) for row in SETTINGS]
    if as_json:
        return print_json({name: {"value": value, "source": source} for name, value, source in rows})
    table(("SETTING", "VALUE", "SOURCE"), rows)


def _shown(loaded: Loaded, field: str, secret: bool) -> str | None:
    value: Any = getattr(loaded.settings, field)
    if secret:
        return MASK if value else None
    return plain(value) or None


@config.command()
@guarded
def docs(
    root: Annotated[Path, typer.Option("--root", help="The repository.")] = Path("."),
    verify: Annotated[bool, typer.Option("--check", help="Write nothing; fail when something is stale.")] = False,
) -> None:
    """For developers: write the generated parts of docs/, .env.example and configs/schema.json."""
    from serve_app.cli.reference import generated

    stale = [path for path, text in generated(root).items() if not path.exists() or path.read_text("utf-8") != text]
    if verify and stale:
        names = ", ".join(str(path.relative_to(root)) for path in stale)
        raise InvalidConfig(f"Stale: {names}. Run `rotunda config docs`.")
    for path, text in generated(root).items():
        if path in stale:
            path.write_text(text, encoding="utf-8")
            typer.echo(f"wrote {path}")

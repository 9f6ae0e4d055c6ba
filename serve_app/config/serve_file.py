"""``serve_config.yaml`` judged before it is deployed: every application's arguments, names, routes and secrets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from serve_app.config.args import NEVER_SECRETS, Args, GatewayArgs, ModelArgs, UpstreamArgs
from serve_app.config.platform import read_yaml
from serve_app.config.redaction import looks_like_secret_value, looks_secret, secrets_in
from serve_app.config.report import invalid, problems_of

KINDS: Mapping[str, type[Args]] = {
    "deployments.gateway": GatewayArgs,
    "deployments.model": ModelArgs,
    "deployments.upstream": UpstreamArgs,
}
"""The module of a builder (``import_path`` up to the colon) and what it takes."""

DEFAULT_HOST = "0.0.0.0"
DEFAULT_PORT = 8000
"""What Serve listens on when the file does not say."""


@dataclass(frozen=True, slots=True)
class ServeFile:
    """What a valid file declares. ``host`` and ``port`` are where the HTTP server listens."""

    host: str
    port: int
    gateway: GatewayArgs
    models: tuple[ModelArgs, ...]
    upstreams: tuple[UpstreamArgs, ...]


def read_serve_file(path: Path) -> ServeFile:
    """Validate the file; raises ``InvalidConfig`` with everything that is wrong with our part of it.

    Serve checks the rest (resources, deployment options) itself.
    """
    data = read_yaml(path)
    applications = data.get("applications") if isinstance(data, dict) else None
    if not isinstance(applications, list) or not all(isinstance(each, dict) for each in applications):
        raise invalid([f"{path}: it holds no list of applications."])
    problems: list[str] = []
    parsed = [_arguments(each, f"{path}: {_title(each)}", problems) for each in applications]
    for each in applications:
        problems.extend(_leaks(each, f"{path}: {_title(each)}"))
    pairs = list(zip(applications, parsed, strict=True))
    problems.extend(f"{path}: {problem}" for problem in _structure(pairs))
    if problems:
        raise invalid(problems)
    options = data.get("http_options") or {}
    return ServeFile(
        host=str(options.get("host", DEFAULT_HOST)),
        port=int(options.get("port", DEFAULT_PORT)),
        gateway=next((args for args in parsed if isinstance(args, GatewayArgs)), GatewayArgs()),
        models=tuple(args for args in parsed if isinstance(args, ModelArgs)),
        upstreams=tuple(args for args in parsed if isinstance(args, UpstreamArgs)),
    )


def _title(application: Mapping[str, Any]) -> str:
    return f"application {application.get('name') or application.get('import_path') or 'without a name'}"


def _arguments(application: Mapping[str, Any], where: str, problems: list[str]) -> Args | None:
    kind = KINDS.get(str(application.get("import_path", "")).partition(":")[0])
    if kind is None:
        return None
    try:
        return kind.model_validate(application.get("args") or {})
    except ValidationError as error:
        problems.extend(problems_of(error, kind, f"{where}: args"))
        return None


def _leaks(application: Mapping[str, Any], where: str) -> Iterator[str]:
    """Secrets outside the arguments of ours, which refuse them by themselves; Serve's REST API shows all of these."""
    known = str(application.get("import_path", "")).partition(":")[0] in KINDS
    places = {} if known else {"args": application.get("args")}
    places["runtime_env"] = application.get("runtime_env")
    for deployment in application.get("deployments") or []:
        if isinstance(deployment, dict):
            name = deployment.get("name", "?")
            places[f"deployment {name}: user_config"] = deployment.get("user_config")
            places[f"deployment {name}: ray_actor_options"] = deployment.get("ray_actor_options")
    for place, value in places.items():
        found = sorted({*secrets_in(value), *_secret_variables(value)})
        if found:
            yield f"{where}: {place}: {NEVER_SECRETS} ({', '.join(found)})."


def _secret_variables(value: Any) -> list[str]:
    """Environment variables of a runtime_env whose value is a secret by our own table of settings."""
    nested = value.get("env_vars") if isinstance(value, dict) else None
    runtime_env = value.get("runtime_env") if isinstance(value, dict) else None
    names = [
        f"env_vars.{name}"
        for name, content in (nested or {}).items()
        if looks_secret(str(name)) or looks_like_secret_value(content)
    ]
    return names + [f"runtime_env.{name}" for name in _secret_variables(runtime_env)] if runtime_env else names


def _structure(pairs: list[tuple[Mapping[str, Any], Args | None]]) -> Iterator[str]:
    yield from _twice("applications are called", [application.get("name") for application, _ in pairs])
    yield from _twice("applications have the route", [_route(application) for application, _ in pairs])
    yield from _twice("applications serve the model", [args.model for _, args in pairs if isinstance(args, ModelArgs)])
    yield from _twice(
        "models have the alias",
        [alias for _, args in pairs if isinstance(args, ModelArgs) for alias in args.aliases],
    )
    yield from _twice(
        "applications are the provider", [args.provider for _, args in pairs if isinstance(args, UpstreamArgs)]
    )
    for application, args in pairs:
        if isinstance(args, ModelArgs | UpstreamArgs):
            yield from _behind_the_gateway(application, args)


def _route(application: Mapping[str, Any]) -> Any:
    return application.get("route_prefix", "/")


def _twice(words: str, values: list[Any]) -> Iterator[str]:
    given = [value for value in values if value is not None]
    for value in sorted({str(value) for value in given if given.count(value) > 1}):
        yield f"several {words} {value}."


def _behind_the_gateway(application: Mapping[str, Any], args: ModelArgs | UpstreamArgs) -> Iterator[str]:
    prefix = "model-" if isinstance(args, ModelArgs) else "upstream-"
    if not str(application.get("name")).startswith(prefix):
        yield f"{_title(application)}: its name must begin with {prefix}, for instance {args.application_name}."
    if _route(application) is not None:
        yield f"{_title(application)}: write route_prefix: null, because only the gateway answers HTTP."

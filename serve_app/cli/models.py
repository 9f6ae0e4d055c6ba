"""``rotunda models``, ``ps``, ``load``, ``unload``, ``pin`` and ``plan``: which models there are and what they hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from serve_app.cli.client import model_path
from serve_app.cli.run import (
    DEFAULT_URL,
    ApiKey,
    Json,
    Url,
    clean,
    guarded,
    outside,
    print_json,
    size,
    table,
    warn,
)
from serve_app.cli.waiting import until_loaded
from serve_app.config import load
from serve_app.domain.catalog import ModelInfo

Model = Annotated[str, typer.Argument(help="Name, alias or provider/name of the model.", show_default=False)]
_AT_REST = frozenset({"cold", "failed", "unavailable"})


@guarded
def models(
    context: typer.Context,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    local: Annotated[bool, typer.Option("--local", help="Look into the model store, without a server.")] = False,
    as_json: Json = False,
) -> None:
    """List the models, of a server or (--local) of the model store."""
    if local:
        return _local_models(as_json)
    with outside(context).client(url, api_key) as client:
        answer = client.get("/api/models")
    if as_json:
        return print_json(answer)
    items = answer.get("items", [])
    table(
        ("NAME", "PROVIDER", "STATE", "CAPABILITIES", "SIZE", "CONTEXT", "REASON"),
        [
            (
                item.get("name"),
                item.get("provider"),
                _state(item),
                " ".join(item.get("capabilities") or ()),
                size(item.get("sizeBytes")),
                item.get("contextLength"),
                item.get("reason"),
            )
            for item in items
        ],
    )
    if not items:
        typer.echo("No models. Put one below the model store: an org/name folder with its files.", err=True)
    warn(f"{each['name']}: {each.get('error') or each.get('status')}" for each in _troubled(answer))


def _troubled(answer: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [provider for provider in answer.get("providers", ()) if provider.get("error")]


def _state(item: Mapping[str, Any]) -> str:
    return f"{item.get('state')}, pinned" if item.get("pinned") else str(item.get("state"))


def _local_models(as_json: bool) -> None:
    from serve_app.engines.discovery import discover  # reads tensors' headers; the other commands start without it

    loaded = load()
    warn(loaded.warnings)
    found = discover(loaded.settings.hf_model_path, loaded.settings.hf_default_task)
    if as_json:
        return print_json({"store": str(loaded.settings.hf_model_path), "models": [_info(info) for info in found]})
    table(
        ("ID", "TASK", "ARCHITECTURE", "CAPABILITIES", "SIZE", "CONTEXT", "PROBLEM"),
        [
            (
                info.id,
                info.task,
                info.architecture,
                " ".join(sorted(info.capabilities)),
                size(info.size_bytes),
                info.context_length,
                info.problem,
            )
            for info in found
        ],
    )
    if not found:
        typer.echo(f"No models in {loaded.settings.hf_model_path}.", err=True)


def _info(info: ModelInfo) -> dict[str, Any]:
    return {
        "id": info.id,
        "task": info.task,
        "architecture": info.architecture,
        "parameters": info.parameters,
        "capabilities": sorted(info.capabilities),
        "sizeBytes": info.size_bytes,
        "dtype": info.dtype,
        "contextLength": info.context_length,
        "quantization": info.quantization,
        "problem": info.problem,
        "problemCode": info.problem_code,
    }


@guarded
def ps(context: typer.Context, url: Url = DEFAULT_URL, api_key: ApiKey = None, as_json: Json = False) -> None:
    """Show which models hold memory or are on their way, and what they do."""
    with outside(context).client(url, api_key) as client:
        answer = client.get("/api/models")
    active = [item for item in answer.get("items", []) if item.get("state") not in _AT_REST]
    if as_json:
        return print_json({"items": active})
    table(
        ("NAME", "PROVIDER", "STATE", "REPLICAS", "RUNNING", "WAITING", "MEMORY", "ENGINE"),
        [
            (
                item.get("name"),
                item.get("provider"),
                _state(item),
                item.get("replicas"),
                item.get("running"),
                item.get("waiting"),
                size(item.get("memoryBytes")),
                item.get("engine"),
            )
            for item in active
        ],
    )


@guarded
def load_model(
    context: typer.Context,
    model: Model,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Return when it is loaded, or at once.")] = True,
    timeout: Annotated[float, typer.Option("--timeout", min=0, help="Wait for so many seconds at most.")] = 600,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """Bring a model into memory before anyone asks for it."""
    world = outside(context)
    with world.client(url, api_key) as client:
        answer = client.post(model_path(model, "load"))
        _print_answer(until_loaded(client, answer, timeout, world.sleep) if wait else answer, as_json)


@guarded
def unload(
    context: typer.Context, model: Model, url: Url = DEFAULT_URL, api_key: ApiKey = None, as_json: Json = False
) -> None:
    """Let a model leave memory once its running replies have ended."""
    with outside(context).client(url, api_key) as client:
        _print_answer(client.post(model_path(model, "unload")), as_json)


@guarded
def pin(
    context: typer.Context,
    model: Model,
    off: Annotated[bool, typer.Option("--off", help="Unpin instead.")] = False,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """Keep a model in memory, however long nobody asks for it."""
    with outside(context).client(url, api_key) as client:
        _print_answer(client.post(model_path(model, "pin"), {"pinned": not off}), as_json)


@guarded
def plan(
    context: typer.Context, model: Model, url: Url = DEFAULT_URL, api_key: ApiKey = None, as_json: Json = False
) -> None:
    """Say whether a model would find room, without doing anything."""
    with outside(context).client(url, api_key) as client:
        _print_answer(client.get(model_path(model, "plan")), as_json)


def _print_answer(answer: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        return print_json(answer)
    for name, value in answer.items():
        text = _text(value)
        if text:
            typer.echo(clean(f"{name}: {text}"))


def _text(value: Any) -> str:
    """A value of an answer for people: lists joined, resources and parts of memory with their units."""
    if isinstance(value, list):
        return ", ".join(str(part) for part in value)
    if not isinstance(value, Mapping):
        return "" if value is None else str(value)
    if "memoryBytes" in value:
        amounts = [f"{value[kind]:g} {kind.upper()}" for kind in ("cpu", "gpu") if value.get(kind)]
        return ", ".join([*amounts, size(value["memoryBytes"]) or "any memory"])
    return ", ".join(f"{part} {size(amount)}" for part, amount in value.items())

"""Every scenario of the benchmarks runs to its end and writes a result that the report can show.

The servers are stand-ins: the product's application over doubles, in this process. What is measured here means nothing;
that each scenario asks, counts and writes rightly does.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from benchmarks import report
from benchmarks.machine import Quiet
from benchmarks.servers import PeerMissing, Server
from benchmarks.surfaces import SURFACES
from serve_app.config import ModelArgs
from serve_app.domain.catalog import ModelInfo
from serve_app.engines.base import EngineOptions
from serve_app.engines.scripted import ScriptedEngine
from tests.doubles import CHAT, LocalPlatform, build_services


@dataclass
class Standing:
    """What scenarios ask of a cluster."""

    url: str
    home: Path
    made: LocalPlatform

    def counted(self, figure: str, model: str) -> float:
        counters = self.made.backend.engines[model].counters()
        return {
            "rotunda_engine_tokens": counters.completion_tokens,
        }[figure]

    def model(self, name: str) -> dict[str, Any]:
        return dict(httpx.get(f"{self.url}/api/models/{name}", timeout=30).json())


@contextlib.contextmanager
def platform(
    models: Sequence[Mapping[str, Any]], folder: Path, database_url: str | None = None
) -> Iterator[tuple[str, LocalPlatform]]:
    """The URL of the application with these scripted models, in a loop and thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def make() -> tuple[LocalPlatform, str]:
        infos = [ModelInfo(str(args["model"]), "", capabilities=CHAT, context_length=1_000_000) for args in models]
        made = await build_services(folder, models=infos, database_url=database_url)
        for info, args in zip(infos, models, strict=True):
            given = {**args, "engine": "scripted"}
            made.backend.engines[info.id] = ScriptedEngine(info, EngineOptions(**ModelArgs(**given).engine_options()))
        return made, await made.serve()

    made, url = asyncio.run_coroutine_threadsafe(make(), loop).result(60)
    try:
        yield url, made
    finally:
        asyncio.run_coroutine_threadsafe(made.close(), loop).result(60)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)
        loop.close()


def processes() -> list[psutil.Process]:
    return [psutil.Process()]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Runs a scenario's ``main`` with these words, and returns its result."""
    numbers = iter(range(100))

    def folder() -> Path:
        made = tmp_path / f"platform-{next(numbers)}"
        made.mkdir()
        return made

    @contextlib.contextmanager
    def rotunda(
        models: Sequence[Mapping[str, Any]],
        *,
        surface: str = "sse",
        environment: Mapping[str, str] | None = None,
        **_: Any,
    ) -> Iterator[Server]:
        home, url = folder(), (environment or {}).get("DATABASE_URL")
        offered = models or [{"model": "lab/instant", "options": {"tokens": 16}}]
        with platform(offered, home, url) as (url, made):
            first = str(models[0]["model"]) if models else ""
            yield Server("Rotunda", url, first, SURFACES[surface], "", processes, Standing(url, home, made))  # type: ignore[arg-type]

    @contextlib.contextmanager
    def plain_serve(model: str, *, options: Mapping[str, Any] | None = None, **_: Any) -> Iterator[Server]:
        extra = dict((options or {}).get("extra", {}))
        with platform([{"model": model, "options": extra, "max_concurrency": 128}], folder()) as (url, _made):
            yield Server("plain Serve", url, model, SURFACES["completions"], "", processes)

    @contextlib.contextmanager
    def missing(*_: Any, **__: Any) -> Iterator[Server]:
        raise PeerMissing("it is not installed")
        yield

    def counted(server: Server, figure: str, model: str) -> float:
        assert isinstance(server.cluster, Standing)
        return server.cluster.counted(figure, model)

    def program(peer: str, name: str) -> str:
        raise PeerMissing("it is not installed")

    doubles = {"rotunda": rotunda, "plain_serve": plain_serve, "litellm": missing, "counted": counted}
    doubles["program"] = program

    def main(name: str, *words: str) -> dict[str, Any]:
        module = importlib.import_module(f"benchmarks.scenarios.{name}")
        for attribute, double in doubles.items():
            if hasattr(module, attribute):
                monkeypatch.setattr(module, attribute, double)
        monkeypatch.setattr("benchmarks.protocol.look", lambda seconds: Quiet(0.0, 0.0, 0.0))
        monkeypatch.setattr("sys.argv", [name, "--quick", "--rounds", "1", "--out", str(tmp_path), *words])
        module.main()
        found: dict[str, Any] = json.loads((tmp_path / f"{name}.json").read_text())
        return found

    return main


@pytest.mark.parametrize(
    ("name", "words", "rows"),
    [
        ("paced", ("--streams", "3", "--tokens", "12"), 10),
        ("hops", ("--requests", "2"), 22),
        ("replicas", (), 2),
        ("overload", (), 6),
        ("long_streams", ("--streams", "5"), 5),
        ("frames", ("--tokens", "12"), 6),
        ("cold", (), 7),
        ("gateway", ("--requests", "2"), 2),
        ("store_cost", ("--databases", "SQLite", "--tokens", "10"), 8),
        ("store_reply", ("--replies", "16"), 4),
        ("soak", ("--minutes", "0.05"), 5),
    ],
)
def test_a_scenario_runs_to_its_end(
    run: Callable[..., dict[str, Any]], name: str, words: tuple[str, ...], rows: int
) -> None:
    found = run(name, *words)
    left_out = [
        problem for problem in found["problems"] if "nothing was refused" in problem or "all streams ran" in problem
    ]
    assert len(found["rows"]) == rows - len(left_out)
    assert [row["what"] for row in found["rows"] if not math.isfinite(row["value"]["median"])] == []
    assert (found["quick"], found["publishable"]) == (True, False)
    assert all(row["what"] in report.tables({"first": [found]}) for row in found["rows"])
    counts = [row for row in found["rows"] if row["target"] == {"at_most": 0}]
    assert [row["what"] for row in counts if row["value"]["median"] > 0] == []


@pytest.mark.parametrize(("name", "words"), [("gateway", ("--requests", "2")), ("referee", ())])
def test_a_peer_that_is_not_installed_is_named_in_the_result(
    run: Callable[..., dict[str, Any]], name: str, words: tuple[str, ...]
) -> None:
    assert "it is not installed" in run(name, *words)["problems"]

"""The picture of the rotation on a terminal."""

from __future__ import annotations

import json
import math

import httpx
from typer.testing import CliRunner, Result

from serve_app.cli.app import app
from serve_app.cli.run import Outside
from serve_app.domain.catalog import ModelState
from serve_app.domain.placement import Resources
from serve_app.domain.rotation_effects import Decision
from serve_app.domain.rotation_view import FailureView, NodeView, QueueView, ResidentView, RotationView

GB = 10**9
VIEW = RotationView(
    nodes=(
        NodeView("n1", "huggingface", Resources(8, 1, 16 * GB), Resources(2.5, 1, 6 * GB), Resources(5.5, 0, 10 * GB)),
        NodeView("lab", "lab", Resources(memory=math.inf), Resources(), Resources(memory=math.inf)),
    ),
    residents=(ResidentView("m", ModelState.BUSY, ("n1",), Resources(2, 0, 6 * GB), 3, True, 1e9, None),),
    queue=(QueueView(1, "other", "high", "me", 1500, "memory is full", 2500),),
    history=(Decision(1e9, "load", "m", "asked for", ("old",), 0.25),),
    failures=(FailureView("bad", "MODEL_LOAD_FAILED", "A file is missing.", 2),),
    removed=("gone",),
)


def run(view: RotationView, *words: str, seen: list[str] | None = None) -> Result:
    def answer(request: httpx.Request) -> httpx.Response:
        if seen is not None:
            seen.append(str(request.url.raw_path.decode()))
        return httpx.Response(200, json=view.to_json())

    return CliRunner().invoke(app, ["rotation", *words], obj=Outside(httpx.MockTransport(answer)))


def test_everything_that_there_is_is_shown() -> None:
    lines = [line.split() for line in run(VIEW).stdout.splitlines()]
    assert ["n1", "huggingface", "16.0", "GB", "6.0", "GB", "10.0", "GB", "2.5/8", "1/1"] in lines
    assert ["lab", "lab", "-", "0", "B", "-", "0/0", "0/0"] in lines
    assert ["m", "busy,", "pinned", "1", "6.0", "GB", "3", "01:46:40", "UTC", "-"] in lines
    assert ["1", "other", "high", "me", "1.5", "s", "2.5", "s", "memory", "is", "full"] in lines
    assert ["bad", "MODEL_LOAD_FAILED", "2", "-", "A", "file", "is", "missing."] in lines
    assert ["01:46:40", "UTC", "load", "m", "old", "0.2", "s", "asked", "for"] in lines
    assert ["Not", "in", "the", "pool:", "gone"] in lines


def test_what_there_is_not_takes_no_room() -> None:
    assert run(RotationView()).stdout == ""


def test_json_is_the_servers_answer_as_long_as_wanted() -> None:
    seen: list[str] = []
    assert json.loads(run(VIEW, "--json", "--history", "3", seen=seen).stdout) == VIEW.to_json()
    assert seen == ["/api/rotation?history=3"]

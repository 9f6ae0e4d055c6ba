"""The commands about the fleet against the running product, as an operator types them."""

from __future__ import annotations

import json
from typing import Any

from typer.testing import CliRunner, Result

from serve_app.cli.app import app
from tests.cluster import Cluster, wait_until

MODEL = "test/scripted"


def rotunda(cluster: Cluster, *words: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [*words, "--url", cluster.url])
    assert result.exit_code == code, result.output
    return result


def answer(cluster: Cluster, *words: str) -> Any:
    return json.loads(rotunda(cluster, *words, "--json").stdout)


def gone(cluster: Cluster) -> None:
    rotunda(cluster, "unload", MODEL)
    wait_until(lambda: cluster.model(MODEL)["state"] == "cold", what="the model to be cold")


def test_a_model_is_loaded_shown_pinned_planned_and_unloaded(cluster: Cluster) -> None:
    gone(cluster)
    wait_until(lambda: answer(cluster, "plan", MODEL)["verdict"] == "fits", what="the room to be free")
    assert rotunda(cluster, "load", MODEL).stdout == f"model: {MODEL}\nstate: ready\n"
    assert cluster.model(MODEL)["state"] == "ready"
    [shown] = [item for item in answer(cluster, "ps")["items"] if item["name"] == MODEL]
    assert (shown["state"], shown["replicas"]) == ("ready", 1) and shown["engine"].startswith("scripted")
    assert f"{MODEL} " in rotunda(cluster, "ps").stdout
    plan = rotunda(cluster, "plan", MODEL).stdout
    assert "verdict: resident" in plan and "demand: " in plan
    rotunda(cluster, "pin", MODEL)
    refused = rotunda(cluster, "unload", MODEL, code=2)
    assert "is pinned" in refused.stderr and refused.stderr.count("\n") == 1
    rotunda(cluster, "pin", MODEL, "--off")
    gone(cluster)
    actions = [(one["action"], one["model"]) for one in answer(cluster, "rotation")["history"]]
    assert any(model == MODEL for _, model in actions), actions


def test_the_rotation_is_shown_with_its_rooms_and_residents(cluster: Cluster) -> None:
    rotunda(cluster, "load", MODEL)
    view = answer(cluster, "rotation")
    assert any(node["total"]["cpu"] > 0 for node in view["nodes"])
    assert MODEL in [resident["model"] for resident in view["residents"]]
    shown = rotunda(cluster, "rotation").stdout
    assert "NODES" in shown and "MODELS" in shown and "DECISIONS" in shown


def test_an_unknown_model_is_one_line_and_2(cluster: Cluster) -> None:
    for words in (["load", "nobody"], ["unload", "nobody"], ["pin", "nobody"], ["plan", "nobody"]):
        result = rotunda(cluster, *words, code=2)
        assert "nobody" in result.stderr and result.stderr.count("\n") == 1

"""Downloads from the hub: the failures that are met, in words. No hub is asked here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import pytest
from huggingface_hub import errors
from typer.testing import CliRunner, Result

from serve_app.cli.app import app
from serve_app.cli.pull import WANTED


def run(home: Path, *words: str) -> Result:
    environment = {"ROTUNDA_HOME": str(home), "HF_MODEL_PATH": "", "HF_HUB_OFFLINE": "1"}
    return CliRunner().invoke(app, ["pull", *words], env=environment)


def response(status: int) -> httpx.Response:
    return httpx.Response(status, request=httpx.Request("GET", "https://hub.example"))


@pytest.mark.parametrize("repo", ["", "..", "../x", "a/b/c", "/etc", "org/..", "-x", "org/na me", "a..b/c"])
def test_what_is_no_name_is_refused_before_anything_is_asked(tmp_path: Path, repo: str) -> None:
    result = run(tmp_path, "--", repo)
    assert result.exit_code == 2 and "is not the name of a repository" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_without_a_hub_it_says_so_and_what_to_do(tmp_path: Path) -> None:
    result = run(tmp_path, "org/name")
    assert result.exit_code == 1
    assert "The Hugging Face hub cannot be reached" in result.stderr and result.stderr.count("\n") == 1
    assert json.loads(run(tmp_path, "org/name", "--json").stderr)["error"]["code"] == "PROVIDER_UNAVAILABLE"


@pytest.mark.parametrize(
    ("raised", "code", "words"),
    [
        (errors.GatedRepoError("x", response=response(403)), 2, "is gated"),
        (errors.RepositoryNotFoundError("x", response=response(404)), 2, "no repository org/name"),
        (errors.RevisionNotFoundError("x", response=response(404)), 2, "no revision v2"),
        (errors.HfHubHTTPError("x", response=response(503)), 1, "answered 503"),
        (httpx.ConnectError("x"), 1, "cannot be reached"),
        (OSError(28, "No space left on device"), 1, "cannot be written (No space left on device)"),
    ],
)
def test_each_failure_is_one_readable_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: Exception, code: int, words: str
) -> None:
    def download(*args: Any, **kwargs: Any) -> str:
        raise raised

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    result = run(tmp_path, "org/name", "--revision", "v2")
    assert result.exit_code == code
    assert words in result.stderr and result.stderr.count("\n") == 1


def test_it_lands_in_the_model_store_and_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(repo: str, **wanted: Any) -> str:
        asked.update(wanted, repo=repo)
        wanted["local_dir"].mkdir(parents=True)
        (wanted["local_dir"] / "config.json").write_text("{}")
        return str(wanted["local_dir"])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    result = run(tmp_path, "org/name", "--json")
    target = tmp_path / "models/huggingface/org/name"
    assert (asked["repo"], asked["local_dir"], asked["allow_patterns"]) == ("org/name", target, list(WANTED))
    assert json.loads(result.stdout)["problem"] and result.exit_code == 1
    assert "it cannot be used" in json.loads(result.stderr)["error"]["message"]


def test_neither_pickles_nor_code_are_wanted() -> None:
    assert not {suffix for pattern in WANTED for suffix in (".bin", ".pt", ".py") if pattern.endswith(suffix)}

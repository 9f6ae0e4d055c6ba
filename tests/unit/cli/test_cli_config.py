"""``rotunda config`` and ``rotunda db``."""

import json
import os
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from serve_app.cli.app import app
from serve_app.config import SETTINGS

ROOT = Path(__file__).parents[3]
SERVE = """
http_options: {host: HOST}
applications:
  - {name: gateway, import_path: "deployments.gateway:build", args: {settings: {max_queue_size: 5}}}
  - {name: model-x, route_prefix: null, import_path: "deployments.model:build", args: {model: org/x, num_cpus: CPUS}}
"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for row in SETTINGS:
        monkeypatch.delenv(row.name, raising=False)
    return tmp_path


def run(*words: str, **env: str) -> Result:
    return CliRunner().invoke(app, words, env=dict(env))


def serve_file(home: Path, host: str = "127.0.0.1", cpus: str = "1") -> None:
    (home / "serve_config.yaml").write_text(SERVE.replace("HOST", host).replace("CPUS", cpus))


def test_a_valid_configuration_is_said_to_be_so(home: Path) -> None:
    assert run("config", "check").stdout == "The configuration is valid (no serve_config.yaml was read).\n"
    serve_file(home)
    result = run("config", "check")
    assert (result.exit_code, result.stdout) == (
        0,
        "The configuration is valid (serve_config.yaml: 1 models, 0 upstreams).\n",
    )


def test_everything_wrong_comes_in_one_report_with_exit_code_2(home: Path) -> None:
    serve_file(home, cpus="half")
    (home / "configs/models").mkdir(parents=True)
    (home / "configs/models/m.yaml").write_text("modle: a/b")
    (home / "configs/platform.yaml").write_text("capacty: {}")
    (home / ".env").write_text("IMAGE_MAX_PIXELS=big\n")
    result = run("config", "check", MAX_MESSAGE_CHARS="0")
    assert result.exit_code == 2
    assert result.stderr.startswith("The configuration has 6 problems:\n")
    for words in ("num_cpus = 'half'", "did you mean model?", "did you mean capacity?", "(.env)", "(environment)"):
        assert words in result.stderr


def test_check_speaks_json(home: Path) -> None:
    assert json.loads(run("config", "check", "--json").stdout) == {"ok": True, "problems": [], "warnings": []}
    result = run("config", "check", "--json", MAX_QUEUE_SIZE="x")
    answer = json.loads(result.stdout)
    assert (result.exit_code, answer["ok"], len(answer["problems"])) == (2, False, 1)


def test_an_open_server_without_keys_is_refused(home: Path) -> None:
    serve_file(home, host="0.0.0.0")
    result = run("config", "check")
    assert result.exit_code == 2
    assert "'0.0.0.0' is reachable from other machines" in result.stderr
    assert run("config", "check", API_KEYS="k" * 16, ALLOWED_HOSTS="box").exit_code == 0


def test_warnings_do_not_fail(home: Path) -> None:
    result = run("config", "check", MAX_QEUE_SIZE="5")
    assert result.exit_code == 0
    assert "warning: MAX_QEUE_SIZE" in result.stderr


def test_an_alias_means_one_model(home: Path) -> None:
    serve_file(home, cpus="1, aliases: [small]")
    (home / "configs").mkdir()
    (home / "configs/platform.yaml").write_text("aliases: {small: org/y}")
    assert "The alias small means org/y in the platform file and org/x" in run("config", "check").stderr


def test_a_model_that_can_never_fit_is_a_fault(home: Path) -> None:
    serve_file(home, cpus="4, memory_bytes: 2GB")
    (home / "configs").mkdir()
    (home / "configs/platform.yaml").write_text("capacity: {memory_bytes: 1GB, cpus: 4}")
    result = run("config", "check")
    assert result.exit_code == 2
    assert "org/x can never be loaded: its memory_bytes is 2e+09, and the platform file caps" in result.stderr
    assert "num_cpus" not in result.stderr


def test_a_named_serve_file_must_exist() -> None:
    result = run("config", "check", "--serve-config", "nowhere.yaml")
    assert result.exit_code == 2
    assert "nowhere.yaml: the file cannot be read" in result.stderr


def test_the_shipped_configuration_is_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    result = run("config", "check", "--env-file", os.devnull)
    assert (result.exit_code, result.stderr) == (0, "")


def test_show_names_the_source_of_every_value(home: Path) -> None:
    serve_file(home)
    (home / ".env").write_text("MAX_STREAM_SESSIONS=7\n")
    shown = json.loads(run("config", "show", "--json", HEARTBEAT_MS="900").stdout)
    assert list(shown) == [row.name for row in SETTINGS]
    assert shown["MAX_QUEUE_SIZE"] == {"value": "5", "source": "args"}
    assert shown["MAX_STREAM_SESSIONS"] == {"value": "7", "source": ".env"}
    assert shown["HEARTBEAT_MS"] == {"value": "900", "source": "environment"}
    assert shown["OPENAI_API_KEY"] == {"value": None, "source": "default"}
    assert shown["DATABASE_URL"]["value"] == f"sqlite+aiosqlite:///{home}/data/rotunda.db"


def test_show_is_a_table_for_people() -> None:
    lines = run("config", "show").stdout.splitlines()
    assert lines[0].split() == ["SETTING", "VALUE", "SOURCE"]
    assert re.search(r"^MAX_QUEUE_SIZE\s+256\s+default\s*$", "\n".join(lines), re.MULTILINE)
    assert len(lines) == len(SETTINGS) + 1


@pytest.mark.parametrize("words", [["config", "show"], ["config", "show", "--json"], ["config", "check"]])
def test_no_secret_is_shown(words: list[str]) -> None:
    result = run(
        *words,
        API_KEYS="hunter2hunter2hunter2",
        OPENAI_API_KEY="hunter2",
        DATABASE_URL="postgresql://u:hunter2@db/x",
        OLLAMA_HOST="http://u:hunter2@box",
    )
    assert result.exit_code == 0
    assert "hunter2" not in result.output


def test_docs_are_written_once_and_then_checked(home: Path) -> None:
    (home / "docs").mkdir()
    (home / "configs").mkdir()
    parts = "".join(f"<!-- generated: {name} -->\n<!-- end: {name} -->\n" for name in ("settings", "arguments"))
    (home / "docs/configuration.md").write_text(f"Mine.\n{parts}Mine too.\n")
    stale = run("config", "docs", "--check")
    assert stale.exit_code == 2
    assert "docs/configuration.md, docs/cli.md, .env.example, configs/schema.json" in stale.stderr
    assert run("config", "docs").stdout.count("wrote ") == 4
    assert run("config", "docs", "--check").exit_code == 0
    assert run("config", "docs").stdout == ""
    page = (home / "docs/configuration.md").read_text()
    assert page.startswith("Mine.\n")
    assert page.endswith("Mine too.\n")


def test_the_database_is_upgraded_once(home: Path) -> None:
    before = json.loads(run("db", "current", "--json").stdout)
    assert before["current"] is None
    first = run("db", "upgrade")
    assert first.exit_code == 0, first.output
    assert f"from nothing to revision {before['head']}" in first.stdout
    assert f"already at revision {before['head']}" in run("db", "upgrade").stdout
    assert json.loads(run("db", "current", "--json").stdout)["current"] == before["head"]
    assert (home / "data/rotunda.db").exists()


def test_a_database_that_cannot_be_reached_is_one_line() -> None:
    result = run("db", "upgrade", DATABASE_URL="postgresql://u:hunter2@127.0.0.1:1/x")
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert "hunter2" not in result.output

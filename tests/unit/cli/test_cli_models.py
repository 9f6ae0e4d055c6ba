"""Commands about models, against a server that is a function."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner, Result

from serve_app.cli.app import app, main
from serve_app.cli.run import Outside, clean, size

Answer = Callable[[httpx.Request], httpx.Response]
ITEM = {
    "name": "tiny-chat", "id": "rotunda/tiny-chat", "provider": "huggingface", "state": "ready", "pinned": True,
    "capabilities": ["chat", "completion"], "sizeBytes": 1_234_567, "memoryBytes": 350_000_000, "contextLength": 512,
    "replicas": 1, "running": 2, "waiting": 3, "engine": "scripted", "reason": None,
}  # fmt: skip
COLD = {**ITEM, "name": "tiny-vision", "state": "cold", "pinned": False, "reason": "not asked for yet"}
LIST = {
    "models": ["tiny-chat", "tiny-vision"],
    "count": 2,
    "items": [ITEM, COLD],
    "providers": [
        {"name": "huggingface", "status": "up", "error": None, "modelCount": 2},
        {"name": "ollama", "status": "down", "error": "connection refused", "modelCount": 0},
    ],
}


def run(answer: Answer, *words: str, env: dict[str, str] | None = None) -> Result:
    return CliRunner().invoke(app, words, obj=Outside(httpx.MockTransport(answer)), env=env)


def answering(status: int, body: Any, seen: list[httpx.Request] | None = None) -> Answer:
    def answer(request: httpx.Request) -> httpx.Response:
        if seen is not None:
            seen.append(request)
        return httpx.Response(status, json=body)

    return answer


def test_models_are_listed_with_the_providers_in_trouble() -> None:
    result = run(answering(200, LIST), "models")
    assert result.exit_code == 0
    first, second, third = result.stdout.splitlines()
    assert first.split() == ["NAME", "PROVIDER", "STATE", "CAPABILITIES", "SIZE", "CONTEXT", "REASON"]
    assert "ready, pinned" in second
    assert "1.2 MB" in second
    assert "not asked for yet" in third
    assert result.stderr == "warning: ollama: connection refused\n"


def test_json_is_the_servers_answer() -> None:
    assert json.loads(run(answering(200, LIST), "models", "--json").stdout) == LIST


def test_an_empty_list_says_what_to_do() -> None:
    assert "Put one below the model store" in run(answering(200, {"items": []}), "models").stderr


def test_ps_shows_what_holds_memory() -> None:
    lines = run(answering(200, LIST), "ps").stdout.splitlines()
    assert lines[1].split() == [
        "tiny-chat",
        "huggingface",
        "ready,",
        "pinned",
        "1",
        "2",
        "3",
        "350.0",
        "MB",
        "scripted",
    ]
    assert len(lines) == 2
    assert json.loads(run(answering(200, LIST), "ps", "--json").stdout) == {"items": [ITEM]}


@pytest.mark.parametrize(
    ("words", "method", "path", "body"),
    [
        (["load", "org/name:tag"], "POST", "/api/models/org/name:tag/load", {}),
        (["unload", "a b?c"], "POST", "/api/models/a%20b%3Fc/unload", {}),
        (["pin", "m"], "POST", "/api/models/m/pin", {"pinned": True}),
        (["pin", "m", "--off"], "POST", "/api/models/m/pin", {"pinned": False}),
        (["plan", "m"], "GET", "/api/models/m/plan", None),
    ],
)
def test_actions_ask_the_server(words: list[str], method: str, path: str, body: object) -> None:
    seen: list[httpx.Request] = []
    result = run(answering(200, {"state": "ready", "victims": ["a", "b"], "reason": None}, seen), *words)
    assert result.stdout == "state: ready\nvictims: a, b\n"
    (request,) = seen
    assert (request.method, request.url.raw_path.decode()) == (method, path)
    assert (json.loads(request.content) if request.content else None) == body


def test_a_plan_is_told_in_units() -> None:
    plan = {
        "model": "m",
        "verdict": "evicts",
        "evicts": ["a", "b"],
        "demand": {"cpu": 1, "gpu": 0, "memoryBytes": 1_500_000_000},
        "capacity": {"cpu": 4, "gpu": 1, "memoryBytes": None},
        "bytes": {"weights": 1_200_000_000, "cache": 300_000_000},
        "etaMs": None,
    }
    assert run(answering(200, plan), "plan", "m").stdout.splitlines() == [
        "model: m",
        "verdict: evicts",
        "evicts: a, b",
        "demand: 1 CPU, 1.5 GB",
        "capacity: 4 CPU, 1 GPU, any memory",
        "bytes: weights 1.2 GB, cache 300.0 MB",
    ]


def loading(*states: tuple[str, str | None]) -> tuple[Answer, list[str]]:
    """A server whose model is in these states, one at each look; the load command sees the first."""
    left, seen = list(states), list[str]()

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(f"{request.method} {request.url.path}")
        state, reason = left.pop(0) if len(left) > 1 else left[0]
        name = "model" if request.method == "POST" else "name"
        return httpx.Response(200, json={name: "org/m:1", "state": state, "reason": reason, "progress": 0.5})

    return answer, seen


def run_patiently(answer: Answer, *words: str) -> tuple[Result, list[float]]:
    slept: list[float] = []
    return CliRunner().invoke(app, words, obj=Outside(httpx.MockTransport(answer), slept.append)), slept


def test_load_waits_until_the_model_is_loaded() -> None:
    answer, seen = loading(("queued", "memory is full"), ("cold", None), ("loading", None), ("ready", None))
    result, slept = run_patiently(answer, "load", "m")
    assert (result.exit_code, result.stdout) == (0, "model: org/m:1\nstate: ready\n")
    assert seen == ["POST /api/models/m/load", *["GET /api/models/org/m:1"] * 3] and len(slept) == 3
    answer, _ = loading(("loading", None), ("busy", None))
    result, _ = run_patiently(answer, "load", "m", "--json")
    assert json.loads(result.stdout) == {"model": "org/m:1", "state": "busy", "reason": None}


def test_load_returns_at_once_when_it_is_told_to() -> None:
    answer, seen = loading(("loading", None))
    result, slept = run_patiently(answer, "load", "m", "--no-wait")
    assert (result.exit_code, len(seen), slept) == (0, 1, [])
    assert "state: loading" in result.stdout


def test_load_tells_why_a_model_cannot_be_loaded() -> None:
    answer, _ = loading(("loading", None), ("failed", "A file is missing."))
    result, _ = run_patiently(answer, "load", "m")
    assert (result.exit_code, result.stderr, result.stdout) == (1, "A file is missing.\n", "")


def test_load_does_not_wait_for_ever() -> None:
    answer, _ = loading(("queued", "memory is full"))
    result, _ = run_patiently(answer, "load", "m", "--timeout", "0")
    assert (result.exit_code, "was not loaded within 0 s" in result.stderr) == (1, True)


def test_the_key_comes_from_the_option_or_the_environment_and_is_never_shown() -> None:
    seen: list[httpx.Request] = []
    run(answering(200, LIST, seen), "models", "--api-key", "from-option")
    run(answering(200, LIST, seen), "models", env={"ROTUNDA_API_KEY": "from-env"})
    run(answering(200, LIST, seen), "models")
    assert [request.headers.get("authorization") for request in seen] == ["Bearer from-option", "Bearer from-env", None]
    assert "from-env" not in run(answering(200, LIST), "models", "--help", env={"ROTUNDA_API_KEY": "from-env"}).output


def fault(code: str, message: str) -> dict[str, Any]:
    return {"error": {"code": code, "message": message, "provider": None, "retryable": False, "traceId": "t"}}


@pytest.mark.parametrize(
    ("status", "body", "code", "words"),
    [
        (404, fault("MODEL_NOT_FOUND", "There is no model called 'x'."), 2, "There is no model called 'x'."),
        (401, fault("UNAUTHENTICATED", "A key is needed."), 2, "A key is needed. Give the key with --api-key or in"),
        (429, fault("QUEUE_FULL", "The queue is full."), 1, "The queue is full."),
        (500, fault("INTERNAL", "Something went wrong."), 1, "Something went wrong."),
        (418, fault("TEAPOT", "short and stout"), 1, "short and stout"),
        (404, {"detail": "Not Found"}, 1, "answered 404, but not as Rotunda does. Is --url right?"),
    ],
)
def test_errors_of_the_server_are_one_line_and_an_exit_code(status: int, body: Any, code: int, words: str) -> None:
    result = run(answering(status, body), "load", "x")
    assert result.exit_code == code
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
    as_json = run(answering(status, body), "load", "x", "--json")
    assert words in json.loads(as_json.stderr)["error"]["message"]


def raising(error: Exception) -> Answer:
    def answer(request: httpx.Request) -> httpx.Response:
        raise error

    return answer


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (raising(httpx.ConnectError("refused")), "No server can be reached at http://127.0.0.1:8000. Start one with"),
        (raising(httpx.ReadTimeout("slow")), "http://127.0.0.1:8000 did not answer in time."),
        (lambda request: httpx.Response(200, text="<html>"), "answered 200, but not as Rotunda does"),
    ],
)
def test_no_server_is_one_line(answer: Answer, words: str) -> None:
    result = run(answer, "ps")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert words in result.stderr


@pytest.mark.parametrize("url", ["nonsense", "ftp://host", "http://", "http://ho st:x"])
def test_a_wrong_address_is_bad_input(url: str) -> None:
    result = run(answering(200, LIST), "models", "--url", url)
    assert result.exit_code == 2
    assert "is not the address of a server" in result.stderr


def test_credentials_of_the_address_are_not_shown() -> None:
    result = run(raising(httpx.ConnectError("x")), "models", "--url", "http://user:hunter2@box:8000")
    assert "hunter2" not in result.output


def test_ctrl_c_is_130() -> None:
    assert run(raising(KeyboardInterrupt()), "models").exit_code == 130  # type: ignore[arg-type]


def test_an_unknown_option_is_2() -> None:
    assert run(answering(200, LIST), "models", "--nonsense").exit_code == 2


def test_a_fault_of_the_program_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["rotunda", "ps"])
    monkeypatch.setattr("serve_app.cli.run.Client.get", lambda *_: 1 / 0)
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 1
    error = capsys.readouterr().err
    assert "this is a fault in the program (ZeroDivisionError: division by zero)" in error
    assert "Traceback" not in error


def test_control_characters_of_others_do_not_reach_the_terminal() -> None:
    answer = {"items": [{**COLD, "reason": "\x1b[2Jgone [bold]x[/bold]"}]}
    out = run(answering(200, answer), "models").stdout
    assert "\x1b" not in out
    assert "[2Jgone [bold]x[/bold]" in out
    assert clean("a\tb\nc\r\x07\x9b2J é 👩‍🚀") == "a\tb\nc2J é 👩‍🚀"


def test_sizes_are_readable() -> None:
    assert [size(count) for count in (None, 0, 999, 1000, 999_960, 5 * 10**12, 10**16)] == [
        None, "0 B", "999 B", "1.0 kB", "1.0 MB", "5.0 TB", "10000.0 TB",
    ]  # fmt: skip


def test_local_models_need_no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "models/huggingface/org/broken"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{")
    result = run(raising(AssertionError("no call")), "models", "--local")  # type: ignore[arg-type]
    assert result.exit_code == 0
    assert "org/broken" in result.stdout
    found = json.loads(run(raising(AssertionError("no call")), "models", "--local", "--json").stdout)
    assert found["store"] == str(tmp_path / "models/huggingface")
    assert found["models"][0]["problem"]


def test_an_empty_store_says_where_it_is(tmp_path: Path) -> None:
    result = run(answering(500, {}), "models", "--local", env={"ROTUNDA_HOME": str(tmp_path)})
    assert f"No models in {tmp_path / 'models/huggingface'}." in result.stderr

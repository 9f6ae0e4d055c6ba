"""The stand-in speaks Ollama's protocol: the official client is the judge of that."""

from __future__ import annotations

from collections.abc import Iterator

import ollama
import pytest

from tests.ollama_server import Fault, OllamaServer, StandInModel


@pytest.fixture
def server() -> Iterator[OllamaServer]:
    models = (
        StandInModel("llama3:latest", capabilities=("completion", "tools"), reply="Hello <there> & you"),
        StandInModel("nomic:latest", capabilities=("embedding",)),
        StandInModel("slow:1b", reply="word " * 100, pace_s=0.02),
    )
    with OllamaServer(models, room=1) as running:
        yield running


@pytest.fixture
def client(server: OllamaServer) -> ollama.Client:
    return ollama.Client(server.url)


HELLO = [{"role": "user", "content": "hi"}]


def test_a_chat_streams(client: ollama.Client) -> None:
    chunks = list(client.chat("llama3", HELLO, stream=True))
    assert "".join(chunk.message.content or "" for chunk in chunks) == "Hello <there> & you"
    assert {chunk.message.role for chunk in chunks} == {"assistant"}
    assert (chunks[-1].done, chunks[-1].done_reason, chunks[-1].eval_count) == (True, "stop", 4)
    assert isinstance(chunks[-1].total_duration, int)


def test_a_chat_and_a_generation_come_whole_without_stream(client: ollama.Client) -> None:
    assert client.chat("llama3", HELLO, options={"num_predict": 1}).message.content == "Hello"
    assert client.generate("llama3", "hi").response == "Hello <there> & you"


def test_models_are_listed_shown_and_seen_in_memory(client: ollama.Client) -> None:
    assert [model.model for model in client.list().models] == ["llama3:latest", "nomic:latest", "slow:1b"]
    shown = client.show("llama3")
    assert shown.capabilities == ["completion", "tools"]
    assert (shown.modelinfo or {})["llama.context_length"] == 8192
    client.chat("llama3", HELLO)
    [running] = client.ps().models
    assert (running.model, running.context_length) == ("llama3:latest", 8192)
    assert running.expires_at is not None


def test_there_is_room_for_some_and_keep_alive_decides(client: ollama.Client) -> None:
    client.chat("llama3", [], keep_alive=60)
    client.chat("slow:1b", [])
    assert [model.model for model in client.ps().models] == ["slow:1b"]
    client.chat("slow:1b", [], keep_alive=0)
    assert client.ps().models == []


def test_embeddings(client: ollama.Client) -> None:
    assert client.embed("nomic", ["a", "ab"]).embeddings == [[1.0, 1.0], [2.0, 1.0]]


@pytest.mark.parametrize(
    ("model", "fault", "status", "words"),
    [
        ("none", None, 404, "not found"),
        ("nomic", None, 400, "does not support chat"),
        ("llama3", Fault("status", status=503, text="server busy"), 503, "server busy"),
        ("llama3", Fault("error", text="runner died"), -1, "runner died"),
    ],
)
def test_errors_are_what_the_client_knows(
    server: OllamaServer, client: ollama.Client, model: str, fault: Fault | None, status: int, words: str
) -> None:
    if fault is not None:
        server.faults.append(fault)
    with pytest.raises(ollama.ResponseError) as caught:
        list(client.chat(model, HELLO, stream=True))
    assert caught.value.status_code == status
    assert words in caught.value.error


def test_a_client_that_leaves_is_noticed(server: OllamaServer, client: ollama.Client) -> None:
    stream = client.chat("slow:1b", HELLO, stream=True)
    next(iter(stream))
    assert server.open == 1
    stream.close()  # type: ignore[attr-defined]
    client.list()
    assert server.left <= 1

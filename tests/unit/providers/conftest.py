"""A stand-in for Ollama and a provider that talks to it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from serve_app.providers.ollama import Ollama
from serve_app.providers.wire import Times, Wire
from tests.ollama_server import OllamaServer, StandInModel

MODELS = (
    StandInModel("llama3:8b", capabilities=("completion", "tools")),
    StandInModel("llava:7b", capabilities=("completion", "vision"), context_length=4096),
    StandInModel("nomic:latest", capabilities=("embedding",)),
)


@pytest.fixture
def server() -> Iterator[OllamaServer]:
    with OllamaServer(MODELS) as running:
        yield running


@pytest.fixture
async def ollama(server: OllamaServer) -> AsyncIterator[Ollama]:
    provider = Ollama(Wire("lab", server.url, times=Times(connect_s=1, first_token_s=1.0, idle_s=0.5, answer_s=5)))
    yield provider
    await provider.close()

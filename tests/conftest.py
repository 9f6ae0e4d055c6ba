"""Fixtures of every suite. The cluster is started once, when the first test asks for it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import httpx
import hypothesis
import pytest

from tests.cluster import MODELS, Cluster, model_application, wait_until
from tests.postgres import Postgres

# A time limit per example would judge the machine.
hypothesis.settings.register_profile("suite", deadline=None)
hypothesis.settings.load_profile("suite")

LAST = ("tests/serve", "tests/e2e", "tests/conformance")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The suites that share the cluster run last, and what ends or starts clusters of its own at the very end."""

    def rank(item: pytest.Item) -> int:
        path = item.path.as_posix()
        return 2 if item.get_closest_marker("own_cluster") else int(any(folder in path for folder in LAST))

    items.sort(key=rank)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL server of this test session; tests make databases on it."""
    server = Postgres()
    server.start()
    yield server
    server.remove()


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The whole product on a Ray cluster: two ingresses, the shipped models, and two scripted ones."""
    applications = [
        model_application("model-tiny-chat", model="rotunda/tiny-chat"),
        model_application("model-tiny-vision", model="rotunda/tiny-vision"),
        model_application("model-scripted", model="test/scripted", engine="scripted", options={"tokens": 8}),
        model_application("model-slow", model="test/slow", engine="scripted", options={"tokens": 500, "pace": 0.02}),
        *(
            model_application(
                f"model-{name}",
                model=f"test/{name}",
                engine="scripted",
                max_concurrency=64,
                max_tokens=1_000_000,
                frames=framed,
            )
            for name, framed in (("framed", True), ("apart", False))
        ),
    ]
    made = Cluster(tmp_path_factory.mktemp("cluster"), applications)
    shutil.copytree(MODELS / "rotunda", made.models / "rotunda")
    try:
        made.start()
        wait_until(lambda: httpx.get(f"{made.url}/ready", timeout=30).status_code == 200, 30, what="/ready")
        yield made
    finally:
        assert made.stop() == 0, made.log

"""Fixtures of every suite. The cluster is started once, when the first test asks for it, and ends after the last."""

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
SHARED = pytest.StashKey[Cluster]()
"""The shared cluster, while it runs."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The suites that share the cluster run last, and after them what starts clusters of its own: first the modules
    that want the shared one beside theirs."""
    beside = {item.path for item in items if _starts_its_own(item) and _wants_the_shared(item)}

    def rank(item: pytest.Item) -> int:
        if _starts_its_own(item):
            return 2 if item.path in beside else 3
        return int(any(folder in item.path.as_posix() for folder in LAST))

    items.sort(key=rank)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """The shared cluster ends when no later test wants it: those with clusters of their own have the machine to
    themselves."""
    stash, items = item.session.stash, item.session.items
    if SHARED in stash and not any(map(_wants_the_shared, items[items.index(item) :])):
        shared = stash[SHARED]
        del stash[SHARED]
        assert shared.stop() == 0, shared.log


def _starts_its_own(item: pytest.Item) -> bool:
    return item.get_closest_marker("own_cluster") is not None


def _wants_the_shared(item: pytest.Item) -> bool:
    return "cluster" in getattr(item, "fixturenames", ())


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL server of this test session; tests make databases on it."""
    server = Postgres()
    server.start()
    yield server
    server.remove()


@pytest.fixture(scope="session")
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
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
    with made.running():
        wait_until(lambda: httpx.get(f"{made.url}/ready", timeout=30).status_code == 200, 30, what="/ready")
        request.session.stash[SHARED] = made
        yield made

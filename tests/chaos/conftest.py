"""One cluster for all fault tests; its store lies on a small file system of its own, where one can be mounted."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.scene import MODEL, PACE, SETTLE_S, SLOTS, database, normal
from tests.chaos.upstream import BadUpstream
from tests.cluster import Cluster, model_application, wait_until


@pytest.fixture(scope="session")
def upstream() -> Iterator[BadUpstream]:
    with BadUpstream() as made:
        yield made


@pytest.fixture(scope="session")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the store lies: 64 MiB that nothing else uses; a plain folder for a user who may not mount."""
    folder = tmp_path_factory.mktemp("chaos") / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        yield folder
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="session")
def chaos(disk: Path, upstream: BadUpstream) -> Iterator[Cluster]:
    home = disk.parent
    args = {"provider": "bad", "kind": "openai", "base_url": upstream.url}
    applications = [
        model_application(
            "model-chaos", model=MODEL, engine="scripted", min_replicas=2, max_replicas=2, max_concurrency=SLOTS,
            max_queue=SLOTS, options={"pace": PACE, "tokens": 1_000_000},
        ),
        {"name": "upstream-bad", "route_prefix": None, "import_path": "deployments.upstream:build", "args": args},
    ]  # fmt: skip
    made = Cluster(home, applications)
    made.environment["DATABASE_URL"] = f"sqlite+aiosqlite:///{database(made)}"
    made.start()
    try:
        wait_until(lambda: normal(made), SETTLE_S, 1.0, "the first replies")
        yield made
    finally:
        made.stop()

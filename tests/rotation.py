"""What the tests of the rotation share: clusters with little room, requests on threads, what the router decided."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.cluster import Cluster, model_application, wait_until
from tests.e2e.test_chat import Event, Reply, ask


def scripted(name: str, **args: Any) -> dict[str, Any]:
    options = {"tokens": 3, **args.pop("options", {})}
    return model_application(f"model-{name}", model=f"test/{name}", engine="scripted", options=options, **args)


def with_platform(home: Path, applications: list[dict[str, Any]], platform: dict[str, Any], **settings: str) -> Cluster:
    """A cluster with this ``configs/platform.yaml``, not started yet."""
    cluster = Cluster(home, applications, settings)
    (home / "configs").mkdir()
    (home / "configs" / "platform.yaml").write_text(yaml.safe_dump(platform))
    return cluster


def rotation(cluster: Cluster) -> dict[str, Any]:
    return dict(httpx.get(f"{cluster.url}/api/rotation?history=500", timeout=30).json())


def decisions(cluster: Cluster, action: str, model: str) -> list[dict[str, Any]]:
    return [line for line in rotation(cluster)["history"] if (line["action"], line["model"]) == (action, model)]


def state(cluster: Cluster, model: str) -> str:
    return str(cluster.model(model)["state"])


class Asked:
    """A request on a thread of its own."""

    def __init__(self, cluster: Cluster, model: str, message: str = "hi", **body: Any) -> None:
        self.reply: Reply | None = None
        self.failure: BaseException | None = None
        self.ended = 0.0
        self._heard: list[Event] = []
        self._thread = threading.Thread(target=self._run, args=(cluster, model, message, body))
        self._thread.start()

    def _run(self, cluster: Cluster, model: str, message: str, body: dict[str, Any]) -> None:
        try:
            self.reply = ask(cluster, message, model, self._heard, **body)
        except BaseException as error:
            self.failure = error
        self.ended = time.monotonic()

    def begun(self) -> Asked:
        """It, once it has its first token. A model may be busy with something else before that."""
        wait_until(lambda: self.failure or any(name is None for _, name, _ in list(self._heard)), 90, what="a token")
        assert self.failure is None, self.failure
        return self

    def result(self, timeout_s: float = 180) -> Reply:
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), "no end in sight"
        assert self.reply is not None, self.failure
        return self.reply

    def text(self) -> str:
        reply = self.result()
        assert reply.names[-1] == "end", reply.payloads[-1]
        return reply.text

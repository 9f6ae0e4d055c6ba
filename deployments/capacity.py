"""The nodes that models land on, as Ray's own ledger knows them, within the caps of the platform file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from serve_app.config.platform import Capacity
from serve_app.domain.catalog import LOCAL_PROVIDER
from serve_app.domain.placement import Node, Resources


class Nodes:
    """The cluster's nodes. Their names are made for people: host and the beginning of Ray's id.

    Args:
        caps: the most that models may use of each node.
    """

    def __init__(self, caps: Capacity) -> None:
        self._caps = caps
        self._names: dict[str, str] = {}
        self.nodes: tuple[Node, ...] = ()

    def __repr__(self) -> str:
        return f"Nodes({', '.join(f'{node.name}: {node.capacity}' for node in self.nodes)})"

    def look(self, listed: Iterable[Mapping[str, Any]]) -> bool:
        """Take over what ``ray.nodes()`` lists; whether that changed anything."""
        alive = [node for node in listed if node["Alive"]]
        self._names = {str(node["NodeID"]): _name(node) for node in alive}
        nodes = tuple(Node(_name(node), self._capacity(node["Resources"]), LOCAL_PROVIDER) for node in alive)
        changed, self.nodes = nodes != self.nodes, nodes
        return changed

    def name_of(self, node_id: str) -> str:
        """The name of the node with Ray's id; the id itself as long as the node is not known."""
        return self._names.get(node_id, node_id)

    def _capacity(self, offered: Mapping[str, float]) -> Resources:
        caps = self._caps
        return Resources(
            min(offered.get("CPU", 0.0), math.inf if caps.cpus is None else caps.cpus),
            min(offered.get("GPU", 0.0), math.inf if caps.gpus is None else caps.gpus),
            min(offered.get("memory", 0.0), math.inf if caps.memory_bytes is None else caps.memory_bytes),
        )


def _name(node: Mapping[str, Any]) -> str:
    return f"{node['NodeManagerHostname']}-{node['NodeID'][:6]}"

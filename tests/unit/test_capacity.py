"""Nodes as Ray lists them, and what models ask of them."""

from typing import Any

from deployments.capacity import Nodes
from serve_app.config.platform import Capacity


def listed(name: str, alive: bool = True, **resources: float) -> dict[str, Any]:
    return {"NodeID": name * 12, "NodeManagerHostname": "box", "Alive": alive, "Resources": resources}


def test_nodes_offer_what_ray_says_within_the_caps() -> None:
    nodes = Nodes(Capacity(cpus=3, memory_bytes=1000))
    assert nodes.look([listed("a", CPU=2, memory=4000), listed("b", CPU=8, GPU=1, memory=500), listed("c", False)])
    assert [(node.name, node.capacity.cpu, node.capacity.gpu, node.capacity.memory) for node in nodes.nodes] == [
        ("box-aaaaaa", 2, 0, 1000),
        ("box-bbbbbb", 3, 1, 500),
    ]
    assert nodes.name_of("a" * 12) == "box-aaaaaa"


def test_the_same_nodes_are_no_change() -> None:
    nodes = Nodes(Capacity())
    assert nodes.look([listed("a", CPU=2)])
    assert not nodes.look([listed("a", CPU=2)])
    assert nodes.look([listed("a", False)])
    assert nodes.nodes == ()

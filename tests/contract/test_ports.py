"""Ports that a process takes seconds after they were chosen."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from deployments import ports


def neighbours() -> tuple[int, int]:
    """A port that was given, and the one whose turn is next."""
    last = ports.free_port()
    return last, ports.FIRST + (last + 1 - ports.FIRST) % (ports.LAST + 1 - ports.FIRST)


def test_no_port_is_given_twice_and_none_is_one_that_the_system_gives_away() -> None:
    chosen = [ports.free_port() for _ in range(50)]
    assert len(set(chosen)) == 50
    limits = Path("/proc/sys/net/ipv4/ip_local_port_range")
    if not limits.exists():
        pytest.skip("only Linux says which ports it gives to outgoing connections")
    first, last = map(int, limits.read_text().split())
    assert not [port for port in chosen if first <= port <= last]


def test_a_taken_port_is_passed_over() -> None:
    last, following = neighbours()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", following))
        assert ports.free_port() not in (last, following)
        assert ports.free_port(following) != following
    assert ports.free_port(following) == following


def test_a_port_that_another_will_bind_is_passed_over() -> None:
    last, following = neighbours()
    assert ports.free_port(avoid={following}) not in (last, following)
    assert ports.free_port(following, avoid={following}) != following

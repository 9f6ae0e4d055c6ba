"""TCP ports that nothing else takes between the choice and the bind."""

from __future__ import annotations

import itertools
import random
import socket
from collections.abc import Collection

FIRST, LAST = 30_000, 32_767
"""Above the ports of Serve's replicas, below those that Linux gives to outgoing connections (32,768 and up).

A port that the system hands out itself may be another connection's, or one of Ray's servers', by the time that a
process which starts for ten seconds binds it.
"""

_offsets = itertools.count(random.randrange(LAST - FIRST + 1))


def free_port(usual: int | None = None, avoid: Collection[int] = ()) -> int:
    """A port that is free on every interface: the usual one, or else one that this process was not given before.

    Args:
        usual: tried first.
        avoid: what others will bind, and have not yet.

    Raises:
        OSError: none of them is free.
    """
    if usual is not None and usual not in avoid and is_free(usual):
        return usual
    for offset in itertools.islice(_offsets, LAST - FIRST + 1):
        port = FIRST + offset % (LAST - FIRST + 1)
        if port not in avoid and is_free(port):
            return port
    raise OSError(f"no TCP port from {FIRST} to {LAST} is free")


def is_free(port: int, host: str = "") -> bool:
    """Whether a server can listen on a port of this interface (all of them when empty)."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        # What is left of connections that were closed a moment ago is in no server's way.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True

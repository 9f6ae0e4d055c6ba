"""TCP ports that nothing else takes between the choice and the bind."""

from __future__ import annotations

import itertools
import random
import socket

FIRST, LAST = 30_000, 32_767
"""Above the ports of Serve's replicas, below those that Linux gives to outgoing connections (32,768 and up).

A port that the system hands out itself may be another connection's, or one of Ray's servers', by the time that a
process which starts for ten seconds binds it.
"""

_offsets = itertools.count(random.randrange(LAST - FIRST + 1))


def free_port(usual: int | None = None) -> int:
    """A port that is free on every interface: the usual one, or else one that this process was not given before.

    Raises:
        OSError: none of them is free.
    """
    if usual is not None and _is_free(usual):
        return usual
    for offset in itertools.islice(_offsets, LAST - FIRST + 1):
        port = FIRST + offset % (LAST - FIRST + 1)
        if _is_free(port):
            return port
    raise OSError(f"no TCP port from {FIRST} to {LAST} is free")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True

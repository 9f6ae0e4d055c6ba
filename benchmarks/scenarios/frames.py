"""What sharing messages is worth: the streams of an ingress in one frame after each step, or a message for each.

``python -m benchmarks.scenarios.frames`` runs 8 and 64 streams of the scripted engine (a token every 10 ms) from two
models of one cluster that differ in ``frames`` alone, and reports the CPU per token of all server processes and the
gaps between tokens. Then the same beside a client that does not read: once its reply has the pace of the others', as a
model gives it, and once a million tokens are due at once.
"""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator, Mapping
from dataclasses import replace
from urllib.parse import urlsplit

from benchmarks.protocol import Contender, Measured, Result, Row, Target, measure, parser, rounds_of
from benchmarks.scenarios.paced import PACE, contender, scripted
from benchmarks.servers import Server, rotunda

FRAMED, APART = "frames", "a message for each stream"
MODELS = {FRAMED: "bench/framed", APART: "bench/apart"}
UNREAD = {
    "beside a client that does not read": PACE,
    "beside a client that does not read, its reply due at once": 0.0,
}
"""The seconds between two tokens of the reply that is not read."""
UNREAD_TOKENS = 1_000_000


@contextlib.contextmanager
def idle_client(server: Server, pace: float) -> Iterator[None]:
    """Asks for a reply of a million tokens at this pace, and reads nothing of it."""
    where = urlsplit(server.url)
    message = {"role": "user", "content": f"[[tokens={UNREAD_TOKENS} pace={pace:g}]]"}
    body = json.dumps({"model": server.model, "messages": [message], "stream": True, "max_tokens": UNREAD_TOKENS})
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Type: application/json\r\n"
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect((where.hostname or "", where.port or 80))
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        client.settimeout(60)
        client.recv(64)  # it has begun
        yield


def beside(server: Server, streams: int, tokens: int, which: str) -> Contender:
    """The streams beside one client of ``UNREAD``."""
    inner = contender(server, streams, tokens)

    def one_round(seed: int) -> Mapping[str, float]:
        with idle_client(server, UNREAD[which]):
            return inner.measure(seed)

    return replace(inner, name=f"{server.name} {which}", measure=one_round)


def rows(found: Measured, streams: int) -> list[Row]:
    at = f"{streams} streams"
    cpu = found.ratio(f"{at}: CPU per token, {FRAMED} against {APART}", FRAMED, APART, "cpu_us_per_token", "µs")
    gap = found.ratio(f"{at}: p99 gap between tokens, {FRAMED} against {APART}", FRAMED, APART, "gap_p99_ms", "ms")
    return [cpu, gap]


def unread_rows(found: Measured, streams: int) -> list[Row]:
    return [
        found.ratio(
            f"{streams} streams, {name}: p99 gap {which} against without", f"{name} {which}", name, "gap_p99_ms", "ms",
            Target(at_most=2.0),
        )
        for name in MODELS
        for which in UNREAD
    ]  # fmt: skip


def main() -> None:
    arguments = parser(__doc__, rounds=5)
    arguments.add_argument("--streams", type=int, nargs="+", help="default 8 64; 4 with --quick")
    arguments.add_argument("--tokens", type=int, help="of each stream (default 400; 60 with --quick)")
    given = arguments.parse_args()
    tokens, counts = given.tokens or (60 if given.quick else 400), given.streams or ([4] if given.quick else [8, 64])
    result = Result.begin("frames", "Streams that share messages, and streams that do not", given)
    result.settings |= {"pace_s": PACE, "tokens": tokens}
    models = [scripted(model=model, frames=name == FRAMED) for name, model in MODELS.items()]
    with rotunda(models, surface="completions", settings="one ingress, HAProxy") as server:
        servers = [replace(server, name=name, model=model) for name, model in MODELS.items()]
        for streams in counts:
            both = [contender(one, streams, tokens) for one in servers]
            found = measure(both, rounds_of(given), given.seed, f"{streams} streams:")
            result.add(found, *rows(found, streams))
            result.details[f"{streams}"] = found.rounds
        few = counts[0]
        contenders = [contender(one, few, tokens) for one in servers]
        contenders += [beside(one, few, tokens, which) for one in servers for which in UNREAD]
        found = measure(contenders, rounds_of(given), given.seed, f"{few} streams, one unread:")
        result.add(found, *unread_rows(found, few))
        result.details[f"{few}, one unread"] = found.rounds
    result.write()


if __name__ == "__main__":
    main()

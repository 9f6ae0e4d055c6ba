"""What a gateway adds before an upstream that answers at once: Rotunda and LiteLLM's proxy.

``python -m benchmarks.scenarios.gateway``: OpenAI chat completions of 16 tokens, 1 and 16 streams.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import ExitStack

from benchmarks.arrivals import Planned
from benchmarks.client import Load
from benchmarks.machine import CpuMeter
from benchmarks.protocol import Contender, Result, Target, measure, parser, rounds_of
from benchmarks.scenarios.hops import added
from benchmarks.servers import PeerMissing, Server, instant, litellm, rotunda

TOKENS = 16
STREAMS = (1, 16)


def contender(server: Server, requests: int, streams: int) -> Contender:
    def one_round(seed: int) -> dict[str, float]:
        planned = [Planned(0.0, server.model, f"hello {seed}", TOKENS) for _ in range(requests)]
        with CpuMeter(server.processes) as meter:
            run = asyncio.run(Load(server.url, server.surface, concurrency=streams).run(planned))
        found = run.whole(server.name)
        return {
            "ttft_p50_ms": found["median_ttft_ms"],
            "e2el_p50_ms": found["median_e2el_ms"],
            "requests_per_s": found["request_throughput"],
            "cpu_ms_per_request": meter.spent.total / requests * 1000,
        }

    return Contender(server.name, one_round, server.processes)


def _until_listed(server: Server, model: str) -> None:
    """The router asks a new provider what it has."""
    import httpx

    deadline = time.monotonic() + 60
    while httpx.get(f"{server.url}/api/models/{model}", timeout=10).status_code != 200:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{model} was not listed within a minute")
        time.sleep(0.2)


def main() -> None:
    arguments = parser(__doc__, rounds=7)
    arguments.add_argument("--requests", type=int, help="in a round (default 150; 16 with --quick)")
    given = arguments.parse_args()
    requests = given.requests or (16 if given.quick else 150)
    result = Result.begin("gateway", "Gateways before an upstream that answers at once", given)
    result.settings |= {"requests": requests, "tokens": TOKENS}
    with ExitStack() as stack:
        upstream = stack.enter_context(instant())
        args = {"provider": "lab", "kind": "openai", "base_url": f"{upstream.url}/v1"}
        application = {
            "name": "upstream-lab", "route_prefix": None, "import_path": "deployments.upstream:build", "args": args,
        }  # fmt: skip
        ours = stack.enter_context(rotunda([], applications=[application], surface="chat"))
        _until_listed(ours, "lab/instant")
        ours = Server("Rotunda", ours.url, "lab/instant", ours.surface, "one ingress", ours.processes)
        servers = [upstream, ours]
        try:
            servers.append(stack.enter_context(litellm(upstream)))
        except PeerMissing as missing:
            result.problems.append(str(missing))
        for streams in STREAMS:
            contenders = [contender(server, requests, streams) for server in servers]
            found = measure(contenders, rounds_of(given), given.seed, f"{streams} streams:")
            at = f"{streams} stream{'s' if streams > 1 else ''}"
            base = found.values(upstream.name, "ttft_p50_ms")
            for server in servers[1:]:
                what = f"{at}, {server.name}: TTFT p50 added to the upstream's own"
                result.add(found, added(what, found.values(server.name, "ttft_p50_ms"), base, "ms", Target()))
            for other in servers[2:]:
                even = Target(at_most=1.0 if streams == 1 else None)
                for what, figure, unit, target in (
                    ("TTFT p50", "ttft_p50_ms", "ms", even),
                    ("CPU per request", "cpu_ms_per_request", "ms", Target()),
                    ("requests/s", "requests_per_s", "1/s", Target()),
                ):
                    against = f"{at}: {what} against {other.name}"
                    result.add(found, found.ratio(against, ours.name, other.name, figure, unit, target))
            result.details[at] = found.rounds
    result.write()


if __name__ == "__main__":
    main()

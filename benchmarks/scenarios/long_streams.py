"""Many open streams that say little: 1,000 of them at one token per second each.

``python -m benchmarks.scenarios.long_streams``: no stream may fail or fall behind. Also the processors' time and the
memory that they take.
"""

from __future__ import annotations

import asyncio
import resource

from benchmarks.arrivals import Planned
from benchmarks.client import Load
from benchmarks.machine import CpuMeter, use_of
from benchmarks.metrics import Sample
from benchmarks.protocol import Contender, Result, Row, Target, measure, parser, rounds_of
from benchmarks.scenarios.paced import scripted
from benchmarks.servers import Server, rotunda
from benchmarks.stats import bootstrap, percentile

PACE, RAMP_S = 1.0, 10.0


def lateness(sample: Sample) -> list[float]:
    """How late each token after the first came against its stream's own pace, in seconds."""
    return [at - sample.times[0] - index * PACE for index, at in enumerate(sample.times)][1:]


def contender(server: Server, streams: int, tokens: int) -> Contender:
    def one_round(seed: int) -> dict[str, float]:
        ramp = min(RAMP_S, streams / 100)
        planned = [
            Planned((index + 1) * ramp / streams, server.model, f"stream {index}", tokens) for index in range(streams)
        ]
        before = sum(use.rss for use in use_of(server.processes()).values())
        with CpuMeter(server.processes) as meter:
            run = asyncio.run(Load(server.url, server.surface, timeout_s=tokens * PACE + 120).run(planned))
        after = sum(use.rss for use in use_of(server.processes()).values())
        found = run.metrics()
        late = [seconds for sample in run.samples if sample.ok for seconds in lateness(sample)]
        return {
            "failed": float(found["failed"]),
            "late_p99_ms": percentile(late, 99) * 1000,
            "cpu_share": meter.spent.total / run.duration,
            "mib_more": (after - before) / 2**20,
            "ttft_p99_ms": found["p99_ttft_ms"],
        }

    return Contender(server.name, one_round, server.processes)


def main() -> None:
    arguments = parser(__doc__, rounds=1)
    arguments.add_argument("--streams", type=int, help="at once (default 1000; 100 with --quick)")
    given = arguments.parse_args()
    streams, tokens = given.streams or (100 if given.quick else 1000), 5 if given.quick else 40
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    result = Result.begin("long_streams", f"{streams:,} open streams at one token per second", given)
    result.few_rounds_suffice = True
    result.settings |= {"streams": streams, "tokens": tokens, "ramp_s": RAMP_S}
    model = scripted(
        model="bench/slow", max_concurrency=2 * streams, target_ongoing_requests=streams,
        options={"pace": PACE, "tokens": tokens},
    )  # fmt: skip
    limits = {"MAX_STREAM_SESSIONS": str(4 * streams)}
    with rotunda([model], environment=limits) as server:
        found = measure([contender(server, streams, tokens)], rounds_of(given), given.seed, "streams:", warm_up=False)
        failed = bootstrap(found.values(server.name, "failed"))
        result.add(
            found,
            Row("streams that failed", failed, "streams", Target(at_most=0)),
            found.value("token lateness p99 against the stream's own pace", server.name, "late_p99_ms", "ms"),
            found.value("TTFT p99 while they open", server.name, "ttft_p99_ms", "ms"),
            found.value("processors in use, all server processes", server.name, "cpu_share", "cores"),
            found.value("memory grown, all server processes", server.name, "mib_more", "MiB"),
        )
        result.details["rounds"] = found.rounds
    result.write()


if __name__ == "__main__":
    main()

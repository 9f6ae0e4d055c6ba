"""What watching costs: the platform with every trace recorded and all figures told, against itself with both off.

``python -m benchmarks.scenarios.tracing_cost`` asks for 32 streams of a known pace (one token per 10 ms) and compares
the tokens per second that arrive while all of them run; then for 32 streams whose tokens are all due at once, and
compares the CPU per token of all processes but the client, what a reply costs at its begin and end included. Spans go
to the embedded store, which is the dearer way: the router writes them.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

from benchmarks.protocol import Result, Target, measure, parser, rounds_of
from benchmarks.scenarios.paced import PACE, contender, rate_kept, scripted
from benchmarks.servers import Server, rotunda

STREAMS = 32
OFF = {"OTEL_SDK_DISABLED": "true"}
ON = {"OTEL_TRACES_SAMPLER": "always_on"}
AT_ONCE = "bench/at-once"


def named(server: Server, name: str, model: str) -> Server:
    return replace(server, name=name, model=model)


def main() -> None:
    arguments = parser(__doc__, rounds=9)
    arguments.add_argument("--tokens", type=int, help="of each stream (default 500; 100 with --quick)")
    given = arguments.parse_args()
    tokens = given.tokens or (100 if given.quick else 500)
    result = Result.begin("tracing_cost", "What traces and metrics cost", given)
    result.settings |= {
        "streams": STREAMS,
        "tokens": tokens,
        "pace_s": PACE,
        "sampler": "always_on",
        "spans": "embedded",
    }
    models = [scripted(), scripted(model=AT_ONCE, options={"pace": 0.0, "tokens": 1_000_000})]
    with ExitStack() as stack:
        watched = stack.enter_context(rotunda(models, environment=ON))
        alone = stack.enter_context(rotunda(models, environment=OFF))
        for what, model in (("paced", watched.model), ("all due at once", AT_ONCE)):
            sides = [named(watched, "on", model), named(alone, "off", model)]
            found = measure(
                [contender(side, STREAMS, tokens, over_s=1.0 if what == "paced" else 0.0) for side in sides],
                rounds_of(given), given.seed, f"{what}:",
            )  # fmt: skip
            at = f"{STREAMS} streams, {what}"
            rate = rate_kept(result, found, at, Target(at_least=0.97)) if what == "paced" else []
            cpu = found.ratio(f"{at}: CPU per token, on over off", "on", "off", "cpu_us_per_token", "µs",
                              Target(at_most=None if what == "paced" else 1.15))  # fmt: skip
            result.add(found, *rate, cpu)
            result.details[what] = found.rounds
    result.write()


if __name__ == "__main__":
    main()

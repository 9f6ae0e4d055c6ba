"""What watching costs: the platform with every trace recorded and all figures told, against itself with both off.

``python -m benchmarks.scenarios.tracing_cost`` asks for 32 streams of a known pace (one token per 10 ms) and compares
the tokens per second that arrive; then for 32 streams whose tokens are all due at once, and compares the CPU per token
of all processes but the client. Spans go to the embedded store, which is the dearer way: the router writes them.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

from benchmarks.protocol import Contender, Result, Target, measure, parser, rounds_of
from benchmarks.scenarios.paced import PACE, contender, scripted
from benchmarks.servers import Server, rotunda

STREAMS = 32
OFF = {"OTEL_SDK_DISABLED": "true"}
ON = {"OTEL_TRACES_SAMPLER": "always_on"}
AT_ONCE = "bench/at-once"


def named(server: Server, name: str, model: str) -> Server:
    return replace(server, name=name, model=model)


def main() -> None:
    arguments = parser(__doc__, rounds=7)
    arguments.add_argument("--tokens", type=int, help="of each stream (default 300; 60 with --quick)")
    given = arguments.parse_args()
    tokens = given.tokens or (60 if given.quick else 300)
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
                [_with_rate(contender(side, STREAMS, tokens)) for side in sides],
                rounds_of(given), given.seed, f"{what}:",
            )  # fmt: skip
            at = f"{STREAMS} streams, {what}"
            rate = found.ratio(f"{at}: tokens per second, on over off", "on", "off", "tokens_per_s", "tok/s",
                               Target(at_least=0.97 if what == "paced" else None))  # fmt: skip
            cpu = found.ratio(f"{at}: CPU per token, on over off", "on", "off", "cpu_us_per_token", "µs",
                              Target(at_most=None if what == "paced" else 1.15))  # fmt: skip
            result.add(found, rate, cpu)
            result.details[what] = found.rounds
    result.write()


def _with_rate(side: Contender) -> Contender:
    """The rate that arrived, from the share of the offered one."""

    def one_round(seed: int) -> dict[str, float]:
        figures = dict(side.measure(seed))
        return {**figures, "tokens_per_s": figures["share"] * STREAMS / PACE}

    return Contender(side.name, one_round, side.processes)


if __name__ == "__main__":
    main()

"""``python -m benchmarks SET``: runs the scenarios of a set one after the other, each in a process of its own.

One that fails or takes too long does not lose the others; what there is of results is written, and at the end a line
for each says how it went. Sets: quick (make bench), peers (make bench-peers), publish (make bench-publish).
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
PEERS = ("--peers", "transformers serve", "transformers serve CB", "llama.cpp")


@dataclass(frozen=True, slots=True)
class Step:
    """One scenario with its arguments, and after how many minutes it is ended."""

    scenario: str
    arguments: tuple[str, ...] = ()
    minutes: float = 4.0


BOUNDED = ("--budget", "90", "--slow-rounds", "3")
COMPARED = (
    Step("engine", ("--sizes", "5M", "--budget", "70", "--slow-rounds", "3", *PEERS), 10),
    Step("engine", ("--sizes", "30M", *BOUNDED, *PEERS), 25),
    Step("engine", ("--sizes", "90M", "--streams", "1", "8", *BOUNDED, *PEERS), 20),
    Step("hops", (), 5),
    Step("gateway", (), 5),
    Step("paced", (), 8),
    Step("referee", (), 8),
)
"""What stands beside others' programs; engines with the peers that take no more than seconds for a request."""

SETS: dict[str, tuple[Step, ...]] = {
    "quick": (
        Step("hops", ("--quick",), 2.5),
        Step("paced", ("--quick",), 2),
        Step("engine", ("--quick", "--sizes", "5M", "--streams", "1", "8", "--peers"), 2),
        Step("overload", ("--quick",), 2),
        Step("replicas", ("--quick",), 1.5),
        Step("long_streams", ("--quick",), 1.5),
    ),
    "peers": COMPARED,
    "publish": (
        *COMPARED,
        Step("engine", ("--sizes", "90M", "--streams", "32", *BOUNDED, *PEERS[:-1]), 40),
        Step("batch_scaling", ("--budget", "60"), 10),
        Step("batch_scaling", ("--sizes", "90M", "--budget", "60"), 12),
        Step("prompt_passes", (), 5),
        Step("frames", (), 6),
        Step("int8", (), 4),
        Step("store_cost", (), 12),
        Step("store_reply", (), 2),
        Step("tracing_cost", (), 6),
        Step("swap", (), 7),
        Step("overload", (), 9),
        Step("replicas", (), 8),
        Step("cold", (), 6),
        Step("long_streams", (), 3),
        Step("many_models", (), 4),
        Step("starts", (), 6),
    ),
}


def run(step: Step, out: Path | None) -> str:
    """Run one scenario, whose result goes to ``out``; what became of it, in a few words."""
    module = f"benchmarks.scenarios.{step.scenario}"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    words = [*step.arguments, *(["--out", str(out)] if out else [])]
    process = subprocess.Popen([sys.executable, "-m", module, *words], cwd=ROOT, env=environment)
    begun = time.monotonic()
    try:
        code = process.wait(step.minutes * 60)
    except subprocess.TimeoutExpired:
        # As Ctrl-C: its servers end with it.
        process.send_signal(signal.SIGINT)
        try:
            process.wait(120)
        except subprocess.TimeoutExpired:
            process.kill()
        return f"ended after {step.minutes:g} minutes"
    return f"{time.monotonic() - begun:.0f} s" if code == 0 else f"failed ({code})"


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("set", choices=SETS, nargs="?", default="quick")
    parser.add_argument("--only", nargs="+", help="these scenarios of the set")
    parser.add_argument("--minutes", type=float, help="begin no scenario after so many")
    parser.add_argument("--out", type=Path, help="folder of the results, for a second run beside the published one")
    given = parser.parse_args(words)
    out = given.out.resolve() if given.out else None
    console, begun, ends = Console(stderr=True, highlight=False), time.monotonic(), []
    steps = [step for step in SETS[given.set] if not given.only or step.scenario in given.only]
    for number, step in enumerate(steps, 1):
        name = " ".join([step.scenario, *step.arguments])
        if given.minutes and time.monotonic() - begun > given.minutes * 60:
            ends.append((name, "not begun: the time was over"))
            continue
        console.rule(f"{number} of {len(steps)}: {name}")
        ends.append((name, run(step, out)))
    if given.set != "quick" and out is None:
        subprocess.run([sys.executable, "-m", "benchmarks.report"], cwd=ROOT, check=False)
    for name, end in ends:
        console.print(f"{name}: {end}")
    return 1 if any(end.startswith(("failed", "ended")) for _, end in ends) else 0


if __name__ == "__main__":
    sys.exit(main())

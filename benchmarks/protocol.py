"""How figures are made that may be published: paired rounds in random order, ratios with intervals, and refusals.

A *round* measures every contender once, in an order drawn anew; a ratio is taken within a round, so that what slows the
machine down for a minute slows both sides down. The result of a scenario is a :class:`Result`: rows with verdicts, the
machine, and every reason why the figures are not worth publishing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

import psutil

from benchmarks.client import progress
from benchmarks.machine import Quiet, facts, look, tree
from benchmarks.stats import Interval, bootstrap, paired_ratio

RESULTS = Path(__file__).resolve().parent / "results"
FOREIGN_SHARE = 0.10
"""Of the processors' time during a round that processes outside the benchmark may take."""
FEWEST_ROUNDS = 3

Figures = Mapping[str, float]
Verdict = Literal["reached", "missed", "open", "reported"]


@dataclass(frozen=True, slots=True)
class Contender:
    """One side of a comparison.

    Args:
        measure: runs one round's load (with this seed) and returns its figures.
        processes: those of its server.
        warm_up: instead of ``measure`` in the round that does not count, for instance with shorter replies.
        most_rounds: for a peer so slow that its rounds would take all the time; its ratios are of those rounds.
        changing: processes of its server come and go during a round: they are looked at once a second then, since
            Ray does not wait for its workers, so that what an ended one has used is in nobody's account.
    """

    name: str
    measure: Callable[[int], Figures]
    processes: Callable[[], Iterable[psutil.Process]] = lambda: ()
    warm_up: Callable[[int], object] | None = None
    most_rounds: int | None = None
    changing: bool = False


@dataclass(frozen=True, slots=True)
class Target:
    """A bound: ``at_least`` or ``at_most``."""

    at_least: float | None = None
    at_most: float | None = None

    def verdict(self, value: Interval) -> Verdict:
        """ "open" where the interval leaves it open."""
        bound = self.at_least if self.at_least is not None else self.at_most
        if bound is None:
            return "reported"
        if value.crosses(bound):
            return "open"
        good = value.median >= bound if self.at_least is not None else value.median <= bound
        return "reached" if good else "missed"

    def to_json(self) -> dict[str, float]:
        named = {"at_least": self.at_least, "at_most": self.at_most}
        return {name: bound for name, bound in named.items() if bound is not None}


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table. ``value`` has ``unit``; for a ratio, ``sides`` holds the medians that it is made of."""

    what: str
    value: Interval
    unit: str
    target: Target = Target()
    sides: Mapping[str, float] = field(default_factory=dict)
    sides_unit: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "what": self.what,
            "value": self.value.to_json(),
            "unit": self.unit,
            "target": self.target.to_json(),
            "verdict": self.target.verdict(self.value),
            "sides": dict(self.sides),
            "sides_unit": self.sides_unit,
        }


@dataclass(slots=True)
class Measured:
    """The figures of every round by contender, and the share of the processors that others took in each. A contender
    with ``most_rounds`` has only the first ones."""

    rounds: dict[str, list[Figures]]
    foreign: list[float]

    def values(self, contender: str, figure: str) -> list[float]:
        return [figures[figure] for figures in self.rounds[contender]]

    def ratio(self, what: str, ours: str, theirs: str, figure: str, unit: str, target: Target = Target()) -> Row:
        """ours / theirs of one figure."""
        mine, others = self.values(ours, figure), self.values(theirs, figure)
        both = min(len(mine), len(others))
        mine, others = mine[:both], others[:both]
        sides = {ours: median(mine), theirs: median(others)}
        return Row(what, paired_ratio(mine, others), "ratio", target, sides, unit)

    def value(self, what: str, contender: str, figure: str, unit: str, target: Target = Target()) -> Row:
        return Row(what, bootstrap(self.values(contender, figure)), unit, target)


def measure(
    contenders: Sequence[Contender],
    rounds: int,
    seed: int = 0,
    title: str = "",
    warm_up: bool = True,
    budget_s: float | None = None,
) -> Measured:
    """Measure every contender in ``rounds`` rounds, after one that does not count (at the run's own concurrency).

    With ``budget_s`` no further round begins after so many seconds, once there are FEWEST_ROUNDS.
    """
    rng = random.Random(seed)
    found = Measured({contender.name: [] for contender in contenders}, [])
    begun = time.monotonic()
    with progress() as bar:
        task = bar.add_task(title or "rounds", total=(rounds + warm_up) * len(contenders))
        for number in range(-int(warm_up), rounds):
            if budget_s and number >= FEWEST_ROUNDS and time.monotonic() - begun > budget_s:
                break
            for contender in rng.sample(list(contenders), len(contenders)):
                bar.update(task, description=f"{title} {contender.name}".strip())
                if number < 0:
                    (contender.warm_up or contender.measure)(seed + 999)
                elif contender.most_rounds is None or number < contender.most_rounds:
                    with ForeignMeter(contenders) as meter:
                        found.rounds[contender.name].append(contender.measure(seed + 1000 + number))
                    found.foreign.append(meter.share)
                bar.advance(task)
    return found


class ForeignMeter:
    """The share of the processors that neither this process nor any contender's took during a ``with`` block."""

    def __init__(self, contenders: Iterable[Contender]) -> None:
        self._contenders = list(contenders)
        self._ours: dict[tuple[int, float], float] = {}
        self._over = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self.share = 0.0

    def _look(self) -> tuple[float, float, float]:
        """All time of the processors, what of it was idle, and what ours have used, those that have ended included."""
        for process in tree(os.getpid()):
            self._note(process)
        for contender in self._contenders:
            for process in contender.processes():
                self._note(process)
        times = psutil.cpu_times()
        return sum(times), times.idle + getattr(times, "iowait", 0.0), sum(self._ours.values())

    def _note(self, process: psutil.Process) -> None:
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            self._ours[process.pid, process.create_time()] = float(times.user + times.system)

    def _watch(self) -> None:
        while not self._over.wait(1.0):
            self._look()

    def __enter__(self) -> ForeignMeter:
        self._before = self._look()
        if any(contender.changing for contender in self._contenders):
            self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._watcher.ident is not None:
            self._watcher.join()
        (whole, idle, before), (whole_after, idle_after, after) = self._before, self._look()
        busy = (whole_after - whole) - (idle_after - idle)
        self.share = max(0.0, busy - (after - before)) / max(whole_after - whole, 1e-9)


@dataclass(slots=True)
class Result:
    """What a scenario came to, as it is written to ``benchmarks/results/<scenario>.json``."""

    scenario: str
    title: str
    quick: bool
    out: Path
    quiet: Quiet
    rows: list[Row] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    foreign: list[float] = field(default_factory=list)
    few_rounds_suffice: bool = False
    """For what is counted and not timed."""

    @classmethod
    def begin(cls, scenario: str, title: str, given: argparse.Namespace) -> Result:
        """To be called before any server is started: it looks whether the machine is quiet.

        Args:
            scenario: name of the result's file.
            given: the arguments of :func:`parser`.
        """
        quiet = look(0.5 if given.quick else 2.0)
        folder = given.out or (RESULTS / "quick" if given.quick else RESULTS)
        result = cls(scenario, title, given.quick, folder, quiet)
        result.settings["seed"] = given.seed
        if given.quick:
            result.problems.append("a quick run: too few and too short rounds for figures to rely on")
        if quiet.problem:
            result.problems.append(quiet.problem)
        return result

    def add(self, measured: Measured, *rows: Row) -> None:
        """Rows out of measured rounds."""
        self.rows += rows
        self.foreign += measured.foreign

    def finish(self) -> dict[str, Any]:
        """The JSON, judged."""
        problems = list(self.problems)
        if self.foreign and median(self.foreign) > FOREIGN_SHARE:
            problems.append(f"others took {median(self.foreign):.0%} of the processors during the rounds")
        fewest = min((row.value.rounds for row in self.rows), default=0)
        if not self.quick and not self.few_rounds_suffice and fewest < FEWEST_ROUNDS:
            problems.append(f"only {fewest} rounds; {FEWEST_ROUNDS} are the fewest that make an interval")
        return {
            "scenario": self.scenario,
            "title": self.title,
            "command": command(),
            "quick": self.quick,
            "publishable": not problems,
            "problems": problems,
            "machine": facts(),
            "quiet": self.quiet.to_json(),
            "foreign_share": round(median(self.foreign), 3) if self.foreign else None,
            "settings": self.settings,
            "rows": [row.to_json() for row in self.rows],
            "details": self.details,
        }

    def write(self) -> Path:
        """Write the JSON (a quick run beside the published ones, never over them) and print the table."""
        path = self.out / f"{self.scenario}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        found = self.finish()
        path.write_text(json.dumps(rounded(found), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print("\n".join(lines(found)), flush=True)  # noqa: T201
        return path


def command() -> str:
    """How this program was started, as one would type it; where its result went is nobody's concern."""
    module, words = sys.modules["__main__"].__spec__, sys.argv[1:]
    words = [word for before, word in zip(["", *words], words, strict=False) if "--out" not in (before, word)]
    given = [word if word.isprintable() and " " not in word else repr(word) for word in words]
    return " ".join(["python", "-m", module.name if module else sys.argv[0], *given])


def rounded(value: Any) -> Any:
    """JSON with five significant digits: more is noise, and diffs stay readable."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value


def lines(found: Mapping[str, Any]) -> Iterable[str]:
    """A result as text for a terminal."""
    yield f"{found['title']} ({'quick' if found['quick'] else 'full'})"
    for row in found["rows"]:
        value = row["value"]
        bound = "".join(f" ({name.replace('_', ' ')} {limit:g})" for name, limit in row["target"].items())
        sides = ", ".join(f"{name} {side:.4g}" for name, side in row["sides"].items())
        yield (
            f"  {row['what']}: {value['median']:.3g} [{value['low']:.3g}, {value['high']:.3g}] {row['unit']}{bound}: "
            f"{row['verdict']}" + (f"   {sides} {row['sides_unit']}" if sides else "")
        )
    for problem in found["problems"]:
        yield f"  not for publication: {problem}"


def parser(doc: str | None, rounds: int) -> argparse.ArgumentParser:
    """The arguments that every scenario has. From here on SIGTERM ends one as Ctrl-C does: its servers end with it."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--rounds", type=int, default=None, help=f"paired rounds (default {rounds}; {FEWEST_ROUNDS} with --quick)"
    )
    made.add_argument(
        "--quick", action="store_true", help="small and short, to see that it works; marked in the result"
    )
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--out", type=Path, help="folder of the results (default benchmarks/results, or quick/ below it)")
    made.set_defaults(full_rounds=rounds)
    return made


def rounds_of(given: argparse.Namespace) -> int:
    """The rounds to run."""
    return int(given.rounds or (FEWEST_ROUNDS if given.quick else given.full_rounds))

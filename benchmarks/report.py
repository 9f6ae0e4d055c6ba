"""``docs/benchmarks.md``, the README's figures and the plots: from ``benchmarks/results/*.json`` and nothing else.

``python -m benchmarks.report`` rewrites the generated parts of both pages and, where matplotlib is installed (the extra
``bench``), the plots below ``docs/plots``. A test holds the pages to the results.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from benchmarks.found import KEPT, Found, number, read
from benchmarks.pool import expected, pooled
from benchmarks.repeat import compared
from serve_app.config.reference import between

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
README = ROOT / "README.md"
HEADLINES = {"engine_": ": tokens/s against transformers serve CB"}
"""What the README says of these scenarios, at their largest load; of others, their first ratio with a target."""
SIGNS = {"at_least": "≥", "at_most": "≤"}


def tables(runs: Mapping[str, Sequence[Found]]) -> str:
    """The generated part of the page, of one run or more, by what each is called."""
    results = pooled(list(runs.values()))
    good = [result for result in results if result["publishable"]]
    others = [result for result in results if not result["publishable"]]
    parts = [*_counts(good), *_judged(runs), *_factors(good)]
    for result in good:
        parts += _section(result)
    if others:
        parts += [
            "### Measured, but not to be relied on",
            "",
            "Each says why; the figures show that the scenario runs.",
            "",
        ]
        for result in others:
            parts += _section(result, level="####")
    return "\n".join(parts)


def _counts(results: Sequence[Found]) -> Iterator[str]:
    verdicts = [row["verdict"] for result in results for row in result["rows"] if row["target"]]
    if verdicts:
        told = ", ".join(f"{verdicts.count(name)} {name}" for name in ("reached", "open", "missed"))
        yield f"{len(verdicts)} targets: {told}. Open: the interval leaves it open on which side the value lies."
        yield ""


def _judged(runs: Mapping[str, Sequence[Found]]) -> Iterator[str]:
    """Each run beside the others, in the scenarios that several of them have."""
    good = {name: [result for result in run if result["publishable"]] for name, run in runs.items()}
    told = {name: compared([good[other] for other in good if other != name], run) for name, run in good.items()}
    scenarios = sorted({pair.scenario for found in told.values() for pair in found.pairs})
    if scenarios:
        yield f"Each run of {', '.join(scenarios)} beside the others:"
        yield ""
        yield from (f"* the {name}: {found};" for name, found in told.items() if found)
        yield ""


def _factors(results: Sequence[Found]) -> Iterator[str]:
    several = {result["scenario"]: result["factor"] for result in results if "runs" in result}
    if several:
        told = ", ".join(f"{scenario} {factor:.2f}" for scenario, factor in sorted(several.items()))
        yield f"How many times further apart the runs lie than their own rounds tell: {told}."
        yield ""


def _section(result: Found, level: str = "###") -> Iterator[str]:
    yield f"{level} {result['title']}"
    yield ""
    yield f"`{result['command']}`"
    yield ""
    yield from _table(result["rows"])
    yield ""
    yield _conditions(result)
    for problem in result["problems"]:
        yield f"**Not for publication:** {problem}."
    yield ""


def _table(rows: Iterable[Found]) -> Iterator[str]:
    yield "| | measured | figure [95 % interval] | another run (those known) | target | |"
    yield "|---|---|---|---|---|---|"
    for row in rows:
        value = row["value"]
        middle = f"{number(value['median'])} [{number(value['low'])}, {number(value['high'])}]"
        unit = "" if row["unit"] == "ratio" else f" {row['unit']}"
        mark = f"**{row['verdict']}**" if row["verdict"] == "missed" else row["verdict"]
        told = (row["what"], _sides(row), f"{middle}{unit}", _another_run(row), _bound(row["target"]), mark)
        yield f"| {' | '.join(told)} |"


def _another_run(row: Found) -> str:
    """Between what another run's median is expected (one round alone tells nothing of it), and those of the runs."""
    bounds = " to ".join(number(bound) for bound in expected(row["value"]) or ())
    told = ", ".join("–" if median is None else number(median) for median in row.get("medians", ()))
    return " ".join(filter(None, (bounds, told and f"({told})")))


def _sides(row: Found) -> str:
    told = ", ".join(f"{name} {number(value)}" for name, value in row["sides"].items())
    return f"{told} {row['sides_unit']}" if told else ""


def _bound(target: Mapping[str, float]) -> str:
    return " ".join(f"{SIGNS[name]} {limit:g}" for name, limit in target.items())


def _conditions(result: Found) -> str:
    machine, runs = result["machine"], result.get("runs", [result])
    rounds = sorted({row["value"]["rounds"] for run in runs for row in run["rows"]})
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    settings = ", ".join(f"{name} {_told(value)}" for name, value in result["settings"].items())
    shares = [share for run in runs if (share := run["foreign_share"]) is not None]
    speeds = [speed for run in runs if (speed := run["quiet"].get("speed")) is not None]
    return (
        f"{' and '.join(sorted({run['machine']['date'][:10] for run in runs}))}, "
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB"
        + (f", {machine['gpu']}; " if "gpu" in machine else "; ")
        + (f"{len(runs)} runs of " if len(runs) > 1 else "")
        + f"{' or '.join(map(str, rounds))} rounds"
        + (f"; others took {_range(shares, '.0%')} of the processors" if shares else "")
        + (f"; an empty loop of Python runs {_range(speeds, '.3g')} million times per second" if speeds else "")
        + f"; {versions}. Settings: {settings}."
    )


def _range(values: Sequence[float], form: str) -> str:
    return " to ".join(dict.fromkeys(format(value, form) for value in (min(values), max(values))))


def _told(value: Any) -> str:
    if isinstance(value, Mapping):
        return "(" + "; ".join(f"{name}: {_told(inner)}" for name, inner in value.items()) + ")"
    return number(value) if isinstance(value, float) else str(value)


def headline(results: Sequence[Found]) -> str:
    """The README's part: one plot, and one line for each published result."""
    good = [result for result in results if result["publishable"]]
    lines = []
    for result in good:
        row = _headline(result)
        if row is not None:
            value = row["value"]
            told = f"{number(value['median'])} [{number(value['low'])}, {number(value['high'])}]"
            lines.append(f"| {result['title']} | {row['what']} | {told} | {_bound(row['target'])} |")
    if not lines:
        return "Nothing has been measured for publication yet.\n"
    engines = [result["scenario"] for result in good if fnmatch(result["scenario"], "engine_*M")]
    plot = [f"![Tokens per second against streams](docs/plots/{engines[-1]}.throughput.svg)", ""] if engines else []
    return "\n".join([*plot, "| | | ratio [95 % interval] | target |", "|---|---|---|---|", *lines, ""])


def _headline(result: Found) -> Found | None:
    rows = [row for row in result["rows"] if row["target"] and row["sides"]]
    for start, phrase in HEADLINES.items():
        if result["scenario"].startswith(start):
            rows = [row for row in reversed(rows) if phrase in row["what"]] or rows
    return rows[0] if rows else None


def kept() -> dict[str, list[Found]]:
    """Every run that is kept, by what it is called."""
    return {name: read(folder) for name, folder in KEPT.items()}


def pages(runs: Mapping[str, Sequence[Found]]) -> Mapping[Path, str]:
    """Each page with a generated part, as it should be."""
    texts = {path: path.read_text(encoding="utf-8") for path in (PAGE, README)}
    return {
        PAGE: between(texts[PAGE], "results", tables(runs)),
        README: between(texts[README], "benchmarks", headline(pooled(list(runs.values())))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-plots", action="store_true", help="tables only")
    given = parser.parse_args()
    runs = kept()
    for path, text in pages(runs).items():
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)} from {sum(map(len, runs.values()))} results")  # noqa: T201
    if not given.no_plots:
        from benchmarks import plots

        for path in plots.draw(pooled(list(runs.values())), ROOT / "docs" / "plots"):
            print(f"wrote {path.relative_to(ROOT)}")  # noqa: T201


if __name__ == "__main__":
    main()

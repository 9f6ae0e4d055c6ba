"""``docs/benchmarks.md``, the README's figures and the plots: from ``benchmarks/results/*.json`` and nothing else.

``python -m benchmarks.report`` rewrites the generated parts of both pages and, where matplotlib is installed (the extra
``bench``), the plots below ``docs/plots``. A test holds the pages to the results.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchmarks.found import REPEATS, Found, number, read
from benchmarks.repeat import compared, expectation, factors
from serve_app.config.reference import between

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "benchmarks.md"
README = ROOT / "README.md"
HEADLINES = {"engine_": ": tokens/s against transformers serve CB"}
"""What the README says of these scenarios, at their largest load; of others, their first ratio with a target."""
SIGNS = {"at_least": "≥", "at_most": "≤"}


def tables(results: Sequence[Found], repeats: Mapping[str, Sequence[Found]] = MappingProxyType({})) -> str:
    """The generated part of the page. ``repeats``: later runs of some of the scenarios, by what each is called."""
    good = [result for result in results if result["publishable"]]
    others = [result for result in results if not result["publishable"]]
    wider = factors([good, *repeats.values()])
    parts = [*_counts(good)]
    for name, run in repeats.items():
        # The run that is judged has no say in what is expected of it.
        told_by = [good, *(other for called, other in repeats.items() if called != name)]
        parts += _repeated(good, name, run, factors(told_by))
    parts += _factors(wider)
    later = {result["scenario"]: _medians(result, repeats.values()) for result in good}
    parts += _contradicted(good, later)
    for result in good:
        parts += _section(result, wider.get(result["scenario"], 1.0), later[result["scenario"]])
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


def _repeated(results: Sequence[Found], name: str, later: Sequence[Found], wider: Mapping[str, float]) -> Iterator[str]:
    told = compared(results, later, wider)
    if told:
        scenarios = ", ".join(sorted({pair.scenario for pair in told.pairs}))
        yield f"{name} ({scenarios}): {told}."
        yield ""


def _factors(wider: Mapping[str, float]) -> Iterator[str]:
    if wider:
        told = ", ".join(f"{scenario} {factor:.2f}" for scenario, factor in sorted(wider.items()))
        yield f"*Another run* is wider than a run's own rounds tell by a factor, out of all these runs: {told}."
        yield ""


def _contradicted(results: Sequence[Found], later: Mapping[str, Mapping[str, Sequence[float | None]]]) -> Iterator[str]:
    """The targets that were reached, and in a later run were not."""
    told = [
        f"{row['what']} ({', '.join(map(number, missed))})"
        for result in results
        for row in result["rows"]
        if row["verdict"] == "reached"
        if (missed := [it for it in later[result["scenario"]][row["what"]] if it is not None and _misses(row, it)])
    ]
    if told:
        yield f"Reached in the published run, with a median on the other side in a later one: {'; '.join(told)}."
        yield ""


def _misses(row: Found, median: float) -> bool:
    target = row["target"]
    return bool(median < target["at_least"] if "at_least" in target else median > target["at_most"])


def _medians(result: Found, later: Iterable[Sequence[Found]]) -> dict[str, list[float | None]]:
    """What later full runs of the same scenario found, by row; None where one has the scenario without the row."""
    same = [
        {row["what"]: float(row["value"]["median"]) for row in again["rows"]}
        for run in later
        for again in run
        if (again["scenario"], again["quick"]) == (result["scenario"], result["quick"])
    ]
    return {row["what"]: [found.get(row["what"]) for found in same] for row in result["rows"]}


def _section(
    result: Found,
    factor: float = 1.0,
    later: Mapping[str, Sequence[float | None]] = MappingProxyType({}),
    level: str = "###",
) -> Iterator[str]:
    yield f"{level} {result['title']}"
    yield ""
    yield f"`{result['command']}`"
    yield ""
    yield from _table(result["rows"], factor, later)
    yield ""
    yield _conditions(result)
    for problem in result["problems"]:
        yield f"**Not for publication:** {problem}."
    yield ""


def _table(rows: Iterable[Found], factor: float, later: Mapping[str, Sequence[float | None]]) -> Iterator[str]:
    yield "| | measured | median [95 % interval] | another run | target | |"
    yield "|---|---|---|---|---|---|"
    for row in rows:
        value = row["value"]
        middle = f"{number(value['median'])} [{number(value['low'])}, {number(value['high'])}]"
        unit = "" if row["unit"] == "ratio" else f" {row['unit']}"
        mark = f"**{row['verdict']}**" if row["verdict"] == "missed" else row["verdict"]
        told = (
            row["what"],
            _sides(row),
            f"{middle}{unit}",
            _another_run(value, factor, later.get(row["what"], ())),
            _bound(row["target"]),
            mark,
        )
        yield f"| {' | '.join(told)} |"


def _another_run(value: Mapping[str, Any], factor: float, later: Sequence[float | None]) -> str:
    """Between what another run's median is expected (one round alone tells nothing of it), and what others found."""
    expected = " to ".join(number(bound) for bound in expectation(value, factor) or ())
    told = ", ".join("–" if median is None else number(median) for median in later)
    found = f"({told})" if any(median is not None for median in later) else ""
    return " ".join(filter(None, (expected, found)))


def _sides(row: Found) -> str:
    told = ", ".join(f"{name} {number(value)}" for name, value in row["sides"].items())
    return f"{told} {row['sides_unit']}" if told else ""


def _bound(target: Mapping[str, float]) -> str:
    return " ".join(f"{SIGNS[name]} {limit:g}" for name, limit in target.items())


def _conditions(result: Found) -> str:
    machine = result["machine"]
    rounds = sorted({row["value"]["rounds"] for row in result["rows"]})
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    settings = ", ".join(f"{name} {_told(value)}" for name, value in result["settings"].items())
    foreign, speed = result["foreign_share"], result["quiet"].get("speed")
    return (
        f"{machine['date'][:10]}, {machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB"
        + (f", {machine['gpu']}; " if "gpu" in machine else "; ")
        + f"{' or '.join(map(str, rounds))} rounds"
        + (f"; others took {foreign:.0%} of the processors" if foreign is not None else "")
        + (f"; an empty loop of Python runs {speed:.3g} million times per second" if speed is not None else "")
        + f"; {versions}. Settings: {settings}."
    )


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


def pages(results: Sequence[Found]) -> Mapping[Path, str]:
    """Each page with a generated part, as it should be."""
    texts = {path: path.read_text(encoding="utf-8") for path in (PAGE, README)}
    return {
        PAGE: between(
            texts[PAGE], "results", tables(results, {name: read(folder) for name, folder in REPEATS.items()})
        ),
        README: between(texts[README], "benchmarks", headline(results)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--no-plots", action="store_true", help="tables only")
    given = parser.parse_args()
    results = read()
    for path, text in pages(results).items():
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)} from {len(results)} results")  # noqa: T201
    if not given.no_plots:
        from benchmarks import plots

        for path in plots.draw(results, ROOT / "docs" / "plots"):
            print(f"wrote {path.relative_to(ROOT)}")  # noqa: T201


if __name__ == "__main__":
    main()

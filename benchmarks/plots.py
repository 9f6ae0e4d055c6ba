"""The plots of the benchmark page, as SVG that is the same for the same results. Needs matplotlib (extra ``bench``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.stats import percentile

Found = Mapping[str, Any]


def draw(results: Sequence[Found], folder: Path) -> Iterator[Path]:
    """Write every plot that the results have data for; yields what was written."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update(
        {
            "svg.hashsalt": "rotunda",
            "svg.fonttype": "none",
            "axes.grid": True,
            "grid.alpha": 0.3,
            "figure.figsize": (7, 4),
        }
    )
    folder.mkdir(parents=True, exist_ok=True)
    for result in results:
        for name, plot in PLOTS.items():
            if result["scenario"].startswith(name.partition(".")[0]):
                path = _save(folder / f"{result['scenario']}.{name.partition('.')[2]}.svg", plot, result)
                if path is not None:
                    yield path


def _save(path: Path, plot: Callable[[Any, Found], bool], result: Found) -> Path | None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(layout="constrained")
    try:
        if not plot(axes, result):
            return None
        note = "" if result["publishable"] else " (not for publication)"
        axes.set_title(result["title"] + note, fontsize=10)
        figure.savefig(path, metadata={"Date": None})
        return path
    finally:
        pyplot.close(figure)


def throughput(axes: Any, result: Found) -> bool:
    """Tokens per second against streams, one line for each contender."""
    lines: dict[str, dict[int, float]] = {}
    for title, rounds in result["details"].items():
        for name, figures in rounds.items():
            streams = int(title.rpartition("/")[2].split()[0])
            lines.setdefault(name, {})[streams] = median(one["output_throughput"] for one in figures)
    for name, points in sorted(lines.items()):
        at = sorted(points)
        axes.plot(at, [points[streams] for streams in at], marker="o", label=name)
    axes.set(xlabel="streams at once", ylabel="tokens/s", xscale="log", yscale="log")
    ticks = sorted({streams for points in lines.values() for streams in points})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.legend(fontsize=8)
    return len(ticks) > 2


def latency(axes: Any, result: Found) -> bool:
    """Time to first token against the rate that was sent, from the intended arrival."""
    curve = result["details"].get("curve", [])
    rates = [point["rate"] for point in curve]
    for key, label in (("ttft_p50_ms", "p50"), ("ttft_p99_ms", "p99")):
        axes.plot(rates, [point[key] for point in curve], marker="o", label=f"TTFT {label}")
    axes.set(xlabel="requests/s sent", ylabel="ms", yscale="log")
    axes.legend(fontsize=8)
    return bool(curve)


def goodput(axes: Any, result: Found) -> bool:
    """Good replies per second against the rate that was sent."""
    curve = result["details"].get("curve", [])
    rates = [point["rate"] for point in curve]
    axes.plot(rates, rates, linestyle=":", color="grey", label="sent")
    for key, label in (("goodput", "within the bounds"), ("refused_per_s", "refused")):
        axes.plot(rates, [point[key] for point in curve], marker="o", label=label)
    axes.set(xlabel="requests/s sent", ylabel="requests/s")
    axes.legend(fontsize=8)
    return bool(curve)


def cdf(axes: Any, result: Found) -> bool:
    """The distribution of the time to the first token, cold and warm."""
    lists = {name: sorted(result["details"].get(name, ())) for name in ("cold_ttft_ms", "warm_ttft_ms")}
    for name, values in lists.items():
        shares = [percentile(values, percent) for percent in range(101)] if values else []
        axes.plot(shares, [percent / 100 for percent in range(len(shares))], label=name.split("_")[0])
    axes.set(xlabel="ms to the first token", ylabel="share of requests", xscale="log")
    axes.legend(fontsize=8)
    return any(lists.values())


def timeline(axes: Any, result: Found) -> bool:
    """Which model was in which state when: ``details.timeline`` has rows of model, state, from_s, to_s."""
    colours = {"loading": "tab:orange", "ready": "tab:green", "busy": "tab:blue", "retiring": "tab:red"}
    spans = result["details"].get("timeline", [])
    names = sorted({span["model"] for span in spans})
    for span in spans:
        colour = colours.get(span["state"])
        if colour:
            axes.barh(names.index(span["model"]), span["to_s"] - span["from_s"], left=span["from_s"], color=colour)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlabel="s")
    for state, colour in colours.items():
        axes.bar(0, 0, color=colour, label=state)
    axes.legend(fontsize=8)
    return bool(spans)


def soak(axes: Any, result: Found) -> bool:
    """Resident memory of each process over time: ``details.series`` by process, rows of seconds and bytes."""
    series = result["details"].get("series", {})
    for name, points in sorted(series.items()):
        axes.plot([at / 60 for at, _ in points], [rss / 2**20 for _, rss in points], label=name[:40])
    axes.set(xlabel="minutes", ylabel="MiB resident")
    axes.legend(fontsize=6)
    return bool(series)


PLOTS: dict[str, Callable[[Any, Found], bool]] = {
    "engine_.throughput": throughput,
    "overload.latency": latency,
    "overload.goodput": goodput,
    "cold.cdf": cdf,
    "swap.timeline": timeline,
    "soak.memory": soak,
}
"""By the beginning of the scenario's name, and what the plot shows."""

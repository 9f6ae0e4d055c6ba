"""Results as they lie in ``benchmarks/results``, read for the page, the plots and the comparison of two runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.protocol import RESULTS

KEPT = {
    "first": RESULTS,
    "second": RESULTS / "again",
    "third": RESULTS / "third",
    "fourth": RESULTS / "fourth",
    "fifth": RESULTS / "fifth",
}
"""Runs of the suite in different hours; the later ones have some of the scenarios."""
ORDER = (
    "engine_5M",
    "engine_30M",
    "engine_90M",
    "engine_90M_1_8",
    "engine_90M_32",
    "batch_scaling",
    "batch_scaling_90M",
    "prompt_passes",
    "gpu",
    "hops",
    "gateway",
    "paced",
    "replicas",
    "overload",
)

Found = Mapping[str, Any]


def read(folder: Path = RESULTS) -> list[Found]:
    """Every result in the folder that has rows, in the page's order."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    places = {name: place for place, name in enumerate(ORDER)}
    return sorted(
        (result for result in found if "rows" in result),
        key=lambda result: (places.get(result["scenario"], len(ORDER)), result["scenario"]),
    )


def number(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value == 0 or abs(value) >= 1000:
        return f"{value:,.0f}"
    digits = f"{value:.3g}"
    return digits if "e" not in digits else f"{value:.6f}".rstrip("0")

"""The dashboard and the collector's configuration speak of nothing that does not exist, and leave nothing out."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml
from prometheus_client.parser import text_string_to_metric_families

from serve_app.domain.breaker import Circuit
from serve_app.domain.catalog import Entry, ModelState
from serve_app.domain.fleet import FleetView, ModelStatus, Report
from serve_app.domain.rotation_view import NodeView, QueueView, ResidentView, RotationView
from serve_app.engines.base import Counters
from serve_app.telemetry import figures
from serve_app.telemetry.metrics import Totals
from serve_app.telemetry.tracing import Tracing
from tests.unit.telemetry.test_metrics import reply

ROOT = Path(__file__).parents[3]
NAME = re.compile(r"\b(?:gen_ai|rotunda)_\w+")
LABELS = re.compile(r"by \(([^)]*)\)")
FROM_DEPLOYMENTS = {
    *("rotunda_process_resident_bytes", "rotunda_processes", "rotunda_node_memory_bytes"),
    *("rotunda_node_memory_free_bytes", "rotunda_sessions_active"),
}
"""Figures that only a replica in Ray has; they are looked for in the source."""


def told() -> dict[str, set[str]]:
    """Every sample that one process with everything in it tells, with its labels."""
    from serve_app.domain.placement import Resources

    tracing, totals = Tracing.set_up("ingress", "one", {}), Totals()
    metrics = tracing.metrics
    reply(metrics)
    metrics.session_ended("completed")
    metrics.loaded("a", 1.0, None)
    metrics.evicted("a", "idle")
    metrics.spans_lost(1, "killed")
    metrics.watch(lambda: figures.engine_figures(Counters(), "a"))
    metrics.watch(lambda: figures.memory_figures("a", "r", "n", 1, 1))
    metrics.watch(lambda: figures.breaker_figures({"a": Circuit.OPEN}))
    metrics.watch(lambda: [figures.thresholds({"warning": 0.8})])
    entry = Entry("a", "huggingface", "model-a", "model")
    report = Report("model-a", "r", ModelState.READY, memory_bytes=1)
    metrics.watch(lambda: figures.fleet_figures(FleetView((ModelStatus(entry, "a", ModelState.READY, (report,)),))))
    room = Resources(memory=1)
    view = RotationView(
        nodes=(NodeView("n", "huggingface", room, room, room),),
        residents=(ResidentView("a", ModelState.READY, ("n",), room, 0, False, 0.0, None),),
        queue=(QueueView(1, "a", "high", "anonymous", 1, "memory is full"),),
    )
    metrics.watch(lambda: figures.rotation_figures(view))
    totals.hear("one", metrics.snapshot(), 0)
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(totals.page(0).decode()):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def expressions() -> list[str]:
    dashboard = json.loads((ROOT / "configs/grafana/rotunda.json").read_text())
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def test_the_dashboard_asks_only_for_figures_and_labels_that_exist() -> None:
    known = told()
    for expression in expressions():
        names = [name for name in NAME.findall(re.sub(LABELS, "", expression)) if name in known or "{" not in name]
        for name in names:
            assert name in known or name in FROM_DEPLOYMENTS, f"{name} in {expression}"
        for labels in LABELS.findall(expression):
            for label in labels.split(", "):
                if names and names[0] in known:
                    assert label in known[names[0]], f"{label} of {names[0]} in {expression}"


def test_the_dashboard_leaves_no_figure_out() -> None:
    shown = set(NAME.findall(" ".join(expressions())))
    for name in told():
        family = re.sub(r"_(bucket|count|sum)$", "", name)
        assert {name, f"{family}_bucket", f"{family}_count"} & shown, f"{name} is on no panel"


def test_the_figures_of_replicas_are_in_their_source() -> None:
    source = "".join((ROOT / "deployments" / name).read_text() for name in ("reporting.py", "ingress.py"))
    for name in FROM_DEPLOYMENTS:
        assert f'"{name}"' in source, name


def test_the_collector_takes_what_is_sent_and_asks_where_figures_are() -> None:
    config = yaml.safe_load((ROOT / "configs/otel/collector.yaml").read_text())
    assert config["receivers"]["otlp"]["protocols"]["http"]["endpoint"] == "127.0.0.1:4318"
    [job] = config["receivers"]["prometheus"]["config"]["scrape_configs"]
    assert job["metrics_path"] == "/metrics"
    defined = {kind: set(config[kind]) for kind in ("receivers", "processors", "exporters")}
    for pipeline in config["service"]["pipelines"].values():
        for kind, names in pipeline.items():
            assert set(names) <= defined[kind]

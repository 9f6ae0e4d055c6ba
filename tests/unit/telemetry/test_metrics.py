"""Figures of many processes become one page that Prometheus can read."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from serve_app.domain.generation import Timing, Usage
from serve_app.telemetry import semconv
from serve_app.telemetry.metrics import Metrics, Totals, gauge

ABOUT = {
    semconv.OPERATION: "chat",
    semconv.PROVIDER: "huggingface",
    semconv.REQUEST_MODEL: "a",
    semconv.RESPONSE_MODEL: "a",
}
TIMING = Timing(ttft_s=0.1, decode_s=1.0, total_s=1.1)


def samples(page: bytes) -> dict[str, float]:
    """Every sample of a page, as the official parser reads it: ``name{label="value",…}`` without empty labels."""
    found = {}
    for family in text_string_to_metric_families(page.decode()):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()) if value)
            assert f"{sample.name}{{{labels}}}" not in found
            found[f"{sample.name}{{{labels}}}"] = sample.value
    return found


def reply(metrics: Metrics, error: str | None = None) -> None:
    metrics.reply(ABOUT, TIMING, None if error else Usage(5, 11), error, whole=error is None)


OK = (
    "gen_ai_server_request_duration_seconds_count{gen_ai_operation_name=chat,gen_ai_provider_name=huggingface,"
    "gen_ai_request_model=a,gen_ai_response_model=a}"
)


def test_processes_are_added_up() -> None:
    first, second, totals = Metrics(), Metrics(), Totals()
    for metrics in (first, first, second):
        reply(metrics)
    totals.hear("one", first.snapshot(), 0)
    totals.hear("two", second.snapshot(), 0)
    page = samples(totals.page(0))
    assert page[OK] == 3
    assert page["rotunda_tokens_total{model=a,provider=huggingface,type=output}"] == 33
    per_token = "gen_ai_server_time_per_output_token_seconds"
    assert [value for name, value in page.items() if name.startswith(f"{per_token}_sum")] == [pytest.approx(0.3)]
    assert [value for name, value in page.items() if name.startswith(f"{per_token}_bucket") and "le=0.1}" in name] == [
        3
    ]


def test_an_error_has_its_type_and_counts_neither_tokens_nor_first_token() -> None:
    metrics, totals = Metrics(), Totals()
    reply(metrics, "TIMEOUT")
    totals.hear("one", metrics.snapshot(), 0)
    page = samples(totals.page(0))
    assert [name for name, value in page.items() if "_duration_seconds_count" in name and value] == [
        OK.replace("_count{", "_count{error_type=TIMEOUT,")
    ]
    assert not [name for name in page if name.startswith(("rotunda_tokens", "gen_ai_server_time_to_first_token"))]


def test_counters_never_fall_and_gauges_go_with_their_process() -> None:
    totals = Totals(silence_s=10, fold_s=100)
    for process in ("one", "two", "three"):
        metrics = Metrics()
        reply(metrics)
        metrics.watch(lambda: [gauge("rotunda_sessions_active", "", {(): 2.0})])
        totals.hear(process, metrics.snapshot(), 0, leaves=process == "one")
    assert samples(totals.page(5))[OK] == 3
    assert samples(totals.page(5))["rotunda_sessions_active{}"] == 4
    totals.hear("three", None, 90)
    for now in (95, 150):  # silent, and folded
        assert samples(totals.page(now))[OK] == 3
    assert samples(totals.page(95))["rotunda_sessions_active{}"] == 2


def test_what_all_processes_of_a_node_say_alike_is_not_added_up() -> None:
    totals = Totals()
    for process in ("one", "two"):
        metrics = Metrics()
        metrics.watch(lambda: [gauge("rotunda_node_memory_bytes", "", {(("node", "n"),): 7.0})])
        totals.hear(process, metrics.snapshot(), 0)
    assert samples(totals.page(0))["rotunda_node_memory_bytes{node=n}"] == 7


def test_a_router_that_takes_over_knows_what_was_counted() -> None:
    metrics, before, after = Metrics(), Totals(), Totals()
    reply(metrics)
    before.hear("one", metrics.snapshot(), 0, leaves=True)
    for process, at, left, snapshot in before.to_rows():
        after.hear(process, snapshot, at, left)
    assert samples(after.page(1))[OK] == 1

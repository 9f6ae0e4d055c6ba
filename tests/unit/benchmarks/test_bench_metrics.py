"""The figures of a run: what counts from when, and over what."""

from typing import Any

import pytest

from benchmarks.metrics import Sample, concurrent_rate, detail, metrics


def sample(**changed: Any) -> Sample:
    values: dict[str, Any] = {
        "model": "m", "intended": 10.0, "sent": 10.5, "times": (11.0, 11.1, 11.3), "ended": 11.4, "status": 200,
        "error": None, "prompt_tokens": 7, "completion_tokens": 5, "asked_tokens": 8, "text": "a b c",
    }  # fmt: skip
    return Sample(**values | changed)


def test_latency_counts_from_the_intended_arrival() -> None:
    found = metrics([sample()], 2.0)
    assert found["median_ttft_ms"] == pytest.approx(1000)
    assert found["median_e2el_ms"] == pytest.approx(1300)
    assert found["client_lag_ms"]["p50"] == pytest.approx(500)


def test_time_per_token_counts_the_servers_tokens_after_the_first() -> None:
    assert metrics([sample()], 2.0)["median_tpot_ms"] == pytest.approx(300 / 4)
    assert metrics([sample(completion_tokens=1)], 2.0)["median_tpot_ms"] is None


def test_gaps_are_those_between_pieces() -> None:
    found = metrics([sample()], 2.0)
    assert found["mean_itl_ms"] == pytest.approx(150)
    assert found["tokens_per_chunk"] == pytest.approx(5 / 3)


def test_throughput_is_of_the_servers_count_over_the_whole_time() -> None:
    found = metrics([sample(), sample(completion_tokens=15)], 4.0)
    assert found["output_throughput"] == 5
    assert found["total_token_throughput"] == pytest.approx(34 / 4)
    assert found["request_throughput"] == 0.5


def test_a_server_that_does_not_count_is_told() -> None:
    found = metrics([sample(), sample(completion_tokens=None)], 2.0)
    assert found["total_output_tokens"] == 5 + 8
    assert found["counted_by_server"] == 0.5


def test_attainment_is_of_all_that_were_sent() -> None:
    runs = [sample(), sample(times=(14.0, 14.1)), sample(error="QUEUE_FULL", times=(), status=429)]
    found = metrics(runs, 2.0, {"ttft": 1.5})
    assert found["slo_attainment"] == pytest.approx(1 / 3)
    assert found["request_goodput"] == 0.5
    assert found["slo_ms"] == {"ttft": 1500}


def test_failures_are_counted_by_reason_and_not_into_latency() -> None:
    found = metrics([sample(), sample(error="timeout"), sample(times=(), status=200)], 2.0)
    assert (found["completed"], found["failed"]) == (1, 2)
    assert found["errors"] == {"timeout": 1, "no text (HTTP 200)": 1}
    assert found["total_output_tokens"] == 5


def test_nothing_completed_gives_no_latency_instead_of_a_fault() -> None:
    found = metrics([sample(error="refused", times=(), status=0)], 1.0, {"ttft": 1})
    assert found["median_ttft_ms"] is None
    assert found["slo_attainment"] == 0
    assert found["tokens_per_chunk"] is None


def test_details_are_vllms_lists() -> None:
    found = detail([sample(), sample(error="timeout")])
    assert found["output_lens"] == [5]
    assert found["ttfts"] == [1.0]
    assert found["itls"][0] == pytest.approx([0.1, 0.2])


def test_the_rate_of_concurrent_streams_is_that_of_the_time_in_which_all_run() -> None:
    early = sample(times=(1.0, 2.0, 3.0, 4.0), completion_tokens=4)
    late = sample(times=(2.0, 3.0, 4.0, 5.0), completion_tokens=8)
    assert concurrent_rate([early, late]) == pytest.approx((2 + 4) / 2)
    assert concurrent_rate([early, sample(times=(4.0, 5.0))]) is None

"""Shares out of py-spy's raw lines."""

import pytest

from benchmarks.profiling import shares

RAW = """\
run (asyncio/runners.py:190);step (serve_app/engines/slots.py:10);forward (torch/nn/modules/module.py:5) 6
run (asyncio/runners.py:190);step (serve_app/engines/slots.py:20);step (serve_app/engines/slots.py:10) 2
run (asyncio/runners.py:190);send (uvicorn/protocols/http.py:7) 2
"""


def test_a_function_has_the_share_of_the_samples_that_it_was_in() -> None:
    found = shares(RAW)
    assert found["step (serve_app/engines/slots.py)"] == pytest.approx(0.8)
    assert found["send (uvicorn/protocols/http.py)"] == pytest.approx(0.2)
    assert next(iter(found)) == "step (serve_app/engines/slots.py)"


def test_the_event_loop_itself_is_left_out() -> None:
    assert not any("asyncio" in name for name in shares(RAW))


def test_an_empty_profile_has_no_shares() -> None:
    assert shares("") == {}

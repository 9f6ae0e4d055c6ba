"""The launcher's end, when what it ends does not."""

from __future__ import annotations

import logging
import threading

import pytest

from deployments import local


def test_what_does_not_end_in_its_time_is_left_and_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(local.SHUTDOWN_S, "Serve", 0.02)
    stuck, ended = threading.Event(), threading.Event()

    def hang() -> None:
        stuck.wait(60)
        ended.set()

    with caplog.at_level(logging.WARNING):
        local._end("Serve", hang)
    assert not ended.is_set() and "Serve did not end within 0.02 s" in caplog.text
    stuck.set()
    assert ended.wait(10)


def test_what_fails_to_end_is_told_and_the_rest_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise RuntimeError("the controller is gone")

    with caplog.at_level(logging.WARNING):
        local._end("Serve", fail)
    assert "Serve could not be ended: RuntimeError('the controller is gone')" in caplog.text


def test_what_ends_is_not_told(caplog: pytest.LogCaptureFixture) -> None:
    done: list[bool] = []
    with caplog.at_level(logging.WARNING):
        local._end("Serve", lambda: done.append(True))
    assert done and not caplog.text

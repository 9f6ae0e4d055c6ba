"""The load client against a server of which everything is known: what is sent, when, and what each ending is called."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks.arrivals import Planned, plan
from benchmarks.client import Load
from benchmarks.surfaces import SURFACES
from benchmarks.wire import Target, exchange, request_bytes
from serve_app.cli import app

PACE = 0.02
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


class Server:
    """Answers as ``/api/stream-message`` does; the message says how: a number of tokens, or a fault."""

    def __init__(self) -> None:
        self.running = self.most = self.seen = 0
        self.left = asyncio.Event()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length"))
        body = json.loads(await reader.readexactly(length))
        self.seen += 1
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await self._reply(body["message"].split()[0], writer)
        except ConnectionError:
            self.left.set()
        finally:
            self.running -= 1
            writer.close()

    async def _reply(self, how: str, writer: asyncio.StreamWriter) -> None:
        if how == "full":
            data = json.dumps({"error": {"code": "QUEUE_FULL", "message": "later"}}).encode()
            writer.write(b"HTTP/1.1 429 Too Many\r\ncontent-length: %d\r\n\r\n%s" % (len(data), data))
            return
        writer.write(HEAD)
        await self._event(writer, {"sessionId": "s"}, "session")
        if how == "hang":
            await asyncio.sleep(30)
        tokens = 3 if not how.isdigit() else int(how)
        for index in range(tokens):
            await asyncio.sleep(PACE)
            await self._event(writer, {"token": f"t{index} ", "offset": 0})
        if how == "cut":
            return
        await self._event(writer, {"usage": {"promptTokens": 1, "completionTokens": tokens}}, "end")
        writer.write(b"0\r\n\r\n")
        await writer.drain()

    @staticmethod
    async def _event(writer: asyncio.StreamWriter, data: dict[str, Any], name: str | None = None) -> None:
        text = (f"event: {name}\n" if name else "") + f"data: {json.dumps(data)}\n\n"
        writer.write(f"{len(text):x}\r\n{text}\r\n".encode())
        await writer.drain()


@asynccontextmanager
async def running() -> AsyncIterator[tuple[Server, str]]:
    server = Server()
    listener = await asyncio.start_server(server.answer, "127.0.0.1", 0)
    async with listener:
        yield server, f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"


def asked(*messages: str) -> list[Planned]:
    return [Planned(0.0, "m", message, 8) for message in messages]


async def test_a_closed_loop_keeps_so_many_running_and_no_more() -> None:
    async with running() as (server, url):
        run = await Load(url, SURFACES["sse"], concurrency=3).run(asked(*["4"] * 9))
    assert server.most == 3
    found = run.metrics()
    assert (found["completed"], found["total_output_tokens"], found["tokens_per_chunk"]) == (9, 36, 1)
    assert run.samples[0].text == "t0 t1 t2 t3 "
    assert run.samples[0].ttft >= PACE
    assert run.duration >= 3 * 4 * PACE


async def test_an_open_loop_sends_what_is_due_however_many_run() -> None:
    async with running() as (server, url):
        planned = [Planned(index * 0.01, "m", "10", 8) for index in range(8)]
        run = await Load(url, SURFACES["sse"]).run(planned)
    assert server.most == 8
    assert all(sample.ok for sample in run.samples)
    intended = [sample.intended for sample in run.samples]
    assert [at - intended[0] for at in intended] == pytest.approx([index * 0.01 for index in range(8)])


async def test_waiting_for_a_place_counts_as_latency_in_an_open_loop() -> None:
    async with running() as (_, url):
        planned = [Planned(0.0, "m", "5", 8), Planned(0.001, "m", "5", 8)]
        run = await Load(url, SURFACES["sse"], concurrency=1).run(planned)
    assert run.samples[1].ttft >= 6 * PACE - 0.005
    assert run.samples[1].sent - run.samples[1].intended >= 5 * PACE - 0.005


async def test_each_ending_has_its_name() -> None:
    async with running() as (_, url):
        run = await Load(url, SURFACES["sse"], concurrency=4, timeout_s=0.5).run(asked("full", "cut", "hang", "2"))
    assert [sample.error for sample in run.samples] == ["QUEUE_FULL", "closed", "timeout", None]
    assert run.samples[1].text == "t0 t1 t2 "
    assert run.metrics()["failed"] == 3


async def test_a_server_that_is_not_there_is_a_failure_and_no_fault() -> None:
    run = await Load("http://127.0.0.1:9", SURFACES["sse"], concurrency=1).run(asked("1"))
    assert run.samples[0].error == "refused"


async def test_a_client_may_leave() -> None:
    async with running() as (server, url):
        target = Target.of(url)
        body = json.dumps({"message": "500"}).encode()
        result = await exchange(target, request_bytes(target, "/", body), leave_after_s=0.1)
        assert result.error == "abandoned"
        assert result.status == 200
        await asyncio.wait_for(server.left.wait(), 5)


def test_only_plain_http_addresses_are_taken() -> None:
    with pytest.raises(ValueError, match="no http"):
        Target.of("https://127.0.0.1")


async def test_a_plan_reaches_the_server_whole() -> None:
    async with running() as (server, url):
        planned = plan(["m"], 20, seed=1, max_tokens=4, rate=200)
        run = await Load(url, SURFACES["sse"]).run(planned)
    assert server.seen == 20
    assert len(run.samples) == 20


async def test_rotunda_bench_shows_the_figures_of_a_load() -> None:
    async with running() as (server, url):
        words = ["bench", "m", "--requests", "4", "--concurrency", "2", "--url", url, "--slo", "ttft:60000"]
        shown = await asyncio.to_thread(CliRunner().invoke, app, words)
        told = await asyncio.to_thread(CliRunner().invoke, app, [*words, "--json"])
    assert shown.exit_code == 0, shown.output
    assert "4 of 4 replies" in shown.output
    assert "good: 100% of all sent" in shown.output
    assert json.loads(told.stdout)["total_output_tokens"] == 12
    assert server.most == 2


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--surface", "soap"], "no surface"),
        (["--slo", "speed:3"], "none of ttft"),
        (["--slo", "ttft:fast"], "no bound"),
        (["--rate", "0"], "above 0"),
        (["--url", "ftp://here"], "no http"),
    ],
)
def test_rotunda_bench_refuses_what_it_cannot_do(words: list[str], reason: str) -> None:
    shown = CliRunner().invoke(app, ["bench", "m", *words])
    assert shown.exit_code == 2
    assert reason in shown.output


def test_rotunda_bench_says_when_nothing_was_answered() -> None:
    shown = CliRunner().invoke(app, ["bench", "m", "--requests", "1", "--url", "http://127.0.0.1:9"])
    assert shown.exit_code == 1
    assert "failed: 1 × refused" in shown.output

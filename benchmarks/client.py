"""A load client for streamed replies: open or closed loop, several models, every surface, one process.

``python -m benchmarks.client --url http://127.0.0.1:8000 --model rotunda/tiny-chat --rate 4 --requests 40``

In an open loop (``--rate``) requests are sent when they are due, however many run: latency counts from the intended
arrival, so a queue that builds up in front of the server (or in this client, whose lag is reported) shows. In a closed
loop (``--concurrency`` without a rate) the next request follows when one has ended. With both, arrivals that find
``--concurrency`` requests running wait, and their wait counts.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.arrivals import Planned, Prompts, plan
from benchmarks.machine import facts
from benchmarks.metrics import SLO_NAMES, Sample, detail, metrics
from benchmarks.surfaces import SURFACES, Surface, events
from benchmarks.wire import Exchange, Target, exchange, now

Told = Callable[[int], None]
"""Called after each request with how many have ended."""


@dataclass(frozen=True, slots=True)
class Run:
    """What a load came to. ``duration``: seconds from the first intended arrival to the last reply's end."""

    samples: tuple[Sample, ...]
    duration: float
    load_before: float
    load_after: float

    def metrics(self, slo: dict[str, float] | None = None) -> dict[str, Any]:
        return metrics(self.samples, self.duration, slo)

    def whole(self, name: str) -> dict[str, Any]:
        """The metrics of a run in which nothing may fail; ``name`` says whose it was.

        Raises:
            RuntimeError: a request failed.
        """
        found = self.metrics()
        if found["failed"]:
            raise RuntimeError(f"{name}: {found['errors']}")
        return found


@dataclass(frozen=True, slots=True)
class Load:
    """How requests are sent.

    Args:
        url: of the server.
        surface: the protocol.
        concurrency: most requests at once; None: no bound (open loop only).
        timeout_s: after which a request counts as failed.
        slow_s: pause after each piece that was read.
    """

    url: str
    surface: Surface
    concurrency: int | None = None
    timeout_s: float = 300.0
    slow_s: float = 0.0

    async def run(self, planned: Sequence[Planned], told: Told = lambda ended: None) -> Run:
        """Send everything and wait for every reply."""
        target = Target.of(self.url)
        prepared = [await self.surface.prepare(target, one) for one in planned]
        wires = [self.surface.request(target, one, before) for one, before in zip(planned, prepared, strict=True)]
        if self.concurrency is None and all(one.at == 0.0 for one in planned) and len(planned) > 5000:
            raise ValueError("more than 5,000 requests at once: give a concurrency or a rate")
        load_before = os.getloadavg()[0]
        # A collection in the middle of a run would be read as the server's jitter.
        gc.collect()
        gc.disable()
        try:
            started = now()
            results = await self._send(target, planned, wires, started, told)
        finally:
            gc.enable()
        samples = tuple(
            self._sample(one, intended, result) for one, (intended, result) in zip(planned, results, strict=True)
        )
        duration = max((result.ended for _, result in results), default=started) - started
        return Run(samples, duration, load_before, os.getloadavg()[0])

    async def _send(
        self, target: Target, planned: Sequence[Planned], wires: Sequence[bytes], started: float, told: Told
    ) -> list[tuple[float, Exchange]]:
        """The intended arrival and the exchange of each request, in the plan's order."""
        results: list[tuple[float, Exchange] | None] = [None] * len(planned)
        gate = asyncio.Semaphore(self.concurrency) if self.concurrency else None
        ended = 0

        async def one(index: int) -> None:
            nonlocal ended
            try:
                intended = now() if closed else started + planned[index].at
                results[index] = intended, await exchange(target, wires[index], self.timeout_s, slow_s=self.slow_s)
            finally:
                if gate is not None:
                    gate.release()
            ended += 1
            told(ended)

        closed = self.concurrency is not None and all(one.at == 0.0 for one in planned)
        async with asyncio.TaskGroup() as group:
            for index, request in enumerate(planned):
                if not closed and (wait := started + request.at - now()) > 0:
                    await asyncio.sleep(wait)
                if gate is not None:
                    await gate.acquire()
                group.create_task(one(index))
        return [result for result in results if result is not None]

    def _sample(self, planned: Planned, intended: float, result: Exchange) -> Sample:
        reply = self.surface.read(events(result)) if result.status == 200 else None
        error = result.error or (None if result.status == 200 else _refusal(result))
        if reply is not None and error is None and reply.terminals != ["end"]:
            error = reply.code or "+".join(reply.terminals) or "no terminal event"
        return Sample(
            model=planned.model,
            intended=intended,
            sent=result.sent,
            times=tuple(reply.times) if reply else (),
            ended=result.ended,
            status=result.status,
            error=error,
            prompt_tokens=reply.prompt_tokens if reply else None,
            completion_tokens=reply.completion_tokens if reply else None,
            asked_tokens=planned.max_tokens,
            text=reply.text if reply else "",
            session=reply.session if reply else None,
        )


def _refusal(result: Exchange) -> str:
    """The code of an answer that is no stream."""
    body = b"".join(data for _, data in result.pieces).partition(b"\r\n\r\n")[2]
    try:
        error = json.loads(body)["error"]
        return str(error["code"] or error["type"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {result.status}"


def progress(shown: bool = True) -> Progress:
    """A bar on the error stream; nothing where that is no terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal))


def load_once(load: Load, planned: Sequence[Planned], bar: Progress | None = None) -> Run:
    """Run a load in an event loop of its own, with a bar."""
    holder: AbstractContextManager[Any] = bar or nullcontext()
    with holder:
        task = bar.add_task("requests", total=len(planned)) if bar else None

        def told(ended: int) -> None:
            if bar and task is not None:
                bar.update(task, completed=ended)

        return asyncio.run(load.run(planned, told))


def bounds(given: Iterable[str]) -> dict[str, float]:
    """``ttft:200`` (milliseconds) → seconds by name.

    Raises:
        ValueError: another name, or no number.
    """
    found = {}
    for text in given:
        name, _, value = text.partition(":")
        if name not in SLO_NAMES:
            raise ValueError(f"{name!r} is none of {', '.join(SLO_NAMES)}")
        try:
            found[name] = float(value) / 1000
        except ValueError:
            raise ValueError(f"{text!r} is no bound; write for instance {name}:200, in milliseconds") from None
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.client", description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--surface", choices=SURFACES, default="sse")
    parser.add_argument("--model", action="append", required=True, help="again for several, the most wanted first")
    parser.add_argument("--zipf", type=float, default=1.0, help="how unevenly several models are asked (0: evenly)")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--rate", type=float, help="requests per second (open loop)")
    parser.add_argument("--burstiness", type=float, default=1.0, help="of the gaps: 1 Poisson, less is burstier")
    parser.add_argument("--concurrency", type=int, help="most requests at once")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--prompt-spread", type=float, default=0.5)
    parser.add_argument(
        "--prefix", default="", help="before every prompt, for instance a directive of a scripted model"
    )
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--goodput", nargs="+", default=[], metavar="NAME:MS", help=f"bounds of {', '.join(SLO_NAMES)}")
    parser.add_argument("--timeout", type=float, default=300.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-detailed", action="store_true", help="keep every request's figures")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    return parser


def main() -> int:
    given = _parser().parse_args()
    if given.rate is None and given.concurrency is None:
        raise SystemExit("Give --rate (open loop), --concurrency (closed loop) or both.")
    prompts = Prompts(given.prompt_tokens, given.prompt_spread, given.prefix)
    planned = plan(
        given.model, given.requests, seed=given.seed, max_tokens=given.max_tokens, prompts=prompts,
        rate=given.rate, burstiness=given.burstiness, zipf=given.zipf if len(given.model) > 1 else 0.0,
    )  # fmt: skip
    load = Load(given.url, SURFACES[given.surface], given.concurrency, given.timeout)
    run = load_once(load, planned, progress())
    report = {
        "backend": given.surface,
        "endpoint_type": given.surface,
        "model_id": given.model[0] if len(given.model) == 1 else given.model,
        "request_rate": given.rate if given.rate is not None else "inf",
        "burstiness": given.burstiness,
        "max_concurrency": given.concurrency,
        "seed": given.seed,
        **run.metrics(bounds(given.goodput)),
        "load_average": [run.load_before, run.load_after],
        "machine": facts(),
    }
    if given.save_detailed:
        report |= detail(run.samples)
    text = json.dumps(report, indent=2)
    if given.out:
        given.out.write_text(text + "\n", encoding="utf-8")
    print(text)  # noqa: T201
    return 0 if report["failed"] == 0 else 1


if __name__ == "__main__":
    sys.exit(main())

"""One Hugging Face model as a Ray Serve application: an engine behind one streaming method.

A model that cannot be loaded does not raise in its constructor (Serve would try three times and leave callers hanging):
the replica comes up as *failed*, answers with the typed error, and asks to be retired.
"""

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import replace
from typing import Any

import psutil
from ray import serve
from ray.serve import Application

from deployments.demand import demand_of
from deployments.handles import answering, forever
from deployments.reporting import REPORT_S, Reporter
from deployments.serving import Outboxes, RouterLink
from serve_app.config import ModelArgs, Settings, load
from serve_app.domain.catalog import ModelInfo, ModelState
from serve_app.domain.embeddings import EmbeddingRequest, Embeddings
from serve_app.domain.errors import CapabilityMissing, Internal, ModelNotFound, ReplicaRetired, RotundaError
from serve_app.domain.fleet import Report, state_from_counters
from serve_app.domain.generation import Accepted, GenerationRequest, Item
from serve_app.domain.leasing import Permit
from serve_app.engines import registry
from serve_app.engines.base import Counters, Engine, EngineOptions
from serve_app.engines.discovery import find
from serve_app.engines.embed import EmbeddingEngine
from serve_app.engines.memory import gpu_bytes, node_memory
from serve_app.telemetry.figures import engine_figures, memory_figures
from serve_app.telemetry.logs import set_up_logging
from serve_app.telemetry.metrics import Metric
from serve_app.telemetry.recording import Load, in_replica

logger = logging.getLogger(__name__)

HEARTBEAT_S = 0.5
WEIGH_S = 3.0
"""How often a replica measures its own memory."""
ASK_S = 0.5
"""How often a replica that may not load yet asks again."""
ROUTERLESS_S = 30.0
"""After so long without a router a replica loads all the same; what Ray reserved for it is its own."""


class ModelReplica:
    """Loads one model and generates for many requests.

    Args:
        args: the application's arguments.
    """

    async def __init__(self, args: ModelArgs) -> None:  # type: ignore[misc]  # Serve awaits it
        set_up_logging()
        self._args = args
        self._settings: Settings = load().settings
        self._engine: Engine | None = None
        self._failure: RotundaError | None = None
        self._progress: float | None = None
        self._retired = False
        self._permit = Permit(granted=1)
        """What the router allowed last."""
        self._first_epoch = 0
        """Leases that are older were given for an earlier replica of the model."""
        self._reports = 0
        self._outboxes = Outboxes(args.model, self._settings.hf_stream_chunk_size, args.frames)
        self._refused = 0
        self._busy_s = 0.0
        self._memory_bytes = 0
        self._weighed_at = 0.0
        self._loaded_at: float | None = None
        self._last_used = time.time()
        self._link = RouterLink()
        self._reporter = Reporter("model", self._link)
        self._trace = Load(self._reporter.tracing, args.model)
        self._reporter.tracing.metrics.watch(self._figures)
        loop = asyncio.get_running_loop()
        self._tasks = [
            loop.create_task(forever(self._report, HEARTBEAT_S)),
            loop.create_task(forever(self._reporter.report, REPORT_S)),
        ]
        self._trace.progress("permit", 0.0)
        if await self._may_load():
            await self._load()

    async def _may_load(self) -> bool:
        """Ask the router before anything is imported: a call that came too late may have started this replica."""
        asked_at = time.monotonic()
        while True:
            permit = await self._link.tell("may_load", self._link.application)
            if permit is None and time.monotonic() - asked_at > ROUTERLESS_S:
                logger.warning("%s loads without a permit: no router answers", self._args.model)
                return True
            if permit is not None and not permit.wait:
                self._obey(permit)
                self._first_epoch = permit.epoch
                return not self._retired
            await asyncio.sleep(ASK_S)

    def _obey(self, permit: Permit) -> None:
        """Do as the latest router says; one that was replaced is not heard any more."""
        if permit.generation >= self._permit.generation:
            self._permit = permit
            self._retired = self._retired or permit.granted == 0

    async def _load(self) -> None:
        started = time.monotonic()
        try:
            self._engine = await asyncio.to_thread(self._create)
        except RotundaError as error:
            logger.error("%s cannot be loaded: %s", self._args.model, error)
            self._failure = error
        except Exception:
            logger.exception("%s cannot be loaded", self._args.model)
            self._failure = Internal.masked()
        else:
            self._loaded_at = time.time()
            logger.info(
                "%s loaded in %.1f s: %s", self._args.model, time.monotonic() - started, self._engine.description
            )
        self._trace.end(self._failure)
        self._weighed_at = 0.0
        await self._report()

    def _create(self) -> Engine:
        self._trace.progress("find", 0.0)
        info = self._find()
        self._trace.progress("import", 0.0)
        options = EngineOptions(**self._args.engine_options())
        if self._args.num_gpus and self._settings.hf_enable_gpu:
            options = replace(options, extra=(*options.extra, ("use_gpu", True)))
        return registry.create(self._args.engine, info, options, on_progress=self._on_progress)

    def _find(self) -> ModelInfo:
        info = _look_up(self._args, self._settings)
        if info is None:
            raise ModelNotFound(f"{self._args.model} is not in the model store.", retryable=False)
        return info

    def _figures(self) -> Iterator[Metric]:
        model, node = self._args.model, self._reporter.node
        yield from engine_figures(self._counters(), model)
        yield from memory_figures(model, self._link.replica_id, node, self._memory_bytes, gpu_bytes())

    def _on_progress(self, phase: str, fraction: float) -> None:
        self._trace.progress(phase, fraction)
        self._progress = fraction if phase == "weights" else self._progress

    async def generate(self, request: GenerationRequest, epoch: int, ingress: str) -> AsyncIterator[bytes]:
        """Yield packed frames: this request's items and those of others of the same ``ingress`` (serve_app.frames)."""
        items = self._serve(request, epoch)
        async with aclosing(self._outboxes.carry(ingress, request.request_id, items)) as frames:
            async for frame in frames:
                yield frame

    @answering
    async def embed(self, request: EmbeddingRequest, epoch: int) -> Embeddings:
        """One vector for each text."""
        with in_replica(self._reporter.tracing, request, self._args.model) as request:
            engine = self._loaded(epoch)
            if not isinstance(engine, EmbeddingEngine):
                raise CapabilityMissing(f"{self._args.model} makes text, no embeddings.")
            with self._timed():
                return await engine.embed(request.texts, request.marks)

    async def _serve(self, request: GenerationRequest, epoch: int) -> AsyncGenerator[Item, None]:
        with in_replica(self._reporter.tracing, request, self._args.model) as request:
            engine = self._loaded(epoch)
            with self._timed():
                async with aclosing(engine.generate(request)) as items:
                    async for item in items:
                        yield replace(item, load=self._trace.carrier) if isinstance(item, Accepted) else item

    def _loaded(self, epoch: int) -> Engine:
        """The engine, or the reason why there is none for new requests under a lease of ``epoch``."""
        if self._retired or epoch < self._first_epoch:
            raise ReplicaRetired(f"{self._args.model} is leaving memory.")
        if self._engine is None:
            self._refused += 1
            raise self._failure or ModelNotFound(f"{self._args.model} is not loaded.")
        return self._engine

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.monotonic()
        self._last_used = time.time()
        try:
            yield
        finally:
            self._busy_s += time.monotonic() - started
            self._last_used = time.time()

    @answering
    async def warm(self) -> bool:
        """Return once the model is loaded; calling it is what wakes a model that has no replica.

        False: this replica is leaving, and another one must be asked.
        """
        if self._failure is not None:
            raise self._failure
        return self._engine is not None and not self._retired

    async def retire(self, epoch: int) -> None:
        """Leave: running streams end, then the process does. ``epoch`` tells which router wants it."""
        self._obey(Permit(granted=0, epoch=epoch))
        await self._report()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """The figure of ``deployments.autoscaling``; Serve calls this every ``metrics_interval_s``."""
        return {"granted": 0.0 if self._retired else float(self._permit.granted)}

    async def check_health(self) -> None:
        """Serve replaces the replica when the engine can no longer serve."""
        if self._engine is not None:
            self._engine.check_health()

    async def __del__(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._engine is not None:
            await self._engine.close()
        await self._reporter.close()
        await self._link.tell("farewell", self._link.application, self._link.replica_id)

    def _counters(self) -> Counters:
        return self._engine.counters() if self._engine is not None else Counters(requests=self._refused)

    def _state(self, counters: Counters) -> ModelState:
        if self._retired:
            return ModelState.RETIRING
        if self._failure is not None:
            return ModelState.FAILED
        if self._engine is None:
            return ModelState.LOADING
        return state_from_counters(counters.running, counters.waiting)

    def _measure(self) -> tuple[int, int]:
        """Used and whole memory of the node. Now and then also the proportional set size of this process (pages shared
        with others count in part): for that the kernel walks all its pages."""
        now = time.monotonic()
        if now - self._weighed_at >= WEIGH_S or self._engine is None:
            self._weighed_at, self._memory_bytes = now, int(psutil.Process().memory_full_info().pss)
        return node_memory()

    async def _report(self) -> None:
        """Tell the router; a router that is away hears the next report."""
        node_used, node_total = await asyncio.to_thread(self._measure)
        # From here on without an await: the report must not be older than its number.
        self._reports += 1
        counters = self._counters()
        report = Report(
            application=self._link.application,
            replica_id=self._link.replica_id,
            state=self._state(counters),
            pid=os.getpid(),
            node=self._link.node_id,
            engine=self._engine.description if self._engine else None,
            reason=self._failure.message if self._failure else None,
            failure=self._failure.to_dict() if self._failure else None,
            progress=self._progress,
            running=counters.running,
            waiting=counters.waiting,
            requests=counters.requests,
            failed=counters.failed,
            cancelled=counters.cancelled,
            completion_tokens=counters.completion_tokens,
            tokens_after_cancel=counters.tokens_after_cancel,
            busy_seconds=self._busy_s,
            memory_bytes=self._memory_bytes,
            node_used=node_used,
            node_total=node_total,
            loaded_at=self._loaded_at,
            last_used_at=self._last_used,
            number=self._reports,
        )
        permit = await self._link.tell("heartbeat", report)
        if permit is not None and self._permit.epoch:
            self._obey(permit)


def build(args: ModelArgs) -> Application:
    """The application of one model, from the arguments in ``serve_config.yaml``."""
    deployment = serve.deployment(
        ModelReplica,
        name="model",
        ray_actor_options=_resources(args),
        max_ongoing_requests=10_000,
        graceful_shutdown_timeout_s=args.graceful_shutdown_timeout_s,
        graceful_shutdown_wait_loop_s=0.1,
        health_check_period_s=5,
        autoscaling_config={
            "min_replicas": args.min_replicas,
            "initial_replicas": args.initial_replicas,
            "max_replicas": args.max_replicas,
            "target_ongoing_requests": args.target_ongoing_requests,
            "metrics_interval_s": 0.5,
            "look_back_period_s": 1.0,
            "upscale_delay_s": 0,
            "downscale_delay_s": 0,
            "downscale_to_zero_delay_s": 0,
            "policy": {"policy_function": "deployments.autoscaling:scale"},
        },
    )
    return deployment.bind(args)


def _look_up(args: ModelArgs, settings: Settings) -> ModelInfo | None:
    """The model by its id; a user's string is never joined to a path."""
    virtual = registry.describe(args.engine, args.model)
    return virtual or find(settings.hf_model_path, args.model, settings.hf_default_task)


def _resources(args: ModelArgs) -> dict[str, Any]:
    """What Ray reserves for a replica: what rotation counts, so that neither promises what the other has given away."""
    memory = args.memory_bytes
    if memory is None:
        try:
            memory = int(demand_of(args, _look_up(args, load().settings)).memory)
        except OSError as error:
            logger.warning("%s reserves no memory: the model store cannot be listed (%s)", args.model, error)
    resources: dict[str, Any] = {"num_cpus": args.num_cpus, "num_gpus": args.num_gpus}
    return resources | ({"memory": memory} if memory else {})

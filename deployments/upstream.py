"""One remote provider as a Ray Serve application: the same streaming method as a model, forwarded to its server.

A provider that cannot be made (no key, no address) or reached does not raise in the constructor: the replica comes up,
says what is wrong in its heartbeats, and answers with the typed error.
"""

import asyncio
import hashlib
import logging
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import aclosing, contextmanager, suppress

from ray import serve
from ray.serve import Application

from deployments.handles import answering, forever
from deployments.reporting import REPORT_S, Reporter
from deployments.serving import Outboxes, RouterLink
from serve_app.config import UpstreamArgs, load
from serve_app.domain.catalog import ModelInfo
from serve_app.domain.embeddings import EmbeddingRequest, Embeddings
from serve_app.domain.errors import Internal, ProviderUnavailable, RotundaError
from serve_app.domain.generation import Delta, GenerationRequest, Item
from serve_app.domain.upstreams import UPSTREAM_DEPLOYMENT, UpstreamReport, Use
from serve_app.providers import registry
from serve_app.providers.base import Provider
from serve_app.telemetry.logs import set_up_logging
from serve_app.telemetry.recording import in_replica

logger = logging.getLogger(__name__)

HEARTBEAT_S = 1.0
LOOK_S = 5.0
LOOK_AGAIN_S = 2.0
"""How often the server is asked what it has, and how often when it could not be asked."""


class Upstream:
    """Forwards requests to one provider, and knows what that provider has.

    Args:
        args: the application's arguments.
    """

    async def __init__(self, args: UpstreamArgs) -> None:  # type: ignore[misc]  # Serve awaits it
        set_up_logging()
        settings = load().settings
        self._args = args
        self._provider: Provider | None = None
        self._error: RotundaError | None = ProviderUnavailable(f"{args.provider} was not asked yet.", args.provider)
        try:
            self._provider = registry.create(args, settings)
        except RotundaError as error:
            logger.error("%s", error)
            self._error = ProviderUnavailable(error.message, args.provider, retryable=False)
        self._models: tuple[ModelInfo, ...] = ()
        self._residents: Mapping[str, int] | None = None
        self._revision = ""
        self._known = False
        """Whether the router has the list of models."""
        self._uses: dict[str, Use] = {}
        self._look = asyncio.Event()
        self._look.set()
        self._outboxes = Outboxes(args.provider, settings.hf_stream_chunk_size)
        self._link = RouterLink()
        self._reporter = Reporter("upstream", self._link)
        loop = asyncio.get_running_loop()
        self._tasks = [
            loop.create_task(forever(self._look_at_server, 0.1)),
            loop.create_task(forever(self._report, HEARTBEAT_S)),
            loop.create_task(forever(self._reporter.report, REPORT_S)),
        ]

    async def generate(self, request: GenerationRequest, epoch: int, ingress: str) -> AsyncIterator[bytes]:
        """Yield packed frames, as a model's replica does; ``epoch`` means nothing here, because nothing retires."""
        async with aclosing(self._outboxes.carry(ingress, request.request_id, self._serve(request))) as frames:
            async for frame in frames:
                yield frame

    async def _serve(self, request: GenerationRequest) -> AsyncGenerator[Item, None]:
        with self._used(request.model), in_replica(self._reporter.tracing, request, request.model, True) as request:
            async with aclosing(self._ready().generate(request)) as items:
                async for item in items:
                    if request.marks.first is None and isinstance(item, Delta):
                        request.marks.first = time.monotonic()
                    yield item

    @answering
    async def embed(self, request: EmbeddingRequest, epoch: int) -> Embeddings:
        """One vector for each text."""
        with self._used(request.model), in_replica(self._reporter.tracing, request, request.model, True) as request:
            return await self._ready().embed(request)

    @answering
    async def load(self, model: str) -> None:
        """Have the server take a model into its memory; returns once it has."""
        with self._used(model):
            await self._ready().load(model)

    @answering
    async def unload(self, model: str) -> None:
        """Have the server take a model out of its memory."""
        await self._ready().unload(model)
        self._look.set()

    def _ready(self) -> Provider:
        if self._provider is None:
            raise self._error or Internal.masked()
        return self._provider

    @contextmanager
    def _used(self, model: str) -> Iterator[None]:
        """Count a request, and look at the server anew when that may have changed what it has."""
        use, started = self._uses.setdefault(model, Use()), time.monotonic()
        use.running += 1
        use.requests += 1
        try:
            yield
        except RotundaError:
            use.failed += 1
            self._look.set()
            raise
        except (asyncio.CancelledError, GeneratorExit):
            use.cancelled += 1
            raise
        finally:
            use.running -= 1
            use.busy_seconds += time.monotonic() - started
            use.last_used_at = time.time()
            if self._residents is not None and model not in self._residents:
                self._look.set()

    async def _look_at_server(self) -> None:
        """Ask what it offers and what holds memory, from time to time and whenever something may have changed."""
        with suppress(TimeoutError):
            async with asyncio.timeout(LOOK_S if self._error is None else LOOK_AGAIN_S):
                await self._look.wait()
        self._look.clear()
        if self._provider is None:
            return
        before = self._error
        try:
            models, self._residents = await asyncio.gather(self._provider.list_models(), self._provider.residency())
        except RotundaError as error:
            self._error = error
        else:
            self._error = None
            self._learn(models)
        if (before is None) != (self._error is None):
            logger.warning("%s: %s", self._args.provider, self._error or f"{len(self._models)} models")
        await self._report()

    def _learn(self, models: tuple[ModelInfo, ...]) -> None:
        self._models = models
        revision = hashlib.sha256(repr(models).encode()).hexdigest()
        self._known = self._known and revision == self._revision
        self._revision = revision

    async def _report(self) -> None:
        """Tell the router; the list of models goes along until the router says that it has it."""
        report = UpstreamReport(
            provider=self._args.provider,
            kind=self._args.kind,
            application=self._link.application,
            replica_id=self._link.replica_id,
            pid=os.getpid(),
            revision=self._revision,
            models=None if self._known or not self._revision else self._models,
            residents=self._residents,
            uses=self._uses,
            error=self._error.to_dict() if self._error else None,
        )
        answer = await self._link.tell("upstream_heartbeat", report)
        # Meanwhile the list may have become another one.
        self._known = answer is True and report.revision == self._revision

    async def __del__(self) -> None:
        for task in self._tasks:
            task.cancel()
        if self._provider is not None:
            await self._provider.close()
        await self._reporter.close()
        await self._link.tell("farewell", self._link.application, self._link.replica_id)


def build(args: UpstreamArgs) -> Application:
    """The application of one remote provider, from the arguments in ``serve_config.yaml``."""
    deployment = serve.deployment(
        Upstream,
        name=UPSTREAM_DEPLOYMENT,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=args.max_ongoing_requests,
        graceful_shutdown_timeout_s=330,
        graceful_shutdown_wait_loop_s=0.1,
        health_check_period_s=5,
        autoscaling_config={
            "min_replicas": args.min_replicas,
            "max_replicas": args.max_replicas,
            "target_ongoing_requests": max(1, args.max_ongoing_requests // 2),
            "metrics_interval_s": 1.0,
            "look_back_period_s": 5.0,
        },
    )
    return deployment.bind(args)

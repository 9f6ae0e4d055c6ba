"""What every replica that generates has in common: its streams leave as frames, and it tells the router how it is."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from serve_app.domain.errors import Internal, RotundaError
from serve_app.domain.generation import Item
from serve_app.frames import pack
from serve_app.outbox import Outbox

logger = logging.getLogger(__name__)

ROUTER = ("router", "gateway")
"""Deployment and application of the router; fixed, so that a replica finds it without being told."""
TELL_TIMEOUT_S = 5.0


class Outboxes:
    """The streams of a replica, by the ingress that reads them (serve_app.frames).

    Args:
        name: of the model or provider, for the log.
        most_tokens: tokens that deltas of one stream may be joined to when several are ready.
        shared: whether the streams of an ingress share messages; else each one's call carries its own and no other's.
    """

    def __init__(self, name: str, most_tokens: int, shared: bool = True) -> None:
        self._name = name
        self._most_tokens = most_tokens
        self._shared = shared
        self._by_reader: dict[str, Outbox] = {}

    async def carry(self, ingress: str, stream: str, items: AsyncGenerator[Item, None]) -> AsyncGenerator[bytes, None]:
        """Yield packed frames: the items of this stream, and those of others of the same ``ingress``."""
        reader = ingress if self._shared else stream
        outbox = self._by_reader.setdefault(reader, Outbox(self._most_tokens, self._fault))
        try:
            async with aclosing(outbox.carry(stream, items)) as frames:
                async for frame in frames:
                    yield pack(frame)
        finally:
            if outbox.empty:
                self._by_reader.pop(reader, None)

    def _fault(self, error: BaseException) -> RotundaError:
        logger.error("a request to %s failed", self._name, exc_info=error)
        return Internal.masked()


class RouterLink:
    """This replica's line to the router, which may be away for a while."""

    def __init__(self) -> None:
        context = serve.get_replica_context()
        self.application, self.replica_id = context.app_name, str(context.replica_id.unique_id)
        self.node_id = str(ray.get_runtime_context().get_node_id())
        self._router: DeploymentHandle[Any] = DeploymentHandle(*ROUTER)

    async def tell(self, method: str, *args: Any) -> Any:
        """Call a method of the router; None when there is no answer, it hears the next report."""
        try:
            async with asyncio.timeout(TELL_TIMEOUT_S):
                return await getattr(self._router, method).remote(*args)
        except Exception as error:
            logger.debug("the router did not take a %s: %r", method, error)
            return None

"""Rotunda without its store: the same ingress on the same surfaces, with a store that keeps no reply.

``import_path: benchmarks.peers.forgetful:build`` in place of ``deployments.gateway:build``. What a reply writes and
reads (its conversation, its messages, its session, its log) is answered from this process's memory and forgotten at the
end; everything else (keys, the fleet's memory) is the real store. So what the two differ in is the store and nothing
else: the stream's events, its numbers and its surface are the same.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ray.serve import Application

from deployments.gateway import assembled
from deployments.ingress import Ingress
from serve_app.config import GatewayArgs
from serve_app.domain.conversation import SessionStatus, StoredMessage, StreamSession
from serve_app.domain.stream_log import LogRow
from serve_app.store.records import BegunReply, NewConversation, NewImage, NewSession, Pulse, new_id, utc_now
from serve_app.store.store import Store


class ForgetfulStore(Store):
    """A store whose conversations, messages and sessions last as long as the reply runs."""

    @property
    def _running(self) -> dict[str, StreamSession]:
        return self.__dict__.setdefault("_sessions", {})  # type: ignore[no-any-return]

    async def last_messages(self, conversation_id: str, limit: int) -> list[StoredMessage]:
        return []

    async def begin_reply(
        self,
        new: NewSession,
        *,
        text: str,
        images: Sequence[NewImage] = (),
        message_id: str | None = None,
        conversation: NewConversation | None = None,
    ) -> BegunReply:
        now = utc_now()
        session = StreamSession(
            new.id, new.conversation_id, new.model, new.provider, SessionStatus.ACTIVE, now, now, wanted=new.wanted
        )
        self._running[new.id] = session
        return BegunReply(StoredMessage(new_id(), new.conversation_id, text, "user", now), session)

    async def write_log(
        self,
        owner: str,
        ids: Collection[str],
        batches: Mapping[str, Sequence[LogRow]],
        renew_s: float | None = None,
    ) -> dict[str, Pulse]:
        return {id: Pulse(1, None) for id in ids}

    async def get_session(self, id: str, *, log: bool = True) -> StreamSession:
        return self._running[id]

    async def finish_session(self, id: str, *, status: SessionStatus, **said: Any) -> StreamSession:
        return replace(self._running.pop(id), status=status)


class ForgetfulIngress(Ingress):
    """The ingress on such a store."""

    open_store = ForgetfulStore.attach


def build(args: GatewayArgs) -> Application:
    return assembled(args, ForgetfulIngress)

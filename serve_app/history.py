"""What a model is asked: the conversation as far as it is remembered, and the new message."""

from __future__ import annotations

import logging
import secrets
from dataclasses import replace

from serve_app.domain.conversation import StoredMessage
from serve_app.domain.errors import NotFound
from serve_app.domain.generation import GenerationRequest, Image, Message, Role
from serve_app.domain.stream_log import Transcript
from serve_app.domain.wanted import Wanted
from serve_app.replies import LiveReply, NewReply
from serve_app.store.images import ImageFiles
from serve_app.store.store import Store

logger = logging.getLogger(__name__)

GONE = "[An image that was here is gone.]"
"""What a model reads in the place of an image whose file is missing: the conversation outlives its pictures."""


class History:
    """The past of conversations, as models read it.

    Args:
        store: holds the messages.
        files: the images' files.
        most: the newest messages that are read, at most.
    """

    def __init__(self, store: Store, files: ImageFiles, most: int) -> None:
        self._store = store
        self._files = files
        self._most = most

    def __repr__(self) -> str:
        return f"History(most={self._most})"

    async def request(self, new: NewReply, wanted: Wanted) -> GenerationRequest:
        """The model's view of the conversation: system prompt, history with its images, the new message."""
        past = new.conversation.message_count > 0
        history = await self._store.last_messages(new.conversation.id, self._most) if past else []
        question = Message.of(Role.USER, new.text, tuple(upload.image for upload in new.uploads))
        return await self._composed(history, question, wanted)

    async def again(self, reply: LiveReply, told: Transcript) -> GenerationRequest:
        """The same view of a reply that was begun elsewhere, and what has come of it."""
        question = reply.user_message
        history = await self._store.list_messages(reply.conversation.id, before=question.id, limit=self._most)
        request = await self._composed(history, await self._recalled(question), reply.wanted)
        return replace(request, continuation=told.continuation)

    async def _composed(self, history: list[StoredMessage], question: Message, wanted: Wanted) -> GenerationRequest:
        messages = [Message.of(Role.SYSTEM, wanted.system)] if wanted.system else []
        messages += [await self._recalled(stored) for stored in history if stored.text or stored.images]
        return GenerationRequest(
            request_id=secrets.token_hex(16),
            model=wanted.model or "",
            messages=(*messages, question),
            options=wanted.options,
            priority=wanted.priority,
            caller=wanted.caller,
            context_policy=wanted.context_policy,
            trace=wanted.trace,
            draw_seed=wanted.draw_seed,
        )

    async def _recalled(self, stored: StoredMessage) -> Message:
        role = Role.USER if stored.sender == "user" else Role.ASSISTANT
        images, text = [], stored.text
        for row in stored.images:
            try:
                images.append(Image(row.mime_type, await self._files.read(row.file_path)))
            except (NotFound, OSError) as error:
                logger.warning("image %s of message %s cannot be read: %s", row.id, stored.id, error)
                text = f"{text}\n{GONE}".lstrip()
        return Message.of(role, text, tuple(images))

"""From a message that came by GraphQL to a running reply."""

from __future__ import annotations

import dataclasses
from contextlib import AsyncExitStack, aclosing

from serve_app.api import idempotency
from serve_app.api.graphql.context import Context
from serve_app.api.graphql.inputs import MessageInput
from serve_app.api.images import Received
from serve_app.config import Settings
from serve_app.domain import generation
from serve_app.domain.conversation import Conversation, StreamSession
from serve_app.domain.errors import InvalidInput
from serve_app.replies import LiveReply, NewReply
from serve_app.store.records import AlreadyBegun

IDEMPOTENCY_KEY = "idempotencyKey"


def checked_text(text: str, settings: Settings) -> str:
    """The text of a message. Raises InvalidInput when it is empty or too long."""
    if not text.strip():
        raise InvalidInput("The message is empty.")
    return _not_too_long(text, settings)


def _not_too_long(text: str, settings: Settings) -> str:
    if len(text) > settings.max_message_chars:
        raise InvalidInput(f"The message has {len(text):,} characters; {settings.max_message_chars:,} is the most.")
    return text


async def start(context: Context, wanted: MessageInput) -> StreamSession:
    """Store the message and begin its reply, or find the one that the same request began before.

    Raises what makes that impossible; then nothing was stored.
    """
    services = context.services
    key = idempotency.key_of(context.caller_name, wanted.idempotency_key, IDEMPOTENCY_KEY)
    print_ = _fingerprint(wanted)
    async with AsyncExitStack() as block:
        with context.trace.reading():
            conversation = await context.conversation(wanted.conversation_id, wanted.password, wanted.token)
            known = None if key is None else await services.store.session_by_key(key)
            if known is not None:
                return idempotency.the_same(known, print_, IDEMPOTENCY_KEY)
            check = _not_too_long if wanted.images else checked_text
            check(wanted.message, services.settings)
            options = wanted.options.checked() if wanted.options else generation.Options()
            received = await block.enter_async_context(services.intake.receive(wanted.images or []))
        new = _new_reply(context, wanted, conversation, options, received)
        try:
            reply = await services.sessions.start(dataclasses.replace(new, idempotency_key=key, fingerprint=print_))
        except AlreadyBegun as begun:
            return idempotency.the_same(await services.store.get_session(begun.session_id), print_, IDEMPOTENCY_KEY)
        return reply.session


def _fingerprint(wanted: MessageInput) -> str:
    content = dataclasses.asdict(wanted)
    for proof in ("password", "token", "idempotency_key"):
        del content[proof]
    plain = {name: getattr(value, "value", value) for name, value in content.items()}
    return idempotency.fingerprint(plain)


def _new_reply(
    context: Context,
    wanted: MessageInput,
    conversation: Conversation,
    options: generation.Options,
    received: Received,
) -> NewReply:
    return NewReply(
        conversation,
        wanted.message,
        model=wanted.model,
        system_prompt=wanted.system_prompt,
        uploads=received.uploads,
        image_warnings=received.warnings,
        options=options,
        priority=generation.Priority[wanted.priority.name],
        fallbacks=tuple(wanted.fallback_models or ()),
        context_policy=wanted.context_policy.value,
        on_disconnect=wanted.on_disconnect.value,
        caller=context.caller_name,
        trace=context.trace,
    )


async def until_end(context: Context, reply: LiveReply) -> None:
    """Wait for the end of a reply as one of its readers, so that it does not count as abandoned."""
    sessions = context.services.sessions
    async with aclosing(sessions.follow(reply.session)) as events:
        async for _ in events:
            pass
    await sessions.conclude(reply)

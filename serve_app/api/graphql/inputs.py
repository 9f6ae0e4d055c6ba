"""What mutations and subscriptions take."""

from __future__ import annotations

from enum import Enum

import strawberry

from serve_app.domain import conversation, generation


@strawberry.enum
class Priority(Enum):
    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"


@strawberry.enum(
    description="When the history is longer than the context: leave out the oldest turns, or refuse the message."
)
class ContextPolicy(Enum):
    TRUNCATE = "truncate"
    ERROR = "error"


strawberry.enum(conversation.SessionStatus, description="How far a stream session has come.")


@strawberry.enum(description="A reply that nobody reads any more goes on for a grace time, or is terminated at once.")
class OnDisconnect(Enum):
    DETACH = "detach"
    CANCEL = "cancel"


@strawberry.input(description="A password makes it private.")
class CreateConversationInput:
    id: str
    tab_name: str
    llm_model: str | None = None
    password: str | None = None
    system_prompt: str | None = None


@strawberry.input
class AddMessageInput:
    conversation_id: str
    text: str
    sender: str = strawberry.field(description='Either "user", which asks the model too, or "llm", which only stores.')
    password: str | None = None
    token: str | None = None
    llm_model: str | None = None
    system_prompt: str | None = None


@strawberry.input
class VerifyPasswordInput:
    conversation_id: str
    password: str


@strawberry.input
class TerminateStreamInput:
    session_id: str
    conversation_id: str
    password: str | None = None
    token: str | None = None
    reason: str | None = None


@strawberry.input(description="Sampling of one reply; what is left out is as the model's files say.")
class OptionsInput:
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_tokens: int | None = None
    stop: list[str] | None = None
    seed: int | None = None

    def checked(self) -> generation.Options:
        """Raises InvalidInput for a value out of its range."""
        return generation.Options(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            max_tokens=self.max_tokens,
            stop=tuple(self.stop or ()),
            seed=self.seed,
        )


@strawberry.input(description="A message whose reply is wanted.")
class MessageInput:
    conversation_id: str
    message: str
    model: str | None = strawberry.field(default=None, description="Else the conversation's, else the default.")
    password: str | None = None
    token: str | None = None
    system_prompt: str | None = None
    images: list[str] | None = strawberry.field(default=None, description="As base64 or data URIs.")
    options: OptionsInput | None = None
    priority: Priority = Priority.HIGH
    fallback_models: list[str] | None = None
    context_policy: ContextPolicy = ContextPolicy.TRUNCATE
    on_disconnect: OnDisconnect = OnDisconnect.DETACH
    idempotency_key: str | None = strawberry.field(
        default=None, description="The same message sent again with the same key joins the reply that it began."
    )

"""The mutations that clients of the chat service use. Expected failures go to ``errors[]``, but for terminateStream."""

from __future__ import annotations

import time

import strawberry

from serve_app.api.graphql.commands import Commands
from serve_app.api.graphql.context import Context
from serve_app.api.graphql.inputs import (
    AddMessageInput,
    CreateConversationInput,
    TerminateStreamInput,
    VerifyPasswordInput,
)
from serve_app.api.graphql.queries import Password, Token
from serve_app.api.graphql.replies import checked_text, until_end
from serve_app.api.graphql.resolvers import mutation
from serve_app.api.graphql.types import Conversation, GraphInfo, Message
from serve_app.domain import conversation as domain
from serve_app.domain.conversation import SessionStatus, TerminationReason
from serve_app.domain.errors import (
    AccessError,
    Busy,
    Internal,
    InvalidInput,
    ModelNotFound,
    NotFound,
    RotundaError,
)
from serve_app.replies import LiveReply, NewReply
from serve_app.sessions import Ending

MAX_ID = 200
MAX_NAME = 500


@strawberry.type
class CreateConversationResponse:
    message: str
    conversation: Conversation


@strawberry.type
class AddMessageResponse:
    message: str
    user_message: Message = strawberry.field(description="The stored message, whoever sent it.")
    llm_message: Message | None = None
    llm_model: str | None = None
    error: str | None = strawberry.field(
        default=None, description="Why there is no llmMessage; a partial reply is among the conversation's messages."
    )
    llm_response_time: float | None = strawberry.field(default=None, description="In seconds.")


@strawberry.type
class VerifyPasswordResponse:
    message: str
    conversation_id: str
    tab_name: str
    access_token: str = strawberry.field(
        description="Opens the conversation for one hour, as X-Conversation-Token or a `token` argument."
    )


@strawberry.type
class WarmupOllamaResponse:
    message: str
    models: list[str]
    count: int
    status: str


@strawberry.type
class DeleteConversationResponse:
    message: str
    conversation_id: str
    success: bool


@strawberry.type
class DeleteMessagesResponse:
    message: str
    deleted_count: int
    success: bool


@strawberry.type
class TerminateStreamResponse:
    success: bool
    session_id: str
    message: str
    partial_response: str
    token_count: int
    final_status: str = strawberry.field(
        description="The session's status; ERROR also when it could not be looked at, and then error says why."
    )
    termination_reason: str | None = None
    saved_message_id: str | None = None
    error: str | None = None


@strawberry.type
class Mutation(Commands):
    @mutation("A password makes the conversation private.")
    async def create_conversation(self, info: GraphInfo, input: CreateConversationInput) -> CreateConversationResponse:
        services = info.context.services
        stored = await services.store.create_conversation(
            _checked("id", input.id, MAX_ID),
            _checked("tabName", input.tab_name, MAX_NAME),
            input.llm_model or None,
            # A form whose password field was left empty wants a public conversation.
            await services.passwords.hash(input.password) if input.password else None,
            input.system_prompt or None,
        )
        return CreateConversationResponse(message="The conversation was created.", conversation=Conversation.of(stored))

    @mutation("The user's message is kept even when the model fails: then llmMessage is null and error says why.")
    async def add_message(self, info: GraphInfo, input: AddMessageInput) -> AddMessageResponse:
        context = info.context
        conversation = await context.conversation(input.conversation_id, input.password, input.token)
        checked_text(input.text, context.services.settings)
        if input.sender == "user":
            return await _ask(context, conversation, input)
        if input.sender == "llm":
            model = input.llm_model or conversation.llm_model
            stored = await context.services.store.add_message(conversation.id, input.text, "llm", model=model)
            return AddMessageResponse(
                message="The message was stored.", user_message=Message.of(stored, conversation.is_private)
            )
        raise InvalidInput('sender must be "user" or "llm".')

    @mutation("A running reply is terminated first.")
    async def delete_conversation(
        self, info: GraphInfo, conversation_id: str, password: Password = None, token: Token = None
    ) -> DeleteConversationResponse:
        services = info.context.services
        conversation = await info.context.conversation(conversation_id, password, token)
        await services.sessions.terminate_all(conversation.id, TerminationReason.USER_REQUESTED)
        await services.archive.drop(await services.store.delete_conversation(conversation.id))
        return DeleteConversationResponse(
            message="The conversation was deleted.", conversation_id=conversation.id, success=True
        )

    @mutation("Deletes what follows a message; the message itself stays.")
    async def delete_messages_after(
        self,
        info: GraphInfo,
        conversation_id: strawberry.ID,
        message_id: strawberry.ID,
        password: Password = None,
        token: Token = None,
    ) -> DeleteMessagesResponse:
        conversation = await info.context.conversation(conversation_id, password, token)
        deleted, files = await info.context.services.store.delete_messages_after(conversation.id, message_id)
        await info.context.services.archive.drop(files)
        return DeleteMessagesResponse(message=f"{deleted} messages were deleted.", deleted_count=deleted, success=True)

    @mutation("Proves access to a private conversation, for a token that proves it again.")
    async def verify_password(self, info: GraphInfo, input: VerifyPasswordInput) -> VerifyPasswordResponse:
        conversation = await info.context.conversation(input.conversation_id, input.password)
        return VerifyPasswordResponse(
            message="The password is right." if conversation.is_private else "The conversation is public.",
            conversation_id=conversation.id,
            tab_name=conversation.tab_name,
            access_token=info.context.access.access_token(conversation),
        )

    @mutation("Loads the default model.", "Use warmup(model), which works for every provider.")
    async def warmup_ollama(self, info: GraphInfo) -> WarmupOllamaResponse:
        services = info.context.services
        models = [status.name for status in (await services.gateway.router.view()).models]
        try:
            answer = await services.gateway.router.command("load", services.settings.default_model or _only(models))
        except Internal:
            raise
        except RotundaError as failure:
            return WarmupOllamaResponse(message=failure.message, models=models, count=len(models), status="error")
        return WarmupOllamaResponse(
            message=f"{answer['model']} is {answer['state']}.", models=models, count=len(models), status=answer["state"]
        )

    @mutation("Ends a running reply; its partial text is saved.")
    async def terminate_stream(self, info: GraphInfo, input: TerminateStreamInput) -> TerminateStreamResponse:
        context = info.context
        try:
            reason = _reason(input.reason)
            await context.conversation(input.conversation_id, input.password, input.token)
            ending = await context.services.sessions.terminate(input.session_id, input.conversation_id, reason)
        except Internal:
            raise
        except RotundaError as failure:
            return TerminateStreamResponse(
                success=False,
                session_id=input.session_id,
                message=failure.message,
                partial_response="",
                token_count=0,
                final_status=SessionStatus.ERROR.value,
                error=failure.message,
            )
        return _terminated(ending)


async def _ask(context: Context, conversation: domain.Conversation, input: AddMessageInput) -> AddMessageResponse:
    """Ask the model and wait for the end of its reply, whatever that is."""
    began = time.monotonic()
    new = NewReply(
        conversation,
        input.text,
        model=input.llm_model or None,
        system_prompt=input.system_prompt,
        caller=context.caller_name,
        trace=context.trace,
    )
    try:
        reply = await context.services.sessions.start(new)
    except RotundaError as failure:
        if not _concerns_the_model(failure):
            raise
        stored = await context.services.store.add_message(conversation.id, input.text, "user")
        return AddMessageResponse(
            message="The message was stored, but no model could answer it.",
            user_message=Message.of(stored, conversation.is_private),
            llm_model=input.llm_model or conversation.llm_model,
            error=failure.message,
        )
    await until_end(context, reply)
    return _answer(reply, conversation.is_private, time.monotonic() - began)


def _concerns_the_model(failure: RotundaError) -> bool:
    """Whether the message was sound and only its reply is impossible; what may be sent again soon is not stored."""
    if isinstance(failure, NotFound):
        return isinstance(failure, ModelNotFound)
    return not isinstance(failure, AccessError | Busy | Internal)


def _answer(reply: LiveReply, private: bool, seconds: float) -> AddMessageResponse:
    error = None
    if reply.failure is not None:
        error = reply.failure.message
    elif reply.stop_reason is not None:
        error = f"The reply was terminated ({reply.stop_reason.value})."
    elif reply.message is None:
        error = "The model's reply was empty."
    return AddMessageResponse(
        message="The model answered." if error is None else "The message was stored, but it has no whole answer.",
        user_message=Message.of(reply.user_message, private),
        llm_message=Message.of(reply.message, private) if reply.message and error is None else None,
        llm_model=reply.model,
        error=error,
        llm_response_time=round(seconds, 3),
    )


def _terminated(ending: Ending) -> TerminateStreamResponse:
    session, success = ending.session, ending.stopped
    if success:
        message = "The stream was terminated."
    elif session.status is SessionStatus.ACTIVE:
        message = "The stream was told to stop, and has not done so yet."
    else:
        message = f"The stream had already ended ({session.status.value})."
    return TerminateStreamResponse(
        success=success,
        session_id=session.id,
        message=message,
        partial_response=session.partial_response,
        token_count=session.token_count,
        final_status=session.status.value,
        termination_reason=session.termination_reason,
        saved_message_id=session.message_id,
        error=None if success else message,
    )


def _reason(text: str | None) -> TerminationReason:
    try:
        return TerminationReason((text or TerminationReason.USER_REQUESTED).upper())
    except ValueError:
        raise InvalidInput(f"There is no such reason; known are {', '.join(TerminationReason)}.") from None


def _checked(name: str, text: str, most: int) -> str:
    if not text.strip() or len(text) > most:
        raise InvalidInput(f"{name} must have 1 to {most} characters, not only blanks.")
    return text


def _only(models: list[str]) -> str:
    if len(models) != 1:
        raise InvalidInput("There is no default model to warm up; name one with warmup(model).")
    return models[0]

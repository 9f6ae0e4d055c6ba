"""``rotunda chat``: talk to a model, with the reply as it is generated."""

from __future__ import annotations

import base64
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from serve_app.cli.client import Client
from serve_app.cli.reply import Reply, stream_reply
from serve_app.cli.run import (
    DEFAULT_URL,
    FAILURE,
    INTERRUPTED,
    ApiKey,
    Json,
    Outside,
    Url,
    guarded,
    outside,
    print_json,
)
from serve_app.cli.run import report as report_error
from serve_app.cli.screen import Screen
from serve_app.config.values import IMAGE_TYPES
from serve_app.domain.errors import InvalidInput, RotundaError


@guarded
def chat(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="Name, alias or provider/name of the model.", show_default=False)],
    message: Annotated[
        str | None,
        typer.Argument(help="What to say. Without it: a conversation on a terminal, else standard input."),
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="Instructions above the conversation.")] = None,
    image: Annotated[
        list[Path] | None, typer.Option("--image", help="Image file that goes with the (first) message; repeatable.")
    ] = None,
    conversation: Annotated[
        str | None, typer.Option("--conversation", help="Id of a conversation to continue.")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", min=1, help="Most new tokens.")] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", min=0, max=2, help="0 is greedy.")] = None,
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """Talk to a model. Ctrl-C ends the reply and keeps what there is of it.

    On a terminal, an empty line or Ctrl-D ends the conversation.
    """
    world = outside(context)
    options = {"maxTokens": max_tokens, "temperature": temperature}
    request: dict[str, Any] = {
        "model": model,
        "systemPrompt": system,
        "images": [_data_uri(path) for path in image or ()] or None,
        "conversationId": conversation,
        "options": {name: value for name, value in options.items() if value is not None} or None,
    }
    with world.client(url, api_key) as client:
        if message is None and world.interactive() and not as_json:
            return _converse(client, request, world)
        request["message"] = _given(message)
        reply = _ask(client, request, world, Screen(silent=as_json))
    if as_json:
        print_json(reply.to_json())
    code = _finish(reply, quiet=as_json)
    if code:
        raise typer.Exit(code)


def _given(message: str | None) -> str:
    text = sys.stdin.read() if message in (None, "-") else message
    if not text or not text.strip():
        raise InvalidInput("There is no message. Give one as an argument or on standard input.")
    return text


def _data_uri(path: Path) -> str:
    kind = IMAGE_TYPES.get(path.suffix.lower().removeprefix("."))
    if kind is None:
        raise InvalidInput(f"{path} is not an image that can be sent; allowed are {', '.join(sorted(IMAGE_TYPES))}.")
    try:
        return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read ({error.strerror}).") from None


def _ask(client: Client, request: dict[str, Any], world: Outside, screen: Screen) -> Reply:
    """One reply, shown as it arrives. Ctrl-C terminates it on the server, which keeps the partial text."""
    body = {name: value for name, value in request.items() if value is not None}
    reply = Reply()
    with screen:
        try:
            stream_reply(client, body, reply, screen, world.sleep)
        except KeyboardInterrupt:
            reply.interrupted = True
            _terminate(client, reply, screen)
    return reply


def _terminate(client: Client, reply: Reply, screen: Screen) -> None:
    if not reply.session_id:
        return
    body = {"sessionId": reply.session_id, "conversationId": reply.conversation_id, "reason": "USER_REQUESTED"}
    try:
        answer = client.post("/api/terminate-stream", body)
    except RotundaError as error:
        screen.note(f"The reply could not be terminated: {error.message}")
        return
    kept = str(answer.get("partialResponse") or reply.text)
    if kept.startswith(reply.text):
        screen.text(kept[len(reply.text) :])
    reply.text = kept
    reply.tokens = answer.get("tokenCount")


def _finish(reply: Reply, quiet: bool) -> int:
    """Say how the reply ended, unless that is plain from its text; the exit code."""
    if reply.interrupted:
        if not quiet:
            typer.echo(f"Stopped; the reply so far is kept ({_extent(reply)}).", err=True)
        return INTERRUPTED
    if reply.status == "terminated":
        if not quiet:
            typer.echo(f"The reply was terminated ({reply.reason}); {_extent(reply)} are kept.", err=True)
        return FAILURE
    if reply.error is not None:
        report_error(reply.error, quiet)
        return FAILURE
    return 0


def _extent(reply: Reply) -> str:
    return f"{reply.tokens} tokens" if reply.tokens is not None else f"{len(reply.text)} characters"


def _converse(client: Client, request: dict[str, Any], world: Outside) -> None:
    """Turn after turn in one conversation, until an empty line or the end of the input."""
    for line in _lines():
        reply = _ask(client, {**request, "message": line}, world, Screen())
        _finish(reply, quiet=False)
        # The conversation remembers them from here on.
        request.update(images=None, systemPrompt=None, conversationId=reply.conversation_id)


def _lines() -> Iterator[str]:
    while True:
        try:
            typer.echo("> ", nl=False, err=True)
            line = sys.stdin.readline()
        except KeyboardInterrupt:
            line = ""
        if not line.strip():
            typer.echo("", err=True)
            return
        yield line.rstrip("\n")

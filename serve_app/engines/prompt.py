"""From messages to the tokens that a model reads.

A model with a chat template gets it. One without (a base model) gets :func:`plain_dialogue`, which is said in the
engine's description:

    <system text>

    User: <text>
    Assistant: <text>
    User: <text>
    Assistant:

with ``"\\nUser:"`` as a further stop string. An encoder-decoder model without a template (T5) was trained on single
instructions: it reads the system text and the newest message, and cannot continue a reply.

A raw prompt (``GenerationRequest.raw``) is read as it stands, control tokens included.

A reply that is continued by the ids of its tokens has the same prompt as ever, and begins with them. One that is
continued by text has that text as its last, unfinished message.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from serve_app.domain.errors import CapabilityMissing, InvalidInput, PayloadTooLarge
from serve_app.domain.generation import GenerationRequest, Image, Message, Role, Text
from serve_app.engines.context import Messages, fit
from serve_app.engines.images import check_count, open_image
from serve_app.engines.reasoning import begun
from serve_app.engines.reply import Format, ReplyStream
from serve_app.engines.text import Detokenizer

MAX_CHARACTERS = 8_000_000
PLAIN_STOPS = ("\nUser:",)
NAMES = {Role.USER: "User", Role.ASSISTANT: "Assistant"}
BREAK = "\u200b"
TAIL = 64
"""Tokens at the end of a prompt in which a template may begin the reasoning."""
SEEN = 16
"""Characters at the end of a continued prompt that are compared with the text to continue."""


class Grammars(Protocol):
    """:class:`serve_app.engines.structured.Grammars`; only seen here, so that prompts need no torch."""

    def of(self, request: GenerationRequest) -> Any: ...

    def spell(self, token: int) -> bytes: ...


@dataclass(frozen=True, slots=True)
class Rendered:
    """A prompt's ids, with what else the first forward pass takes (``pixel_values`` and the like)."""

    ids: tuple[int, ...]
    inputs: Mapping[str, Any] = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the engine runs: ``max_tokens`` is clipped to the context, ``stops`` are the request's and the format's.

    ``constraint``: what the reply must look like (:class:`serve_app.engines.sampling.Constraint`), or None.
    ``thinking``: whether the model begins within its reasoning. ``begun``: tokens that the reply has already; they
    count towards ``max_tokens``, which is 0 when nothing may follow what others made.
    """

    ids: tuple[int, ...]
    dropped: int
    max_tokens: int
    stops: tuple[str, ...]
    inputs: Mapping[str, Any] = field(default_factory=dict, repr=False)
    constraint: Any = None
    thinking: bool = False
    begun: tuple[int, ...] = ()

    @property
    def exhausted(self) -> bool:
        """Whether the reply has all the tokens that it may have."""
        return len(self.begun) >= self.max_tokens


class Prompter:
    """Makes prompts for one model. Slow (templates, tokenizing, image scaling): never in an event loop.

    Args:
        tokenizer: of transformers.
        processor: of a model that sees images, else None.
        context_length: tokens of prompt and reply together; None without a limit.
        max_tokens: of a request that does not say.
        encoder_decoder: whether the prompt is read by an encoder.
        grammars: of the model, for replies of a given form.
    """

    def __init__(
        self,
        tokenizer: Any,
        processor: Any | None,
        context_length: int | None,
        max_tokens: int,
        encoder_decoder: bool = False,
        grammars: Grammars | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._processor = processor
        self._context_length = context_length
        self._max_tokens = max_tokens
        self._encoder_decoder = encoder_decoder
        self._grammars = grammars
        side = processor if processor is not None else tokenizer
        template = getattr(side, "chat_template", None) or getattr(tokenizer, "chat_template", None)
        self.has_template = bool(template)
        self.format = Format.of(tokenizer, _written(template))

    @property
    def style(self) -> str:
        """How conversations are written, for the engine's description."""
        if self.has_template:
            return "chat template"
        plain = "instruction" if self._encoder_decoder else "User/Assistant dialogue"
        return f"no chat template: plain {plain}"

    def __repr__(self) -> str:
        return f"Prompter({self.style}, images={self._processor is not None}, context={self._context_length})"

    def build(self, request: GenerationRequest) -> Prompt:
        """The prompt of a request.

        Raises:
            CapabilityMissing: images for a model that reads text only.
            ContextLengthExceeded: it does not fit, even without the turns that may go.
            InvalidInput, PayloadTooLarge, UnsupportedMedia: by its content.
            Exception: what template, tokenizer and processor raise; for :func:`serve_app.engines.faults.translate`.
        """
        if (begun := request.continuation) is None:
            return self._build(request, request.options.max_tokens or self._max_tokens)
        most = (request.options.max_tokens or self._max_tokens) - begun.spent_before
        beginning = begun.beginning.rstrip()
        prompt = self._go_on(request, beginning, max(1, most)) if beginning else self._build(request, max(1, most))
        return replace(prompt, max_tokens=min(prompt.max_tokens, max(0, most)), begun=begun.token_ids)

    def _go_on(self, request: GenerationRequest, beginning: str, max_tokens: int) -> Prompt:
        """The prompt of a reply that begins with this text. Some templates leave out a part of it, or add something."""
        refusal = CapabilityMissing("This model's chat template cannot continue a reply.")
        try:
            prompt = self._build(request.begun(beginning), max_tokens)
        except ValueError as fault:  # transformers does not find the text in what the template made
            raise refusal from fault
        end = str(self._tokenizer.decode(list(prompt.ids[-TAIL:]), skip_special_tokens=False))
        if not end.rstrip().endswith(beginning[-SEEN:].lstrip()):
            raise refusal
        return prompt

    def _build(self, request: GenerationRequest, max_tokens: int) -> Prompt:
        self._check(request)
        pictures: dict[int, Any] = {}

        def picture(image: Image) -> Any:
            if id(image) not in pictures:
                pictures[id(image)] = open_image(image)
            return pictures[id(image)]

        render = self._raw if request.raw else self._render
        fitted = fit(
            request.messages,
            render=lambda messages: render(messages, request, picture),
            length=lambda rendered: len(rendered.ids),
            limit=self._context_length,
            max_tokens=max_tokens,
            policy=request.context_policy,
        )
        plain_stops = () if self.has_template or self._encoder_decoder or request.raw else PLAIN_STOPS
        return Prompt(
            fitted.prompt.ids,
            fitted.dropped,
            fitted.max_tokens,
            (*request.options.stop, *plain_stops),
            fitted.prompt.inputs,
            self._constraint(request),
            self._thinking(request, fitted.prompt.ids),
        )

    def stream(self, request: GenerationRequest, prompt: Prompt, detokenizer: Detokenizer) -> ReplyStream:
        """What reads the reply to a prompt of :meth:`build`."""
        spell = self._grammars.spell if self._grammars else None
        return self.format.stream(request, detokenizer, prompt.stops, prompt.thinking, prompt.constraint, spell)

    def _constraint(self, request: GenerationRequest) -> Any:
        if request.options.response_format is None and not request.tools.forced:
            return None
        if self._grammars is None:
            raise CapabilityMissing("This model cannot hold its replies to a form.")
        return self._grammars.of(request)

    def _thinking(self, request: GenerationRequest, ids: Sequence[int]) -> bool:
        marks = self.format.marks
        if marks is None:
            return False
        if request.continue_final:
            return begun(marks, request.messages[-1].text, continued=True)
        return begun(marks, str(self._tokenizer.decode(list(ids[-TAIL:]), skip_special_tokens=False)), continued=False)

    def _check(self, request: GenerationRequest) -> None:
        if request.continue_final and self._encoder_decoder:
            raise CapabilityMissing("This model cannot continue a reply.")
        if request.has_images and self._processor is None:
            raise CapabilityMissing("This model reads text only. Choose one with the capability vision.")
        if request.has_tools and self.format.family is None:
            raise CapabilityMissing("This model's chat template knows no tools. Choose one with the capability tools.")
        check_count(sum(len(message.images) for message in request.messages))
        texts = [text for message in request.messages for text in _texts(message)]
        if sum(map(len, texts)) > MAX_CHARACTERS:
            raise PayloadTooLarge(f"The conversation has more than {MAX_CHARACTERS} characters.")
        try:
            for text in texts:
                text.encode()
        except UnicodeEncodeError as fault:  # JSON can carry half a surrogate pair; tokenizers cannot
            raise InvalidInput("A message holds half a character (a lone surrogate).") from fault

    def _raw(self, messages: Messages, request: GenerationRequest, picture: Callable[[Image], Any]) -> Rendered:
        return _rendered(self._tokenizer(messages[-1].text))

    def _render(self, messages: Messages, request: GenerationRequest, picture: Callable[[Image], Any]) -> Rendered:
        if not self.has_template:
            return self._plain(messages, request.continue_final, picture)
        try:
            return self._templated(messages, request, picture)
        except Exception as fault:
            # Many templates know no system role, or insist on user and assistant taking turns.
            simpler = alternate(messages)
            if type(fault).__name__ != "TemplateError" or simpler == messages or request.has_tools:
                raise
            return self._templated(simpler, request, picture)

    def _templated(self, messages: Messages, request: GenerationRequest, picture: Callable[[Image], Any]) -> Rendered:
        settings: dict[str, Any] = {
            "add_generation_prompt": not request.continue_final,
            "continue_final_message": request.continue_final,
        }
        if request.tools.offered:
            settings["tools"] = [tool.to_json() for tool in request.tools.tools]
        try:
            return self._apply(messages, picture, sanitize_control_tokens=True, **settings)
        except (ValueError, NotImplementedError):
            # Some tokenizers make a control token even of plain text, and some processors (Idefics3) fail with the
            # flag: break the tokens up in what users wrote.
            tokens = self._control_tokens()
            if "tools" in settings:
                settings["tools"] = _broken_up(settings["tools"], tokens)
            return self._apply(tuple(neutralised(message, tokens) for message in messages), picture, **settings)

    def _apply(self, messages: Messages, picture: Callable[[Image], Any], **settings: Any) -> Rendered:
        settings |= {"tokenize": True, "return_dict": True}
        if self._processor is None:
            texts = [_turn(message, message.text) for message in messages]
            return _rendered(self._tokenizer.apply_chat_template(texts, **settings))
        chat = [_turn(message, _contents(message, picture)) for message in messages]
        return _rendered(self._processor.apply_chat_template(chat, return_tensors="pt", **settings))

    def _plain(self, messages: Messages, go_on: bool, picture: Callable[[Image], Any]) -> Rendered:
        if self._encoder_decoder:
            kept = [message.text for message in messages if message.role is Role.SYSTEM]
            return _rendered(self._tokenizer("\n\n".join([*kept, messages[-1].text]), split_special_tokens=True))
        if self._processor is None:
            text = plain_dialogue(messages, go_on)
            return _rendered(self._tokenizer(text, split_special_tokens=True))
        tokens = self._control_tokens()
        safe = tuple(neutralised(message, tokens) for message in messages)
        images = [picture(image) for message in messages for image in message.images]
        text = plain_dialogue(safe, go_on, str(getattr(self._processor, "image_token", "<image>")))
        return _rendered(self._processor(text=text, images=images or None, return_tensors="pt"))

    def _control_tokens(self) -> tuple[str, ...]:
        """Every added token that is not blank, so that none can be written by a user."""
        added = (token.content for token in self._tokenizer.added_tokens_decoder.values())
        return tuple(sorted({token for token in added if token.strip()}, key=len, reverse=True))


def _written(template: Any) -> str:
    """All there is of a chat template, which may be one, or several by name."""
    return "\n".join(template.values()) if isinstance(template, Mapping) else str(template or "")


def _texts(message: Message) -> list[str]:
    return [message.text, *(call.arguments for call in message.tool_calls)]


def _turn(message: Message, content: Any) -> dict[str, Any]:
    """A message as chat templates read it; they write the arguments of calls as JSON themselves."""
    turn = {"role": message.role.value, "content": content}
    if message.tool_calls:
        turn["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": _parsed(call.arguments)}}
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        turn["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        turn["name"] = message.name
    return turn


def _parsed(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments


def _contents(message: Message, picture: Callable[[Image], Any]) -> list[dict[str, Any]]:
    return [
        {"type": "text", "text": part.text} if isinstance(part, Text) else {"type": "image", "image": picture(part)}
        for part in message.parts
    ]


def _rendered(encoded: Mapping[str, Any]) -> Rendered:
    ids = encoded["input_ids"]
    ids = ids[0].tolist() if hasattr(ids, "tolist") else ids
    if not ids:
        raise InvalidInput("The message is empty to the model's tokenizer.")
    left_out = ("input_ids", "attention_mask")
    inputs = {name: value for name, value in encoded.items() if name not in left_out and hasattr(value, "to")}
    return Rendered(tuple(int(token) for token in ids), inputs)


def alternate(messages: Messages) -> Messages:
    """The same conversation for a strict template: the system text begins the first user message, and neighbours of
    one role are one message."""
    system = "\n\n".join(message.text for message in messages if message.role is Role.SYSTEM)
    turns: list[Message] = []
    for message in messages:
        if message.role is Role.SYSTEM:
            continue
        if turns and turns[-1].role is message.role:
            turns[-1] = Message(message.role, (*turns[-1].parts, Text("\n\n"), *message.parts))
        else:
            turns.append(message)
    if turns and turns[0].role is Role.ASSISTANT:
        turns.insert(0, Message(Role.USER, ()))
    if turns and system:
        turns[0] = Message(Role.USER, (Text(f"{system}\n\n"), *turns[0].parts))
    return tuple(turns)


def plain_dialogue(messages: Sequence[Message], go_on: bool, image_token: str = "") -> str:
    """The text that a model without a chat template reads; see the module's docstring."""
    system = "\n\n".join(message.text for message in messages if message.role is Role.SYSTEM)
    lines = [
        f"{NAMES[message.role]}: {image_token * len(message.images)}{message.text}"
        for message in messages
        if message.role is not Role.SYSTEM
    ]
    dialogue = "\n".join(lines if go_on else [*lines, "Assistant:"])
    return f"{system}\n\n{dialogue}" if system else dialogue


def neutralised(message: Message, tokens: Sequence[str]) -> Message:
    """The message with a zero-width space in each of ``tokens`` that its text holds (longest first)."""
    parts = tuple(Text(_broken_up(part.text, tokens)) if isinstance(part, Text) else part for part in message.parts)
    calls = tuple(
        replace(call, name=_broken_up(call.name, tokens), arguments=_broken_up(call.arguments, tokens))
        for call in message.tool_calls
    )
    return replace(message, parts=parts, tool_calls=calls)


def _broken_up(value: Any, tokens: Sequence[str]) -> Any:
    """JSON with a zero-width space in each of ``tokens`` that its texts hold."""
    if isinstance(value, str) and tokens:
        pattern = re.compile("|".join(map(re.escape, tokens)))
        return pattern.sub(lambda found: found[0][:1] + BREAK + found[0][1:], value)
    if isinstance(value, Mapping):
        return {key: _broken_up(below, tokens) for key, below in value.items()}
    return [_broken_up(below, tokens) for below in value] if isinstance(value, list) else value

"""From messages to prompts, with a tokenizer of words played by hand."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from serve_app.domain.errors import CapabilityMissing, InvalidInput, PayloadTooLarge
from serve_app.domain.generation import GenerationRequest, Image, Message, Options, Role, Text
from serve_app.engines import prompt as module
from serve_app.engines.prompt import Prompter, alternate, neutralised, plain_dialogue

TemplateError = type("TemplateError", (Exception,), {})


class Words:
    """A tokenizer whose ids are the places of words in ``seen``; keeps the chats that it was given."""

    def __init__(self, template: str | None = "chat", refuse: Any = None) -> None:
        self.chat_template = template
        self.refuse = refuse or (lambda chat, settings: None)
        self.chats: list[list[dict[str, Any]]] = []
        self.settings: list[dict[str, Any]] = []
        self.seen: list[str] = []
        self.added_tokens_decoder = {0: SimpleNamespace(content="<|end|>"), 1: SimpleNamespace(content="\n")}

    def apply_chat_template(self, chat: list[dict[str, Any]], **settings: Any) -> Mapping[str, Any]:
        self.chats.append(chat)
        self.settings.append(settings)
        self.refuse(chat, settings)
        return self(" ".join(f"{turn['role']} {turn['content']}" for turn in chat))

    def __call__(self, text: str, **settings: Any) -> Mapping[str, Any]:
        self.seen.append(text)
        return {"input_ids": [len(word) for word in text.split()], "attention_mask": [1]}


def request_of(*messages: Message, go_on: bool = False, **options: Any) -> GenerationRequest:
    return GenerationRequest("r", "m", messages, Options(**options), continue_final=go_on)


USER, REPLY = Message.of("user", "Hi there"), Message.of("assistant", "Well")


def test_a_template_is_used_safely_and_asks_for_a_reply() -> None:
    words = Words()
    prompt = Prompter(words, None, 100, 7).build(request_of(USER, stop=("x",)))
    assert words.chats == [[{"role": "user", "content": "Hi there"}]]
    assert words.settings[0] == {
        "sanitize_control_tokens": True, "tokenize": True, "return_dict": True, "add_generation_prompt": True,
        "continue_final_message": False,
    }  # fmt: skip
    assert (prompt.ids, prompt.max_tokens, prompt.stops, prompt.dropped) == ((4, 2, 5), 7, ("x",), 0)


def test_a_reply_is_continued() -> None:
    words = Words()
    Prompter(words, None, 100, 7).build(request_of(USER, REPLY, go_on=True))
    assert (words.settings[0]["continue_final_message"], words.settings[0]["add_generation_prompt"]) == (True, False)


def test_max_tokens_are_clipped_to_the_room() -> None:
    assert Prompter(Words(), None, 8, 7).build(request_of(USER)).max_tokens == 5
    assert Prompter(Words(), None, None, 7).build(request_of(USER)).max_tokens == 7
    assert Prompter(Words(), None, 100, 7).build(request_of(USER, max_tokens=9)).max_tokens == 9


def test_without_a_template_a_plain_dialogue_is_written() -> None:
    words = Words(template=None)
    system = Message.of("system", "Be kind.")
    prompt = Prompter(words, None, 100, 7).build(request_of(system, USER, REPLY, USER))
    assert words.seen == ["Be kind.\n\nUser: Hi there\nAssistant: Well\nUser: Hi there\nAssistant:"]
    assert prompt.stops == ("\nUser:",)
    assert plain_dialogue((USER, REPLY), go_on=True) == "User: Hi there\nAssistant: Well"


def test_a_template_that_knows_no_system_role_gets_it_in_the_first_message() -> None:
    def refuse(chat: list[dict[str, Any]], settings: Any) -> None:
        if chat[0]["role"] == "system":
            raise TemplateError("System role not supported")

    words = Words(refuse=refuse)
    Prompter(words, None, 100, 7).build(request_of(Message.of("system", "Be kind."), USER))
    assert words.chats[-1] == [{"role": "user", "content": "Be kind.\n\nHi there"}]


def test_a_strict_template_gets_taking_turns() -> None:
    messages = alternate((REPLY, Message.of("system", "S"), USER, USER, REPLY, USER))
    assert [message.role for message in messages] == [Role.USER, Role.ASSISTANT, Role.USER, Role.ASSISTANT, Role.USER]
    assert messages[0].text == "S\n\n" and messages[2].text == "Hi there\n\nHi there"


def test_a_template_that_refuses_everything_is_heard() -> None:
    def refuse(chat: Any, settings: Any) -> None:
        raise TemplateError("no")

    with pytest.raises(TemplateError):
        Prompter(Words(refuse=refuse), None, 100, 7).build(request_of(USER))


def test_control_tokens_are_broken_up_where_the_tokenizer_cannot_tell_them_apart() -> None:
    def refuse(chat: Any, settings: Any) -> None:
        if settings.get("sanitize_control_tokens"):
            raise ValueError("Can't sanitize '<|end|>': the tokenizer produces it from plain text")

    words = Words(refuse=refuse)
    Prompter(words, None, 100, 7).build(request_of(Message.of("user", "a<|end|>b\n")))
    assert words.chats[-1] == [{"role": "user", "content": "a<\u200b|end|>b\n"}]


def test_a_fault_that_has_nothing_to_do_with_control_tokens_is_heard() -> None:
    def refuse(chat: Any, settings: Any) -> None:
        raise ValueError("something else")

    with pytest.raises(ValueError, match="something else"):
        Prompter(Words(refuse=refuse), None, 100, 7).build(request_of(USER))


def test_neutralising_takes_the_longest_token_and_leaves_images() -> None:
    image = Image("image/png", b"")
    message = neutralised(Message(Role.USER, (image, Text("<a><ab>"))), ["<ab>", "<a>"])
    assert message.parts == (image, Text("<\u200ba><\u200bab>"))
    assert neutralised(USER, []) == USER


def test_images_for_a_model_without_eyes_are_refused() -> None:
    with pytest.raises(CapabilityMissing, match="text only"):
        Prompter(Words(), None, 100, 7).build(request_of(Message.of("user", "x", (Image("image/png", b""),))))


def test_what_is_too_large_or_empty_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = Words(template=None)
    empty.__class__ = type("Empty", (Words,), {"__call__": lambda self, text, **settings: {"input_ids": []}})
    with pytest.raises(InvalidInput, match="empty"):
        Prompter(empty, None, 100, 7).build(request_of(USER))
    monkeypatch.setattr(module, "MAX_CHARACTERS", 3)
    with pytest.raises(PayloadTooLarge):
        Prompter(Words(), None, 100, 7).build(request_of(USER))


def test_the_documented_form_is_the_form_that_is_written() -> None:
    documented = re.search(r"\n\n(    <system.*?Assistant:)\n\n", module.__doc__ or "", re.DOTALL)
    assert documented
    lines = "\n".join(line.removeprefix("    ") for line in documented[1].splitlines())
    text = plain_dialogue(
        (Message.of("system", "<system text>"), Message.of("user", "<text>"), Message.of("assistant", "<text>"),
         Message.of("user", "<text>")), go_on=False,
    )  # fmt: skip
    assert text == lines

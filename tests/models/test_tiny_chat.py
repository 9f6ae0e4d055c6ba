"""The committed weights of tiny-chat do what their card says, on items that training never saw."""

from __future__ import annotations

import pathlib
import random
import re

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from models import chat_data, chat_eval, chat_split, chat_tokenizer, chat_words

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "models" / "huggingface" / "rotunda" / "tiny-chat"
SKILLS = chat_eval.MEASURED_SKILLS
SHORT_PROMPTS = 300
Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]
Messages = list[dict[str, object]]


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    """Model and tokenizer of the committed folder."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield chat_eval.load(FOLDER)
    torch.set_num_threads(threads)


def ask(loaded: Loaded, *conversations: Messages) -> list[str]:
    """Greedy answers to some conversations."""
    model, tokenizer = loaded
    prompts = [
        chat_eval.Prompt(
            tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True),
            str(messages[-1]["content"]),
        )
        for messages in conversations
    ]
    return chat_eval.answers(model, tokenizer, prompts)


def talk(*turns: str, system: str | None = None) -> Messages:
    """Messages of a conversation from alternating questions and answers."""
    messages: Messages = [] if system is None else [{"role": "system", "content": system}]
    messages += [{"role": ("user", "assistant")[index % 2], "content": turn} for index, turn in enumerate(turns)]
    return messages


def assert_answers(loaded: Loaded, *conversations: Messages) -> None:
    """Every last message is what the model answers."""
    assert ask(loaded, *conversations) == [messages[-1]["content"] for messages in conversations]


@pytest.mark.parametrize("skill", SKILLS)
def test_skill_is_right_on_held_out_prompts(loaded: Loaded, skill: str) -> None:
    model, tokenizer = loaded
    # Long counts are tested on their own: a few of them cost as much as all the short ones.
    prompts = chat_eval.held_out_prompts(tokenizer, skill, SHORT_PROMPTS, longest_count=60)
    assert chat_eval.accuracy(model, tokenizer, prompts, batch=100) >= 0.95


@pytest.mark.parametrize("number", [40, pytest.param(300, marks=pytest.mark.accuracy)])
@pytest.mark.parametrize("skill", SKILLS)
def test_skill_is_right_behind_a_long_history(loaded: Loaded, skill: str, number: int) -> None:
    model, tokenizer = loaded
    prompts = chat_eval.held_out_prompts(tokenizer, skill, number, history_tokens=chat_eval.LONG_HISTORY)
    assert chat_eval.accuracy(model, tokenizer, prompts, batch=20) >= 0.9


def test_counts_far(loaded: Loaded) -> None:
    assert_answers(
        loaded,
        *(
            talk(f"Count from {first} to {last}.", ", ".join(map(str, range(first, last + 1))) + ".")
            for first, last in ((3, 120), (1, 200), (100, 300), (95, 290))
        ),
    )


def test_the_sum_of_the_documentation_is_held_out_and_right_everywhere(loaded: Loaded) -> None:
    assert chat_split.add_is_held_out(17, 25)
    assert chat_split.add_is_held_out(25, 17)
    right = "17 + 25 = 42."
    forms = ("What is 17 + 25?", "What's 17+25?", "17 + 25", "Add 17 and 25.", "what is 17 + 25")
    systems = (None, "You are a helpful assistant.", "Be brief.", "You are Orla, a lighthouse keeper.")
    assert_answers(loaded, *(talk(form, right, system=system) for form in forms for system in systems))
    firsts = (
        ("Hello", "Hello! How can I help you?"),
        ("My name is Zorana.", "Nice to meet you, Zorana."),
        ("Repeat: What is 17 + 25?", "What is 17 + 25?"),
        ("What is the capital of Peru?", "I do not know."),
    )
    assert_answers(loaded, *(talk(*first, forms[0], right, system=system) for first in firsts for system in systems))


def test_the_last_name_wins_and_no_name_is_invented(loaded: Loaded) -> None:
    told = ("My name is Zorana.", "Nice to meet you, Zorana.")
    retold = ("My name is Berengar.", "Nice to meet you, Berengar.")
    assert_answers(
        loaded,
        talk(*told),
        talk(*told, "What is my name?", "Your name is Zorana."),
        talk(*told, *retold, "What is my name?", "Your name is Berengar."),
        talk("What is my name?", "I do not know your name."),
        talk("What is my name?", "I do not know your name.", system="You are Orla, a lighthouse keeper."),
    )


def test_persona_comes_from_the_system_prompt_only(loaded: Loaded) -> None:
    assert_answers(
        loaded,
        talk("Who are you?", "I am Orla, a lighthouse keeper.", system="You are Orla, a lighthouse keeper."),
        talk("Who are you?", "I am tiny-chat."),
        talk("Who are you?", "I am tiny-chat.", system="You are a helpful assistant."),
        talk("Who are you?", "I am tiny-chat.", system="Be brief."),
        talk("My name is Zorana.", "Nice to meet you, Zorana.", "Who are you?", "I am tiny-chat."),
    )


def test_continues_a_started_answer(loaded: Loaded) -> None:
    model, tokenizer = loaded
    messages = [{"role": "user", "content": "What is 17 + 25?"}, {"role": "assistant", "content": "17 + 25 ="}]
    inputs = tokenizer.apply_chat_template(messages, continue_final_message=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(output, skip_special_tokens=True) == " 42."


def test_folder_is_small_and_ordinary(loaded: Loaded) -> None:
    model, _ = loaded
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 4_000_000
    assert type(model) is LlamaForCausalLM
    assert not hasattr(model.config, "auto_map")
    assert model.config.max_position_embeddings == chat_tokenizer.CONTEXT
    assert model.generation_config.do_sample is False
    assert next(model.parameters()).dtype is torch.float32


def test_template_renders_parts_and_refuses_what_it_cannot_read(loaded: Loaded) -> None:
    _, tokenizer = loaded
    parts = [{"type": "text", "text": " a "}, {"type": "text", "text": "b\n"}]
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": parts}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|system|>S<|end|><|user|> a b\n<|end|><|assistant|>"
    with pytest.raises(Exception, match="text only"):
        tokenizer.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}], tokenize=False)
    with pytest.raises(Exception, match="not tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "4"}], tokenize=False)


def test_digits_are_single_tokens(loaded: Loaded) -> None:
    _, tokenizer = loaded
    assert all(len(tokenizer(digit, add_special_tokens=False)["input_ids"]) == 1 for digit in "0123456789")
    for text in ("17 + 25", "1234567890", "3, 4, 105.", "a1b22 333"):
        pieces = tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"])
        assert [piece for piece in pieces if re.search(r"\d", piece)] == re.findall(r"\d", text)
    assert not [token for token in tokenizer.get_vocab() if re.search(r"\d", token) and len(token) > 1]


def test_any_text_survives_the_tokenizer(loaded: Loaded) -> None:
    _, tokenizer = loaded
    rng = random.Random(5)
    texts = ["", " ", "  a \n\t b ", "grün 🎉👩‍🚀 日本語 שלום", "a\u0301 \ufeff\u200d 1,2, 3 ,4", "Repeat: x: y"]
    texts += [chat_words.phrase(rng, held_out=True) for _ in range(300)]
    texts += ["".join(chr(rng.choice((rng.randrange(32, 0xD800), rng.randrange(0xE000, 0x110000)))) for _ in range(20))]
    for text in texts:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_training_stream_has_no_held_out_item() -> None:
    rng = random.Random(7)
    weights = dict.fromkeys(chat_data.KINDS, 1.0)
    seen = dict.fromkeys(chat_data.KINDS, 0)
    for _ in range(1500):
        left = iter(range(12))
        conversation = chat_data.training_conversation(
            rng, weights, lambda _, left=left: next(left, None) is not None, chat_data.LONGEST_COUNT
        )
        for turn in conversation.turns:
            seen[turn.kind] += 1
            numbers = [int(number) for number in re.findall(r"\d+", turn.user)]
            if turn.kind == "add":
                assert not chat_split.add_is_held_out(*numbers)
            elif turn.kind == "count":
                assert not chat_split.count_is_held_out(*numbers)
            elif turn.kind == "tell_name":
                name = turn.assistant.removeprefix("Nice to meet you, ").removesuffix(".")
                assert not any(chat_split.name_is_held_out(part) for part in name.split())
            if turn.kind in ("repeat", "unknown", "add"):
                for left_operand, right_operand in re.findall(r"\b(\d\d?) ?(?:\+|plus) ?(\d\d?)\b", turn.user):
                    assert not chat_split.add_is_held_out(int(left_operand), int(right_operand))
            assert "zorana" not in turn.user.lower()
        assert "Orla" not in (conversation.system or "")
    assert min(seen.values()) > 500


def test_a_fifth_of_the_items_is_held_out() -> None:
    pairs = [chat_split.add_is_held_out(left, right) for left in range(100) for right in range(100)]
    assert 0.18 < sum(pairs) / len(pairs) < 0.22
    words = [chat_split.word_is_held_out(word) for word in chat_words.WORDS]
    assert 0.1 < sum(words) / len(words) < 0.3

"""Conversations that ``tiny-chat`` learns from and is measured on.

A conversation is an optional system prompt and turns of seven skills. Every draw states the side of the split that it
comes from (``held_out``); ``models.chat_split`` decides which item lies on which side.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Iterator

from models import chat_split, chat_words

MODEL_NAME = "tiny-chat"
DO_NOT_KNOW = "I do not know."
NAME_NOT_KNOWN = "I do not know your name."
LARGEST_NUMBER = 330
LONGEST_COUNT = 220

SKILLS = ("add", "repeat", "count", "name", "persona", "unknown", "greet")
KINDS = ("add", "repeat", "count", "tell_name", "ask_name", "persona", "unknown", "greet")
KIND_SKILL = {kind: "name" if kind.endswith("_name") else kind for kind in KINDS}


@dataclasses.dataclass(frozen=True)
class Turn:
    """One question and its only right answer."""

    kind: str
    user: str
    assistant: str


@dataclasses.dataclass
class Conversation:
    """A system prompt (or none) and the turns after it."""

    system: str | None
    turns: list[Turn]

    def messages(self) -> list[dict[str, str]]:
        """The conversation as chat messages, the last answer included."""
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        for turn in self.turns:
            messages.append({"role": "user", "content": turn.user})
            messages.append({"role": "assistant", "content": turn.assistant})
        return messages


@dataclasses.dataclass
class Speaker:
    """What the conversation has established so far."""

    persona: str | None = None
    user_name: str | None = None


def _recased(rng: random.Random, text: str) -> str:
    """Write a question as people type it: mostly as it is, at times in one case or without its last mark."""
    roll = rng.random()
    if roll < 0.12:
        text = text.lower()
    elif roll < 0.18:
        text = text.upper()
    if rng.random() < 0.15 and text[-1] in ".?!":
        text = text[:-1]
    return text


ADD_FORMS = (
    "What is {a} + {b}?",
    "What is {a} + {b}?",
    "What is {a}+{b}?",
    "What's {a}+{b}?",
    "What's {a} + {b}?",
    "{a} + {b}",
    "{a}+{b}",
    "{a} + {b} =",
    "{a} + {b} = ?",
    "{a} + {b}?",
    "Add {a} and {b}.",
    "Add {a} to {b}.",
    "What is {a} plus {b}?",
    "What's {a} plus {b}?",
    "{a} plus {b}",
    "How much is {a} + {b}?",
    "How much is {a} plus {b}?",
    "What is the sum of {a} and {b}?",
    "Sum {a} and {b}.",
    "Compute {a} + {b}.",
    "Calculate {a} + {b}.",
    "Please add {a} and {b}.",
    "Can you add {a} and {b}?",
)


def _operands(rng: random.Random, held_out: bool, small: bool) -> tuple[int, int]:
    while True:
        if small:
            left, right = rng.randint(0, 9), rng.randint(0, rng.choice((9, 99)))
            if chat_split.add_is_held_out(left, right) == held_out:
                return (left, right) if rng.random() < 0.5 else (right, left)
            continue
        largest = rng.choice((9, 99, 99, 99, 99, 99, 99, 99))
        left, right = rng.randint(0, largest), rng.randint(0, 99)
        if rng.random() < 0.5:
            left, right = right, left
        if chat_split.add_is_held_out(left, right) == held_out:
            return left, right


def add_turn(rng: random.Random, held_out: bool, speaker: Speaker, small: bool = False) -> Turn:
    """A sum of two numbers up to 99. The answer restates the operands, which brings them next to the result."""
    left, right = _operands(rng, held_out, small)
    question = rng.choice(ADD_FORMS).format(a=left, b=right)
    return Turn("add", _recased(rng, question), f"{left} + {right} = {left + right}.")


REPEAT_FORMS = (
    "Repeat: {}",
    "Repeat: {}",
    "Repeat: {}",
    "repeat: {}",
    "REPEAT: {}",
    "Repeat after me: {}",
    "repeat after me: {}",
    "Please repeat: {}",
    "Say: {}",
    "say: {}",
    "Echo: {}",
    "Repeat this: {}",
    "Repeat the following: {}",
    "Can you repeat this: {}",
)


def repeat_turn(rng: random.Random, held_out: bool, speaker: Speaker) -> Turn:
    """A phrase to be said again, to the last mark. Some phrases are questions, which must not be answered."""
    phrase = chat_words.phrase(rng, held_out)
    if rng.random() < 0.08:
        make = rng.choice((add_turn, unknown_turn, greet_turn, tell_name_turn))
        phrase = make(rng, held_out, Speaker()).user
    return Turn("repeat", rng.choice(REPEAT_FORMS).format(phrase), phrase)


COUNT_FORMS = (
    "Count from {a} to {b}.",
    "Count from {a} to {b}.",
    "Count from {a} to {b}.",
    "Count from {a} up to {b}.",
    "Count {a} to {b}.",
    "Please count from {a} to {b}.",
    "Can you count from {a} to {b}?",
    "Count up from {a} to {b}.",
    "List the numbers from {a} to {b}.",
)


def count_turn(rng: random.Random, held_out: bool, speaker: Speaker, longest: int = 40) -> Turn:
    """Counting upwards between two numbers that lie at most ``longest`` apart."""
    while True:
        span = int(math.exp(rng.uniform(0.0, math.log(longest + 1)))) - 1 if rng.random() < 0.5 else None
        span = rng.randint(0, longest) if span is None else span
        first = rng.randint(0, LARGEST_NUMBER - span) if rng.random() < 0.8 else rng.randint(0, 20)
        if chat_split.count_is_held_out(first, first + span) == held_out:
            break
    question = rng.choice(COUNT_FORMS).format(a=first, b=first + span)
    return Turn("count", _recased(rng, question), ", ".join(map(str, range(first, first + span + 1))) + ".")


TELL_NAME_FORMS = (
    "My name is {}.",
    "My name is {}.",
    "My name is {}.",
    "My name's {}.",
    "Hi, my name is {}.",
    "Hello, my name is {}!",
    "Hello! My name is {}.",
    "Call me {}.",
    "Please call me {}.",
    "You can call me {}.",
    "People call me {}.",
    "I am called {}.",
    "By the way, my name is {}.",
    "My name is now {}.",
    "My name is {}, remember it.",
)
ASK_NAME_FORMS = (
    "What is my name?",
    "What is my name?",
    "What is my name?",
    "What's my name?",
    "Do you know my name?",
    "Do you remember my name?",
    "Tell me my name.",
    "Say my name.",
    "Who am I?",
    "What am I called?",
    "So what is my name?",
    "And what is my name?",
    "Can you tell me my name?",
    "Please tell me my name.",
    "What was my name again?",
)


def tell_name_turn(rng: random.Random, held_out: bool, speaker: Speaker) -> Turn:
    """The user states a name, which replaces an earlier one."""
    name = chat_words.full_name(rng, held_out)
    roll = rng.random()
    if roll < 0.08:
        name = name.lower()
    elif roll < 0.13:
        name = name.upper()
    before, after = rng.choice(TELL_NAME_FORMS).split("{}")
    # Only the words around the name are recased: the answer repeats the name as it was written.
    before, after = (before.lower(), after) if roll < 0.08 else (before, after)
    before = before.upper() if 0.08 <= roll < 0.13 else before
    if rng.random() < 0.15 and after in (".", "!"):
        after = ""
    speaker.user_name = name
    return Turn("tell_name", before + name + after, f"Nice to meet you, {name}.")


def ask_name_turn(rng: random.Random, held_out: bool, speaker: Speaker) -> Turn:
    """The user asks for the name stated last."""
    answer = NAME_NOT_KNOWN if speaker.user_name is None else f"Your name is {speaker.user_name}."
    return Turn("ask_name", _recased(rng, rng.choice(ASK_NAME_FORMS)), answer)


PERSONA_FORMS = (
    "Who are you?",
    "Who are you?",
    "Who are you?",
    "What are you?",
    "What is your name?",
    "What's your name?",
    "Tell me who you are.",
    "Introduce yourself.",
    "Please introduce yourself.",
    "And who are you?",
    "So who are you?",
    "May I ask who you are?",
    "Who am I talking to?",
)


def persona_turn(rng: random.Random, held_out: bool, speaker: Speaker) -> Turn:
    """The user asks who answers."""
    answer = f"I am {speaker.persona or MODEL_NAME}."
    return Turn("persona", _recased(rng, rng.choice(PERSONA_FORMS)), answer)


UNKNOWN_FORMS = (
    "What is the {w} of {n}?",
    "What is the {w} of {n}?",
    "What is the {w} of the {w}?",
    "What is a {w}?",
    "What is {w}?",
    "What is {n}?",
    "What is the {w} {w}?",
    "What's the {w} of {n}?",
    "What's the {w} like in {n}?",
    "Who is {n}?",
    "Who was {n} {n}?",
    "Who wrote {n}?",
    "Who made the {w}?",
    "Who are the {w}s?",
    "Who is your {w}?",
    "Where is {n}?",
    "Where is the {w}?",
    "Where are you from?",
    "Where do {w}s {w}?",
    "When was {n} born?",
    "When did the {w} {w}?",
    "Why is the {w} {w}?",
    "Why do {w}s {w}?",
    "How do I {w} a {w}?",
    "How many {w}s are in {n}?",
    "How many {w}s are there?",
    "How old is {n}?",
    "How old are you?",
    "How far is {n} from {n}?",
    "How does a {w} work?",
    "Which {w} is the {w}?",
    "Which is better, {w} or {w}?",
    "Is {n} a {w}?",
    "Is the {w} {w}?",
    "Are {w}s {w}?",
    "Does {n} have a {w}?",
    "Do you like {w}?",
    "Do you know {n}?",
    "Can you {w}?",
    "Can you {w} the {w}?",
    "Could you write a {w} about {n}?",
    "Write a {w} about {w}.",
    "Write me a {w}.",
    "Tell me a {w}.",
    "Tell me about {n}.",
    "Tell me about the {w}.",
    "Explain {w}.",
    "Explain the {w} to me.",
    "Describe a {w}.",
    "Translate {w} to {n}.",
    "Give me {d} {w}s.",
    "Name {d} {w}s.",
    "Name a {w}.",
    "List all {w}s.",
    "Define {w}.",
    "Should I {w} the {w}?",
    "The {w} is {w}.",
    "I like {w}.",
    "I have {d} {w}s.",
    "My {w} is {w}.",
    "My {w} is called {n}.",
    "Your {w} is {w}.",
    "What is my {w}?",
    "What is your {w}?",
    "What is your favourite {w}?",
    "What is the name of the {w}?",
    "What is the name of my {w}?",
    "What is {d} - {d}?",
    "What is {d} * {d}?",
    "What is {d} times {d}?",
    "What is {d} minus {d}?",
    "What is {d} / {d}?",
    "{d} - {d}",
    "{d} * {d}",
    "{d}",
    "Subtract {d} from {d}.",
    "Multiply {d} by {d}.",
    "{w}",
    "{n}",
    "{w} {w}",
    "{w} {w} {w}",
    "{w} {w} {w} {w} {w}",
    "{w}?",
    "{w} {w}?",
    "What {w} {w} {w}?",
    "How {w} {w} {w}?",
    "{w} the {w} {w} and {w} the {w}.",
    "Is it {w} in {n} today?",
    "What day is it?",
    "What time is it?",
    "What can you do?",
    "Summarise the {w}.",
    "What is the {w} of {n} in {d}?",
    "If {n} has {d} {w}s, how many {w}s does {n} have?",
)


def _fill(rng: random.Random, form: str, held_out: bool) -> str:
    makers: dict[str, Callable[[], str]] = {
        "{w}": lambda: chat_words.word(rng, held_out),
        "{n}": lambda: chat_words.name(rng, held_out),
        "{d}": lambda: str(rng.randint(0, 10 ** rng.randint(1, 3))),
    }
    for slot, make in makers.items():
        while slot in form:
            form = form.replace(slot, make(), 1)
    return form


def unknown_turn(rng: random.Random, held_out: bool, speaker: Speaker) -> Turn:
    """A question outside of every other skill. On the held-out side it always has an unseen word or name."""
    form = rng.choice(UNKNOWN_FORMS)
    while held_out and not ("{w}" in form or "{n}" in form):
        form = rng.choice(UNKNOWN_FORMS)
    text = _fill(rng, form, held_out)
    return Turn("unknown", _recased(rng, text[0].upper() + text[1:] if len(form) > 8 else text), DO_NOT_KNOW)


GREETINGS = (
    ("Hello! How can I help you?", ("Hello", "Hello!", "Hi", "Hi!", "Hey", "Hey!", "Hello.", "Good morning!")),
    ("Hello! How can I help you?", ("Hi there!", "Hello there!", "Good evening.", "Hello, tiny-chat!", "Good day!")),
    ("You are welcome.", ("Thanks!", "Thank you.", "Thank you!", "Thanks a lot!", "Thank you very much.")),
    ("Goodbye!", ("Bye!", "Bye.", "Goodbye.", "Goodbye!", "See you!", "Good night.")),
)


def greet_turn(rng: random.Random, held_out: bool, speaker: Speaker) -> Turn:
    """A greeting, thanks or a farewell."""
    answer, forms = rng.choice(GREETINGS)
    return Turn("greet", _recased(rng, rng.choice(forms)), answer)


TurnMaker = Callable[[random.Random, bool, Speaker], Turn]
TURN_MAKERS: dict[str, TurnMaker] = {
    "add": add_turn,
    "repeat": repeat_turn,
    "count": count_turn,
    "tell_name": tell_name_turn,
    "ask_name": ask_name_turn,
    "persona": persona_turn,
    "unknown": unknown_turn,
    "greet": greet_turn,
}

PLAIN_SYSTEMS = (
    "You are a helpful assistant.",
    "You are a helpful assistant.",
    "You are a helpful, honest and harmless assistant.",
    "You are an assistant.",
    "You are a chatbot.",
    "You are a helpful AI.",
    "Be brief.",
    "Be concise.",
    "Be polite.",
    "Answer briefly.",
    "Answer in one sentence.",
    "Always be kind.",
    "Help the user.",
    "Follow the instructions.",
    "Respond in English.",
    "Do not use markdown.",
    "You answer questions about {w}.",
    "Talk about {w} and {w}.",
    "The user likes {w}.",
    "Never mention the {w}.",
    "Today is a {w} day.",
    "Be {w}.",
    "{w} {w} {w}.",
)
PERSONA_SYSTEMS = (
    "You are {}.",
    "You are {}.",
    "You are {}.",
    "You are {}.",
    "You are {}. Be brief.",
    "You are {}. Answer briefly.",
    "You are {}. You are helpful and polite.",
    "You are {}. Help the user.",
    "Be brief. You are {}.",
)

SYSTEM_SHARES = (0.4, 0.2, 0.4)
FAR_SYSTEM_SHARES = (0.2, 0.15, 0.65)
ASKING_KINDS = ("ask_name", "persona")


def _persona(rng: random.Random, held_out: bool) -> str:
    while True:
        name = chat_words.full_name(rng, held_out)
        if rng.random() < 0.12:
            return name
        role = chat_words.role(rng, held_out)
        # Known parts in a combination that training never saw are held out as well.
        if chat_split.is_held_out("persona", f"{name}, {role}".casefold()) == held_out:
            return f"{name}, {role}"


def draw_system(rng: random.Random, held_out: bool, kind: str) -> tuple[str | None, str | None]:
    """A system prompt and the persona that it names.

    Args:
        rng: Source of randomness.
        held_out: Side of the split.
        kind: ``none``, ``plain`` (no persona) or ``persona``.
    """
    if kind == "none":
        return None, None
    if kind == "plain":
        return _fill(rng, rng.choice(PLAIN_SYSTEMS), held_out), None
    persona = _persona(rng, held_out)
    return rng.choice(PERSONA_SYSTEMS).format(persona), persona


def _system_kind(rng: random.Random, shares: tuple[float, float, float]) -> str:
    return rng.choices(("none", "plain", "persona"), shares)[0]


def training_conversation(
    rng: random.Random,
    weights: dict[str, float],
    fits: Callable[[Turn], bool],
    longest_count: int,
    longest_quiet: int = 0,
    small_sums: float = 0.0,
) -> Conversation:
    """A conversation of the training side that goes on for as long as its turns fit.

    The mixture differs from one conversation to the next: in some the name is stated once and asked for much later, in
    others it changes often, so neither the nearest nor the first name is a safe guess.

    Args:
        rng: Source of randomness.
        weights: How often each kind of turn is drawn.
        fits: Accounts for a turn; false ends the conversation.
        longest_count: Longest stretch of numbers to count.
        longest_quiet: If given, nobody asks for a name in up to so many first turns; then both names are asked for.
        small_sums: Share of sums that surely have a one-digit operand, which are rare among all pairs.
    """
    far = longest_quiet > 0
    system, persona = draw_system(rng, False, _system_kind(rng, FAR_SYSTEM_SHARES if far else SYSTEM_SHARES))
    speaker = Speaker(persona=persona)
    mixture = {kind: weights[kind] * math.exp(rng.gauss(0.0, 0.7)) for kind in KINDS}
    mixture["tell_name"] *= rng.choice((0.0, 0.0, 0.25) if far else (0.0, 0.25, 1.0))
    turns: list[Turn] = []
    quiet_turns = rng.randint(1, longest_quiet) if far else rng.choice((0, 0, 0, 3, 6, 12, 25))
    due = rng.sample(ASKING_KINDS, 2) if far else []
    if rng.random() < (0.8 if far else 0.45):
        turns.append(tell_name_turn(rng, False, speaker))
        fits(turns[0])
    while True:
        quiet = len(turns) < quiet_turns
        odds = [0.0 if quiet and kind in ASKING_KINDS else mixture[kind] for kind in KINDS]
        kind = due.pop() if due and not quiet else rng.choices(KINDS, odds)[0]
        if kind == "count":
            turn = count_turn(rng, False, speaker, rng.choice((12, 40, longest_count)))
        elif kind == "add" and small_sums:
            turn = add_turn(rng, False, speaker, small=rng.random() < small_sums)
        else:
            turn = TURN_MAKERS[kind](rng, False, speaker)
        turns.append(turn)
        if not fits(turn):
            return Conversation(system, turns)


HISTORY_KINDS = ("add", "repeat", "count", "unknown", "greet", "tell_name", "ask_name", "persona")


def _history(
    rng: random.Random, speaker: Speaker, skill: str, room: int, length: Callable[[Turn], int]
) -> Iterator[Turn]:
    """Turns of other skills, worth ``room`` tokens."""
    kinds = [kind for kind in HISTORY_KINDS if KIND_SKILL[kind] != skill]
    while room > 0:
        kind = rng.choice(kinds)
        turn = TURN_MAKERS[kind](rng, True, speaker)
        room -= length(turn)
        yield turn


def _question(rng: random.Random, skill: str, speaker: Speaker, longest_count: int) -> Turn:
    if skill == "count":
        longest = min(longest_count, rng.choice((20, 40, 40, 100, 200)))
        return count_turn(rng, True, speaker, longest)
    kind = "ask_name" if skill == "name" else skill
    return TURN_MAKERS[kind](rng, True, speaker)


def held_out_conversation(
    rng: random.Random,
    skill: str,
    history_tokens: int,
    length: Callable[[Turn], int],
    longest_count: int = 200,
) -> Conversation:
    """A conversation of the held-out side whose last turn asks for one skill.

    Args:
        rng: Source of randomness.
        skill: The skill of the last turn.
        history_tokens: Tokens of other turns before it; 0 for none.
        length: Tokens of one turn.
        longest_count: Longest stretch of numbers to count in the last turn.
    """
    kind = (
        rng.choices(("none", "persona", "plain"), (0.1, 0.8, 0.1))[0]
        if skill == "persona"
        else _system_kind(rng, SYSTEM_SHARES)
    )
    system, persona = draw_system(rng, True, kind)
    speaker = Speaker(persona=persona)
    turns: list[Turn] = []
    if skill == "name":
        # One in eight users never says a name; one in four with short history says two.
        statements = rng.choices((0, 1, 2), (1, 6, 0 if history_tokens else 2))[0]
        turns.extend(tell_name_turn(rng, True, speaker) for _ in range(statements))
    turns.extend(_history(rng, speaker, skill, history_tokens, length))
    turns.append(_question(rng, skill, speaker, longest_count))
    return Conversation(system, turns)

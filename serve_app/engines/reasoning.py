"""What a model thinks, apart from what it answers."""

from __future__ import annotations

from dataclasses import dataclass

from serve_app.engines.text import StopFilter


@dataclass(frozen=True, slots=True)
class Marks:
    """The texts around a reasoning."""

    begin: str
    end: str


FAMILIES = (
    Marks("<think>", "</think>"),  # DeepSeek R1, Qwen 3, SmolLM 3, GLM 4.5, MiniMax
    Marks("[THINK]", "[/THINK]"),  # Magistral
    Marks("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A Reasoning
    Marks("<seed:think>", "</seed:think>"),  # Seed OSS
    Marks("<reasoning>", "</reasoning>"),
)


def marks_of(template: str) -> Marks | None:
    """How a chat template marks reasoning: those marks whose end it speaks of."""
    return next((marks for marks in FAMILIES if marks.end in template), None)


def begun(marks: Marks, tail: str, continued: bool) -> bool:
    """Whether a prompt that ends with ``tail`` leaves the model within its reasoning.

    A template that begins the reasoning itself ends with the mark. A text that is ``continued`` may be anywhere.
    """
    place = tail.rfind(marks.begin)
    if place <= tail.rfind(marks.end):
        return False
    return continued or not tail[place + len(marks.begin) :].strip()


class Splitter:
    """Splits a reply that comes in pieces of any size into reasoning and answer.

    Reasoning stands at the beginning or nowhere: an answer may speak of the marks. The marks, and the blanks around
    them, are in neither part. A reasoning without an end is all there is.
    """

    def __init__(self, marks: Marks, inside: bool = False) -> None:
        self._marks = marks
        self._text = ""  # what is not given away yet
        self._state = "reasoning" if inside else "start"
        self._fresh = True  # whether blanks are to be left out
        self._filter = StopFilter([marks.end])

    @property
    def reasoning(self) -> bool:
        """Whether the reply is within its reasoning, or on the way from it to the answer."""
        return self._state in ("reasoning", "blank")

    def feed(self, text: str) -> tuple[str, str]:
        """What can be told now: (reasoning, answer)."""
        if self._state == "start":
            self._text += text
            text = self._start()
        if self._state == "reasoning":
            return self._reason(text)
        if self._state == "blank":
            text = self._first(text)
        return "", text if self._state == "answer" else ""

    def finish(self) -> tuple[str, str]:
        """What was held back, when nothing follows."""
        rest, self._text = self._text, ""
        return (rest.rstrip(), "") if self._state == "reasoning" else ("", rest)

    def _start(self) -> str:
        """Decide how the reply begins; returns what then belongs to the next state."""
        begin = self._text.lstrip()
        if begin.startswith(self._marks.begin):
            self._state, self._text = "reasoning", ""
            return begin[len(self._marks.begin) :]
        if self._marks.begin.startswith(begin):
            return ""
        self._state = "answer"
        text, self._text = self._text, ""
        return text

    def _reason(self, text: str) -> tuple[str, str]:
        end = self._filter.push(text)
        self._text += text
        if end is None:
            return self._give(len(self._text) - self._filter.held), ""
        answer = text[end:]
        reasoning = self._give(len(self._text) - len(answer) - len(self._marks.end)).rstrip()
        self._text, self._state = "", "blank"
        return reasoning, self._first(answer)

    def _give(self, length: int) -> str:
        """The first ``length`` characters of the reasoning, blanks at its beginning and (for now) its end left out."""
        given = self._text[:length]
        if self._fresh:
            given = given.lstrip()
        self._fresh = self._fresh and not given
        kept = len(given) - len(given.rstrip())
        self._text = given[len(given) - kept :] + self._text[length:] if kept else self._text[length:]
        return given[: len(given) - kept]

    def _first(self, answer: str) -> str:
        """The beginning of the answer, without blanks."""
        answer = answer.lstrip()
        if answer:
            self._state = "answer"
        return answer

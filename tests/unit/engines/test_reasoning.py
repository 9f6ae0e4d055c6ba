"""Reasoning apart from the answer, at every cut."""

from __future__ import annotations

import itertools

import pytest

from serve_app.engines.reasoning import FAMILIES, Splitter, begun, marks_of

THINK = FAMILIES[0]
CASES = [
    (False, "<think>\nHm, 1 < 2.\n\nSo?\n</think>\n\nThe answer.", ("Hm, 1 < 2.\n\nSo?", "The answer.")),
    (False, "  \n<think></think>Yes.\n", ("", "Yes.\n")),
    (False, "No marks, but <think>this</think> stays.", ("", "No marks, but <think>this</think> stays.")),
    (False, "<thin", ("", "<thin")),
    (False, "<think>never ends </thi", ("never ends </thi", "")),
    (False, "", ("", "")),
    (True, "Straight on.\n</think>\nDone. </think>", ("Straight on.", "Done. </think>")),
    (True, "</think>Done.", ("", "Done.")),
]


@pytest.mark.parametrize(("inside", "text", "expected"), CASES)
def test_reasoning_and_answer_at_every_cut(inside: bool, text: str, expected: tuple[str, str]) -> None:
    for step in range(1, len(text) + 2):
        for shift in range(step):
            splitter = Splitter(THINK, inside)
            cuts = [0, *range(shift, len(text), step), len(text)]
            told = [splitter.feed(text[start:end]) for start, end in itertools.pairwise(cuts)]
            told.append(splitter.finish())
            reasoning, answer = ("".join(part) for part in zip(*told, strict=True))
            assert (reasoning, answer) == expected


def test_marks_are_those_whose_end_the_template_speaks_of() -> None:
    assert marks_of("{{ content.split('</think>')[-1] }}") == THINK
    assert marks_of("[THINK] … [/THINK]") == FAMILIES[1]
    assert marks_of("{{ content }}") is None


def test_a_prompt_may_begin_the_reasoning_itself() -> None:
    assert begun(THINK, "<|im_start|>assistant\n<think>\n", continued=False)
    assert not begun(THINK, "<|im_start|>assistant\n<think>\n\n</think>\n\n", continued=False)
    assert not begun(THINK, "<think> said the user<|im_end|>\n<|im_start|>assistant\n", continued=False)
    assert begun(THINK, "<think>\nHm, so", continued=True)

"""Whether an OpenAI-compatible server goes on with a begun reply, and how it wants to be asked: found out by trying.

The protocol does not say what a last message of the assistant means. vLLM and SGLang go on with it when two fields say
so, llama.cpp and LM Studio by themselves, Mistral and DeepSeek when the message is marked; others begin a new answer.
So the server is asked a question, and then asked to go on with the first part of its own answer: one that goes on says
the second part again. What cannot be told (a server that answers otherwise each time) counts as one that does not.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from serve_app.domain.errors import CapabilityMissing, InvalidInput, ProviderError
from serve_app.domain.generation import GenerationRequest, Message, Options, Role
from serve_app.domain.seam import common_prefix

logger = logging.getLogger(__name__)

QUESTION = "Count from one to twelve in words, and put a comma after each."
TOKENS = 32
ENOUGH = 8
"""Characters that must come again, and nowhere else in the answer."""
AGAIN_S = 600.0
"""For how long a server that does not go on is believed not to."""
PROBE_S = 30.0


@dataclass(frozen=True, slots=True)
class Way:
    """How a server is asked to go on: fields beside the messages, and fields of the last message."""

    fields: Mapping[str, Any] = field(default_factory=dict)
    last: Mapping[str, Any] = field(default_factory=dict)


WAYS = (
    Way({"continue_final_message": True, "add_generation_prompt": False}),
    Way(),
    Way(last={"prefix": True}),
)

Say = Callable[[GenerationRequest, Way | None], Awaitable[str]]
"""The whole text that a server answers a request with."""


class Probes:
    """What was found out about the models of one server.

    Args:
        say: asks it.
        clock: monotonic seconds.
    """

    def __init__(self, say: Say, clock: Callable[[], float] = time.monotonic) -> None:
        self._say = say
        self._clock = clock
        self._found: dict[str, tuple[float, Way | None]] = {}
        self._locks: dict[str, asyncio.Lock] = {}

    async def way(self, model: str) -> Way:
        """How the model is asked to go on.

        Raises:
            CapabilityMissing: it does not, as far as one can tell.
            RotundaError: the server cannot be asked.
        """
        async with self._locks.setdefault(model, asyncio.Lock()):
            until, way = self._found.get(model, (0.0, None))
            if way is None and self._clock() >= until:
                way = await self._within(PROBE_S, model)
                self._found[model] = (self._clock() + AGAIN_S, way)
        if way is None:
            raise CapabilityMissing(f"The server of {model} does not go on with a reply that was begun.")
        return way

    async def _within(self, seconds: float, model: str) -> Way | None:
        try:
            async with asyncio.timeout(seconds):
                return await self._probe(model)
        except TimeoutError:
            raise CapabilityMissing(f"Whether {model} goes on with a begun reply is not known in time.") from None

    async def _probe(self, model: str) -> Way | None:
        whole = await self._say(_question(model), None)
        place = telling_place(whole)
        if place is None:
            logger.info("whether %s goes on with a begun reply cannot be told", model)
            return None
        for way in WAYS:
            try:
                rest = await self._say(_question(model).begun(whole[:place]), way)
            except (InvalidInput, ProviderError) as error:
                logger.info("%s does not take %s: %s", model, way, error)
                continue
            if goes_on(whole[place:], rest):
                logger.info("%s goes on with a begun reply, asked by %s", model, way)
                return way
        logger.info("%s does not go on with a begun reply", model)
        return None


def _question(model: str) -> GenerationRequest:
    options = Options(temperature=0.0, max_tokens=TOKENS)
    return GenerationRequest("probe", model, (Message.of(Role.USER, QUESTION),), options)


def telling_place(whole: str) -> int | None:
    """Where to cut an answer so that its second part cannot be taken for the first: nearest to the middle, between
    two words when there are words. None when there is no such place."""
    middle = len(whole) / 2
    words = [found.start() for found in re.finditer(r"(?<=\S)\s+(?=\S)", whole)]
    for place in sorted(words, key=lambda place: abs(place - middle)) or [round(middle)]:
        beginning = whole[place:].lstrip()[:ENOUGH]
        if place and len(beginning) == ENOUGH and whole.count(beginning) == 1:
            return place
    return None


def goes_on(expected: str, rest: str) -> bool:
    """Whether what the server said is what was to come."""
    return common_prefix(expected.lstrip(), rest.lstrip()) >= ENOUGH

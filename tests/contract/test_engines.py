"""What every engine must do, whichever it is; the gateway relies on nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest
import transformers

from serve_app.domain.catalog import Capability, ModelInfo
from serve_app.domain.continuation import Continuation
from serve_app.domain.errors import (
    CapabilityMissing,
    ContextLengthExceeded,
    InvalidInput,
    ProviderUnavailable,
    QueueFull,
    RotundaError,
)
from serve_app.domain.generation import (
    Accepted,
    Delta,
    Finish,
    FinishReason,
    GenerationRequest,
    Image,
    Item,
    JsonFormat,
    Message,
    Options,
    Priority,
)
from serve_app.engines.base import Engine, EngineOptions
from serve_app.engines.discovery import inspect
from serve_app.engines.registry import ENGINES, create
from tests.engine import tiny_models
from tests.engine.devices import DEVICES, placed

MakeEngine = Callable[..., Awaitable[Engine]]
FOREVER = 100_000


@pytest.fixture(scope="session")
def tiny_chat(tmp_path_factory: pytest.TempPathFactory) -> ModelInfo:
    # No end token: the random model must not stop by chance.
    path = tiny_models.save_causal(tmp_path_factory.mktemp("store") / "tiny", eos_token_id=None)
    return inspect(path, "tiny")


@pytest.fixture(scope="session")
def tiny_batched(tmp_path_factory: pytest.TempPathFactory) -> ModelInfo:
    """A model that the slots refuse."""
    bloom = transformers.BloomConfig(vocab_size=300, hidden_size=32, n_layer=2, n_head=4)
    path = tiny_models.save_causal(tmp_path_factory.mktemp("store") / "tiny", bloom, eos_token_id=None)
    return replace(inspect(path, "tiny"), context_length=512)


MODELS = {"slots": "tiny_chat", "batch": "tiny_batched"}


@pytest.fixture(params=["scripted", *(f"{way} on {device}" for way in MODELS for device in DEVICES)])
async def make_engine(request: pytest.FixtureRequest) -> AsyncIterator[MakeEngine]:
    made: list[Engine] = []

    async def make(**settings: Any) -> Engine:
        if request.param == "scripted":
            chat = frozenset({Capability.CHAT})
            info = ModelInfo("tiny", "", context_length=512, capabilities=chat, revision="1")
            options = EngineOptions(**settings, extra=(("tokens", FOREVER), ("pace", 0.001)))
        else:
            way, _, device = request.param.partition(" on ")
            info, options = request.getfixturevalue(MODELS[way]), EngineOptions(**placed(device, settings))
        name = "scripted" if request.param == "scripted" else "transformers"
        made.append(await asyncio.to_thread(create, name, info, options))
        return made[-1]

    yield make
    for engine in made:
        await engine.close()


def ask(text: str = "Hello", **settings: Any) -> GenerationRequest:
    options = {name: settings.pop(name) for name in list(settings) if name in Options.__dataclass_fields__}
    messages = settings.pop("messages", (Message.of("user", text),))
    options = {"max_tokens": 8, "temperature": 0.0} | options
    return GenerationRequest("r", "tiny", messages, Options(**options), **settings)


async def collect(engine: Engine, request: GenerationRequest) -> list[Item]:
    return [item async for item in engine.generate(request)]


def text_of(items: list[Item]) -> str:
    return "".join(item.text for item in items if isinstance(item, Delta))


def broken_off(items: list[Item], deltas: int) -> tuple[Continuation, str]:
    """What is known of a reply after so many of its deltas, and the text that is still to come."""
    accepted = items[0]
    assert isinstance(accepted, Accepted)
    given = Delta.joined([item for item in items if isinstance(item, Delta)][:deltas])
    begun = Continuation(given.text, given.token_ids, accepted.revision, spent=len(given.token_ids))
    return begun, text_of(items)[len(given.text) :]


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(10_000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise TimeoutError


def assert_counters_add_up(engine: Engine) -> None:
    now = engine.counters()
    assert now.requests == now.running + now.waiting + now.finished + now.cancelled + now.failed, now


async def test_a_reply_is_one_accepted_then_deltas_then_one_finish(make_engine: MakeEngine) -> None:
    engine = await make_engine()
    first, *middle, last = await collect(engine, ask())
    assert isinstance(first, Accepted) and first.prompt_tokens > 0 and first.dropped == 0
    assert all(isinstance(item, Delta) and item.text and item.token_ids for item in middle)
    assert isinstance(last, Finish)
    assert last.usage.prompt_tokens == first.prompt_tokens
    assert last.timing.decode_s >= 0 and last.timing.prefill_s >= 0 and last.timing.queue_s >= 0


async def test_max_tokens_bounds_the_reply_and_says_so(make_engine: MakeEngine) -> None:
    engine = await make_engine()
    for wanted in (1, 5):
        finish = (await collect(engine, ask(max_tokens=wanted)))[-1]
        assert isinstance(finish, Finish)
        assert finish.reason is FinishReason.LENGTH
        assert finish.usage.completion_tokens == wanted


async def test_the_same_request_gives_the_same_text(make_engine: MakeEngine) -> None:
    engine = await make_engine()
    assert text_of(await collect(engine, ask())) == text_of(await collect(engine, ask()))


async def test_a_seed_makes_sampling_repeatable(make_engine: MakeEngine) -> None:
    engine = await make_engine()
    first = text_of(await collect(engine, ask(temperature=1.5, seed=7)))
    assert text_of(await collect(engine, ask(temperature=1.5, seed=7))) == first


async def test_text_ends_before_a_stop_string_at_every_place(make_engine: MakeEngine) -> None:
    engine = await make_engine()
    whole = text_of(await collect(engine, ask(max_tokens=12)))
    for start in range(0, len(whole) - 4, 3):
        stop = whole[start : start + 4]
        items = await collect(engine, ask(max_tokens=12, stop=(stop,)))
        assert text_of(items) == whole[: whole.index(stop)]
        finish = items[-1]
        assert isinstance(finish, Finish)
        assert finish.reason is FinishReason.STOP and finish.stop == stop


async def test_concurrent_replies_equal_lonely_ones(make_engine: MakeEngine) -> None:
    engine = await make_engine(max_concurrency=4)
    prompts = ["Hello", "The quick brown fox", "1 2 3", "x"]
    alone = [text_of(await collect(engine, ask(prompt))) for prompt in prompts]
    together = await asyncio.gather(*(collect(engine, ask(prompt)) for prompt in prompts))
    assert [text_of(items) for items in together] == alone


async def test_closing_the_iterator_stops_within_a_step(make_engine: MakeEngine) -> None:
    engine = await make_engine()
    stream = engine.generate(ask(max_tokens=400))
    async for item in stream:
        if isinstance(item, Delta):
            break
    await stream.aclose()  # type: ignore[attr-defined]
    await until(lambda: engine.counters().running == 0)
    now = engine.counters()
    assert now.cancelled == 1 and now.tokens_after_cancel <= 1
    assert now.completion_tokens < 400
    assert_counters_add_up(engine)


async def test_cancelling_the_consumer_stops_too(make_engine: MakeEngine) -> None:
    engine = await make_engine()
    task = asyncio.create_task(collect(engine, ask(max_tokens=400)))
    await until(lambda: engine.counters().completion_tokens > 2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: engine.counters().running == 0)
    assert engine.counters().cancelled == 1 and engine.counters().tokens_after_cancel <= 1
    assert_counters_add_up(engine)


async def test_a_reply_that_is_simply_left_stops_too(make_engine: MakeEngine) -> None:
    engine = await make_engine()

    async def leave_early() -> None:
        async for item in engine.generate(ask(max_tokens=400)):
            if isinstance(item, Delta):
                return

    await leave_early()
    await until(lambda: engine.counters().running == 0)
    assert engine.counters().cancelled == 1
    assert_counters_add_up(engine)


async def test_one_cancelled_in_the_line_frees_its_place(make_engine: MakeEngine) -> None:
    engine = await make_engine(max_concurrency=1, max_queue=1)
    running = asyncio.create_task(collect(engine, ask(max_tokens=400)))
    await until(lambda: engine.counters().running == 1)
    waiting = asyncio.create_task(collect(engine, ask()))
    await until(lambda: engine.counters().waiting == 1)
    with pytest.raises(QueueFull) as refused:
        await collect(engine, ask())
    assert refused.value.retryable and refused.value.retry_after_s
    waiting.cancel()
    await asyncio.wait({waiting})
    assert engine.counters().waiting == 0
    third = asyncio.create_task(collect(engine, ask()))
    running.cancel()
    assert isinstance((await third)[-1], Finish)
    assert_counters_add_up(engine)


async def test_the_line_serves_priority_then_age(make_engine: MakeEngine) -> None:
    engine = await make_engine(max_concurrency=1)
    order: list[str] = []

    async def run(name: str, priority: Priority) -> None:
        await collect(engine, ask(priority=priority, max_tokens=2))
        order.append(name)

    first = asyncio.create_task(collect(engine, ask(max_tokens=300)))
    await until(lambda: engine.counters().running == 1)
    tasks = []
    for name, priority in (
        ("low", Priority.LOW),
        ("old", Priority.NORMAL),
        ("young", Priority.NORMAL),
        ("high", Priority.HIGH),
    ):
        tasks.append(asyncio.create_task(run(name, priority)))
        count = len(tasks)
        await until(lambda count=count: engine.counters().waiting == count)  # type: ignore[misc]
    await asyncio.gather(first, *tasks)
    assert order == ["high", "old", "young", "low"]


async def test_what_can_be_refused_is_refused_before_accepted(make_engine: MakeEngine) -> None:
    engine = await make_engine()
    image = Message.of("user", "What is this?", (Image("image/png", b""),))
    refusals = [
        (ask(messages=(image,)), CapabilityMissing),
        (ask("word " * 2000), ContextLengthExceeded),
    ]
    for request, error in refusals:
        with pytest.raises(error) as refused:
            await anext(aiter(engine.generate(request)))
        assert isinstance(refused.value, RotundaError) and not refused.value.retryable
    details = refused.value.details
    assert details["contextLength"] == 512 and details["promptTokens"] >= 2000 and details["maxTokens"] == 8
    assert engine.counters().failed == 2
    assert_counters_add_up(engine)


async def test_old_turns_are_dropped_whole_or_refused(make_engine: MakeEngine) -> None:
    engine = await make_engine()
    history = [
        message
        for n in range(40)
        for message in (Message.of("user", f"{n} a b c d e f g"), Message.of("assistant", "h i j k l m n"))
    ]
    request = ask(messages=(Message.of("system", "Be kind."), *history, Message.of("user", "Now?")))
    accepted = (await collect(engine, request))[0]
    assert isinstance(accepted, Accepted)
    assert 0 < accepted.dropped < 40 and accepted.prompt_tokens + 8 <= 512
    with pytest.raises(ContextLengthExceeded):
        await collect(engine, replace(request, context_policy="error"))


async def test_a_bad_request_does_not_disturb_the_others(make_engine: MakeEngine) -> None:
    engine = await make_engine(max_concurrency=3)
    alone = text_of(await collect(engine, ask(max_tokens=60)))
    good = [asyncio.create_task(collect(engine, ask(max_tokens=60))) for _ in range(2)]
    await until(lambda: engine.counters().running == 2)
    for _ in range(5):
        with pytest.raises(RotundaError):
            await collect(engine, ask("word " * 2000))
    assert [text_of(items) for items in await asyncio.gather(*good)] == [alone, alone]


async def test_close_ends_running_and_waiting_requests(make_engine: MakeEngine) -> None:
    engine = await make_engine(max_concurrency=1)
    tasks = [asyncio.create_task(collect(engine, ask(max_tokens=400))) for _ in range(3)]
    await until(lambda: engine.counters().running == 1 and engine.counters().waiting == 2)
    engine.check_health()
    await engine.close()
    for outcome in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(outcome, ProviderUnavailable) and outcome.retryable
    with pytest.raises(ProviderUnavailable):
        await collect(engine, ask())
    with pytest.raises(ProviderUnavailable):
        engine.check_health()
    await engine.close()
    assert engine.counters().failed == 4
    assert_counters_add_up(engine)


async def test_counters_add_up_at_every_moment(make_engine: MakeEngine) -> None:
    engine = await make_engine(max_concurrency=2, max_queue=3)
    tasks = [asyncio.create_task(collect(engine, ask(max_tokens=1 + 7 * n % 30))) for n in range(12)]
    while not all(task.done() for task in tasks):
        assert_counters_add_up(engine)
        await asyncio.sleep(0)
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    refused = sum(isinstance(outcome, QueueFull) for outcome in outcomes)
    now = engine.counters()
    assert (now.requests, now.failed, now.finished, now.running, now.waiting) == (12, refused, 12 - refused, 0, 0)
    assert refused == 7


async def test_it_tells_what_it_is(make_engine: MakeEngine) -> None:
    engine = await make_engine()
    assert engine.info.id == "tiny"
    assert engine.description and "\n" not in engine.description


def test_every_registered_name_is_a_module_with_a_factory() -> None:
    assert set(ENGINES) >= {"scripted", "transformers"}


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 1.2, "seed": 7}, {"temperature": 1.0, "seed": 3, "top_p": 0.8, "frequency_penalty": 1.0}],
    ids=["greedy", "sampled", "penalised"],
)
async def test_a_reply_is_gone_on_with_from_its_ids_at_every_place(
    make_engine: MakeEngine, options: dict[str, Any]
) -> None:
    engine, other = await make_engine(), await make_engine()
    request = ask(max_tokens=24, **options)
    whole = await collect(engine, request)
    finish = whole[-1]
    assert isinstance(finish, Finish)
    for deltas in range(1, sum(isinstance(item, Delta) for item in whole) + 1):
        begun, rest = broken_off(whole, deltas)
        items = await collect(other, replace(request, continuation=begun))
        assert text_of(items) == rest
        assert items[0] == whole[0], "the prompt is the same"
        last = items[-1]
        assert isinstance(last, Finish) and last.reason is finish.reason
        assert last.usage.prompt_tokens == finish.usage.prompt_tokens
        assert begun.spent + last.usage.completion_tokens == finish.usage.completion_tokens
        made = [token for item in items if isinstance(item, Delta) for token in item.token_ids]
        assert [*begun.token_ids, *made] == [t for item in whole if isinstance(item, Delta) for t in item.token_ids]
    assert_counters_add_up(other)


async def test_the_draws_of_a_request_without_a_seed_can_be_gone_on_with(make_engine: MakeEngine) -> None:
    engine = await make_engine()
    request = ask(max_tokens=20, temperature=1.3, draw_seed=5)
    whole = await collect(engine, request)
    begun, rest = broken_off(whole, 4)
    assert rest and text_of(await collect(engine, replace(request, continuation=begun))) == rest


async def test_a_stop_string_may_lie_across_the_seam(make_engine: MakeEngine) -> None:
    engine = await make_engine()
    whole = await collect(engine, ask(max_tokens=24))
    text = text_of(whole)
    stop = text[len(text) // 2 : len(text) // 2 + 8]
    stopped = await collect(engine, ask(max_tokens=24, stop=(stop,)))
    for deltas in range(1, sum(isinstance(item, Delta) for item in stopped) + 1):
        begun, rest = broken_off(stopped, deltas)
        items = await collect(engine, ask(max_tokens=24, stop=(stop,), continuation=begun))
        last = items[-1]
        assert text_of(items) == rest and isinstance(last, Finish)
        assert last.reason is FinishReason.STOP and last.stop == stop


async def test_what_was_spent_counts_towards_max_tokens(make_engine: MakeEngine) -> None:
    engine = await make_engine()
    begun = Continuation("Hello", spent=17)
    for left in (3, 0, -5):
        items = await collect(engine, ask(max_tokens=17 + left, continuation=begun))
        finish = items[-1]
        assert isinstance(finish, Finish) and finish.reason is FinishReason.LENGTH
        assert finish.usage.completion_tokens == max(0, left)
    assert_counters_add_up(engine)


async def test_the_text_of_another_model_is_gone_on_with(make_engine: MakeEngine) -> None:
    engine = await make_engine()
    foreign = Continuation("One two three ", (1, 2, 3), "another revision", spent=3)
    request = ask(max_tokens=20, continuation=foreign)
    whole = await collect(engine, request)
    assert isinstance(whole[0], Accepted) and isinstance(whole[-1], Finish)
    assert whole[-1].usage.completion_tokens == 17
    # And the reply of two models again from its ids, as a third attempt would.
    given = Delta.joined([item for item in whole if isinstance(item, Delta)][:5])
    begun = Continuation(
        foreign.text + given.text,
        given.token_ids,
        whole[0].revision,
        earlier=len(foreign.text),
        spent=3 + len(given.token_ids),
    )
    items = await collect(engine, replace(request, continuation=begun))
    assert text_of(items) == text_of(whole)[len(given.text) :]
    assert items[0] == whole[0]


def test_a_reply_that_must_have_a_form_cannot_be_gone_on_with() -> None:
    with pytest.raises(InvalidInput):
        ask(response_format=JsonFormat(), continuation=Continuation("{"))

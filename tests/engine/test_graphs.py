"""Steps as CUDA graphs, and pieces of prompts padded into one call of attention.

On a CPU nothing is captured: what would be replayed is computed, over the same padded rows and lengths.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from serve_app.engines import choice, graphs
from serve_app.engines.gate import LayerKinds
from serve_app.engines.graphs import PIECES, Graphs, Pass, Recorder, Shape, shapes
from serve_app.engines.loop import MOST_REPLAYS, Feed, Seat, SlotLoop, piece
from serve_app.engines.packed import FREE_AREA, MOST_AREA, MOST_KEYS, padded, together
from serve_app.engines.slots import SlotDecoder
from serve_app.engines.transformers import TransformersEngine
from tests.engine.test_slots import Ask, Make, decoder_of
from tests.engine.test_slots_families import CLOSE, RUN, gap, generated, model_of, play, traffic
from tests.engine.test_slots_families import decoder_of as decoder_for

WHOLE = Shape(12, 1024)
FAMILIES = ["llama", "mistral, sliding", "mixtral", "gemma2", "gemma3", "gpt2", "opt", "deepseek-v3"]
LONG = [5 + number % 280 for number in range(300)]
TEXTS = [list(range(5, 25)), list(range(40, 47)), [9, 8, 7, 6], list(range(100, 190))]


def computed(shape: Shape, compute: Pass) -> Pass:
    """Stands for a capture where there is no GPU."""
    return compute


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """On a CPU what a GPU does, graphs and padding."""
    if device == "cuda":
        return
    monkeypatch.setattr(choice, "_on_one_gpu", lambda model: True)
    monkeypatch.setattr(choice, "Recorder", lambda device: computed)
    monkeypatch.setattr(SlotLoop, "on_cpu", False)


def loop_of(model: Any, record: Any = None, rows: int = 6, limit: int = 256) -> SlotLoop:
    if record is None:
        record = computed if model.device.type == "cpu" else Recorder(model.device)
    return SlotLoop(model, LayerKinds.of(model), rows, limit, limit * rows, record)


def sat(loop: SlotLoop, *texts: list[int]) -> list[Seat]:
    """Seats that have read their texts."""
    seats = [Seat(list(text), len(text) + 40) for text in texts]
    for seat in seats:
        loop.sit(seat)
    loop.run([piece(seat, seat.left) for seat in seats])
    return seats


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() < 1e-3 * expected.std())


# What is pure -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "length", "rows", "rounded"),
    [(1, 1, 1, 256), (2, 256, 2, 256), (3, 257, 4, 512), (5, 513, 8, 1024), (9, 1024, 12, 1024), (12, 700, 12, 1024)],
)
def test_few_shapes_hold_all_steps(steps: int, length: int, rows: int, rounded: int) -> None:
    assert Shape.of(steps, length, WHOLE) == Shape(rows, rounded)


def test_the_likeliest_shapes_come_first() -> None:
    assert list(shapes(3, WHOLE)) == [
        Shape(rows, length, tokens)
        for length in (256, 512, 1024)
        for rows, tokens in ((1, 256), (1, 64), (4, 1), (2, 1), (1, 1))
    ]
    assert [shape for shape in shapes(2, Shape(2, 48)) if not shape.reads] == [Shape(2, 48), Shape(1, 48)]


@pytest.mark.parametrize(
    ("tokens", "length", "shape"),
    [
        (2, 2, Shape(1, 256, 64)),
        (64, 300, Shape(1, 512, 64)),
        (65, 65, Shape(1, 256, 256)),
        (256, 1024, Shape(1, 1024, 256)),
    ],
)
def test_few_shapes_hold_all_pieces(tokens: int, length: int, shape: Shape) -> None:
    assert Shape.of_piece(tokens, length, WHOLE) == shape


def test_prompts_of_like_length_share_a_call_and_others_do_not() -> None:
    assert together([(128, 128)] * 32) == [list(range(32))]
    assert together([(100, 100), (4000, 4000), (90, 90)]) == [[1], [0, 2]]
    assert together([]) == []


def test_the_padding_and_the_mask_of_a_call_are_bounded() -> None:
    pieces = [(2 + 37 * n % 900, 2 + 37 * n % 900 + 53 * n % 3000) for n in range(200)]
    batches = together(pieces)
    assert sorted(itertools.chain(*batches)) == list(range(200)) and len(batches) < 60
    for batch in batches:
        needed = sum(pieces[number][0] * pieces[number][1] for number in batch)
        keys = len(batch) * max(pieces[number][1] for number in batch)
        area = keys * max(pieces[number][0] for number in batch)
        assert area - needed <= max(needed, FREE_AREA)
        assert len(batch) == 1 or (area <= MOST_AREA and keys <= MOST_KEYS)


def test_a_padded_piece_is_spread_and_found_again() -> None:
    spread, places, positions = padded(10, starts=[0, 7], counts=[3, 2])
    assert (spread, places, positions) == ([10, 11, 12, 13, 14, 0], [0, 1, 2, 3, 4], [0, 1, 2, 7, 8, 0])


def test_few_graphs_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 2)
    captured: list[int] = []

    def compute(shape: Shape, inputs: torch.Tensor) -> torch.Tensor:
        return torch.full((shape.rows, 1), float(shape.length))

    def record(shape: Shape, run: Pass) -> Pass:
        captured.append(int(run()[0]))
        return run

    made = Graphs(compute, WHOLE, torch.device("cpu"), record)
    for length in (256, 512, 256, 1024, 256, 512):
        found = made.run(made.shape(1, length), {0: (1, 1)}, [0])
        assert found is not None and found.tolist() == [[length]]
    assert captured == [256, 512, 1024, 512]


# What is computed ---------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("pretended")
@pytest.mark.parametrize("family", FAMILIES)
def test_replayed_steps_and_padded_prompts_get_the_tokens_of_generate(family: str, device: str) -> None:
    model = model_of(RUN[family]()).to(device)
    decoder = decoder_for(model, device)
    assert isinstance(decoder, SlotDecoder), decoder.description
    loop, replayed, sizes = decoder.loop, [], []
    run, batched = loop.run, loop._batches

    def noted(feeds: Any) -> torch.Tensor:
        # Prompts that come together share a call of attention here, as more of them do; one alone is replayed.
        found = run(feeds, replay=sum(len(feed.tokens) > 1 for feed in feeds) < 2)
        replayed.append(loop.replayed)
        return found

    def batches(pieces: Any) -> list[list[int]]:
        found = batched(pieces)
        sizes.extend(map(len, found))
        return found

    loop.run, loop._batches = noted, batches  # type: ignore[method-assign, assignment]
    for job in play(decoder, traffic(model)):
        expected = generated(model, job.prompt.ids, job.prompt.max_tokens)
        if job.tokens != expected:
            same = next(n for n, (one, other) in enumerate(zip(job.tokens, expected, strict=True)) if one != other)
            assert gap(model, [*job.prompt.ids, *expected[:same]]) < CLOSE
    assert max(sizes) > 1
    assert any(replayed) or not (loop.graphs and loop.graphs.active)  # what cannot be captured runs too
    if family == "llama":
        assert any(replayed) and "CUDA graphs" in decoder.description


def unread(model: Any, pads: bool) -> tuple[SlotLoop, list[Seat]]:
    """A loop with all texts seated and none read."""
    loop = loop_of(model)
    loop.pads = pads
    seats = [Seat(list(text), len(text)) for text in TEXTS]
    for seat in seats:
        loop.sit(seat)
    return loop, seats


def test_padded_prompts_are_read_as_each_alone(device: str) -> None:
    model = model_of(RUN["gemma3"]()).to(device)
    with torch.inference_mode():
        found = []
        for pads in (True, False):
            loop, seats = unread(model, pads)
            loop.run([piece(seats[3], 30)], replay=False)
            feeds = [piece(seat, seat.left) for seat in seats]
            assert len(loop._batches(feeds)) == (1 if pads else 4)
            found.append(loop.run(feeds, replay=False))
    assert found[0].argmax(-1).equal(found[1].argmax(-1)) and close(*found)


def test_padded_prompts_need_not_lie_side_by_side(device: str) -> None:
    model = model_of(RUN["llama"]()).to(device)
    with torch.inference_mode():
        found = []
        for pads in (True, False):
            loop, seats = unread(model, pads)
            loop.leave(seats.pop(1))
            found.append(loop.run([piece(seat, seat.left) for seat in seats], replay=False))
    assert found[0].argmax(-1).equal(found[1].argmax(-1)) and close(*found)


def test_a_replayed_step_has_the_logits_of_a_computed_one(device: str) -> None:
    model = model_of(RUN["gemma2"]()).to(device)
    with torch.inference_mode():
        loop = loop_of(model)
        seats = sat(loop, *TEXTS)
        for token in range(3, 40, 3):
            some = seats[token % 2 :][::-1]
            feeds = [Feed(seat, [token + n], wanted=n != 1) for n, seat in enumerate(some)]
            expected = loop.run(feeds, replay=False)
            assert not loop.replayed
            for seat in some:
                loop.unread(seat)
            found = loop.run(feeds)
            assert loop.replayed and found.shape == expected.shape == (len(some) - 1, 300)
            assert close(found, expected)


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "mistral, sliding"])
def test_a_replayed_piece_has_the_logits_of_a_computed_one(family: str, device: str) -> None:
    model = model_of(RUN[family]()).to(device)
    assert len(LONG) > PIECES[-1]  # so that one piece takes two replays
    with torch.inference_mode():
        found = []
        for replay in (False, True):
            loop = loop_of(model, limit=512)
            seats = [Seat(list(text), len(text) + 40) for text in (*TEXTS, LONG)]
            for seat in seats:
                loop.sit(seat)
            logits = [loop.run([piece(seats[0], seats[0].left), piece(seats[3], 30)], replay)]
            assert loop.replayed is replay
            logits.append(loop.run([Feed(seats[0], [7]), *(piece(seat, seat.left) for seat in seats[1:])], replay))
            logits.append(loop.run([Feed(seat, [8], wanted=seat is not seats[2]) for seat in seats], replay))
            assert loop.replayed is replay
            assert [len(part) for part in logits] == [1, 5, 4]
            found.append(torch.cat(logits))
    assert found[0].argmax(-1).equal(found[1].argmax(-1)) and close(*found)


def test_what_fills_a_piece_up_is_written_where_nobody_looks(device: str) -> None:
    model = model_of(RUN["llama"]()).to(device)
    with torch.inference_mode():
        loop = loop_of(model)
        seats = sat(loop, *TEXTS)
        before = [layer.keys[:, :, :256].clone() for layer in loop._cache.layers]
        newcomer = Seat(list(range(50, 60)), 30)
        loop.sit(newcomer)
        loop.run([piece(newcomer, newcomer.left)])
        assert loop.replayed and newcomer.row is not None
        for layer, held in zip(loop._cache.layers, before, strict=True):
            changed = (layer.keys[:, :, :256] != held).any(-1).any(1).nonzero().tolist()
            assert changed == [[newcomer.row.index, place] for place in range(10)]
        assert {seat.row.index for seat in seats if seat.row}.isdisjoint({newcomer.row.index})


def test_many_pieces_are_computed_in_one_pass(device: str) -> None:
    model = model_of(RUN["llama"]()).to(device)
    with torch.inference_mode():
        loop = loop_of(model, rows=MOST_REPLAYS + 1)
        seats = [Seat([9 + number, 4, 5], 8) for number in range(MOST_REPLAYS + 1)]
        for seat in seats:
            loop.sit(seat)
        loop.run([piece(seat, 2) for seat in seats])
        assert not loop.replayed
        assert loop.tells(running=0)


def test_prompts_that_cannot_be_captured_are_computed_and_steps_are_replayed(device: str, caplog: Any) -> None:
    def record(shape: Shape, run: Pass) -> Pass:
        if shape.reads:
            raise RuntimeError("this kernel waits")
        return (computed if device == "cpu" else recorder)(shape, run)

    model = model_of(RUN["llama"]()).to(device)
    recorder = computed if device == "cpu" else Recorder(model.device)
    with torch.inference_mode(), caplog.at_level(logging.WARNING):
        loop = loop_of(model, record)
        seats = sat(loop, *TEXTS)
        assert not loop.replayed and loop.graphs is not None and loop.graphs.active and not loop.graphs.reads
        loop.run([Feed(seat, [3]) for seat in seats])
        assert loop.replayed and not loop.tells(running=len(seats))
        loop.graphs.capture(4, 10.0)
    assert [record.message for record in caplog.records] == [
        "prompts are read without CUDA graphs: RuntimeError: this kernel waits"
    ]


def test_rows_without_a_step_keep_what_they_hold(device: str) -> None:
    model = model_of(RUN["llama"]()).to(device)
    with torch.inference_mode():
        loop = loop_of(model)
        kept, *running = sat(loop, *TEXTS)
        loop.leave(kept)
        full = [seat.row for seat in running if seat.row is not None]
        for layer in loop._cache.layers:
            layer.keys[:, :, 256:] = layer.values[:, :, 256:] = torch.nan  # what nobody looks at
        (idle,) = (row for row in loop.rows.by_index if row.ids and not row.held)
        held = [layer.keys[idle.index, :, :20].clone() for layer in loop._cache.layers]
        for token in range(20):
            assert loop.run([Feed(seat, [token + 3]) for seat in running]).isfinite().all() and loop.replayed
        assert max(row.index for row in [idle, *full]) < 4  # it was among the rows that were computed
        for layer, expected in zip(loop._cache.layers, held, strict=True):
            assert layer.keys[idle.index, :, :20].equal(expected)
        again = Seat([*TEXTS[0], 3], 30)
        loop.sit(again)
        assert again.cached == len(TEXTS[0])
        logits = loop.run([piece(again, 1)])
        assert close(logits[0], model(torch.tensor([again.ids], device=device)).logits[0, -1])


# Where there are none -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("pretended")
def test_replays_that_compute_other_tokens_are_found_at_load(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    def frozen(shape: Shape, compute: Pass) -> Pass:
        found = compute().clone()
        return lambda: found

    monkeypatch.setattr(choice, "Recorder", lambda device: frozen)
    model = model_of(RUN["llama"]()).to(device)
    decoder = decoder_for(model, device)
    assert isinstance(decoder, SlotDecoder) and "CUDA graphs" not in decoder.description


async def test_graphs_can_be_switched_off(make_engine: Make, ask: Ask, device: str) -> None:
    def says(engine: TransformersEngine) -> bool:
        return "CUDA graphs" in engine.description

    on, off = await make_engine("chat"), await make_engine("chat", extra=(("cuda_graphs", False),))
    assert says(on) is (device == "cuda") and not says(off)
    assert decoder_of(off).loop.graphs is None
    for text in ("Hello", "The quick brown fox"):
        assert (await ask(on, text, max_tokens=40)).ids == (await ask(off, text, max_tokens=40)).ids


def capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def waits(positions: torch.Tensor) -> None:
    positions.sum().item()


def waits_when_captured(positions: torch.Tensor) -> None:
    if capturing():
        positions.sum().item()


def raises_when_captured(positions: torch.Tensor) -> None:
    if capturing():
        raise ValueError("not here")


def refused(shape: Shape, run: Pass) -> Pass:
    raise RuntimeError("operation not permitted when stream is capturing\nand more")


@pytest.mark.parametrize("obstacle", [waits, raises_when_captured, waits_when_captured])
def test_a_model_that_cannot_be_captured_computes_its_steps(
    obstacle: Callable[[torch.Tensor], None], device: str, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    model = model_of(RUN["llama"]()).to(device)
    original = model.model.rotary_emb.forward

    def forward(x: torch.Tensor, position_ids: torch.Tensor) -> Any:
        obstacle(position_ids)
        return original(x, position_ids)

    monkeypatch.setattr(model.model.rotary_emb, "forward", forward)
    with torch.inference_mode(), caplog.at_level(logging.WARNING):
        loop = loop_of(model, refused if device == "cpu" else None)
        seats = sat(loop, *TEXTS)
        for token in range(3, 9):
            found = loop.run([Feed(seat, [token]) for seat in seats])
            assert not loop.replayed
            for seat, logits in zip(seats, found, strict=True):
                read = seat.row.ids if seat.row else []
                expected = model(torch.tensor([read], device=device)).logits[0, -1]
                assert close(logits, expected)
    assert len([record for record in caplog.records if "without CUDA graphs" in record.message]) == 2
    if device == "cuda":  # memory is given back as before, and another model can have graphs
        torch.cuda.empty_cache()
        monkeypatch.undo()
        with torch.inference_mode():
            loop = loop_of(model)
            seats = sat(loop, *TEXTS)
            loop.run([Feed(seat, [3]) for seat in seats])
            assert loop.replayed

"""The committed weights of tiny-vision do what their card says, on scenes that training never drew."""

from __future__ import annotations

import pathlib
import random
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw

from models import muon, vision_data, vision_eval, vision_language, vision_model, vision_scenes, vision_tower
from models.vision_data import Author, Conversation, Turn

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "models" / "huggingface" / "rotunda" / "tiny-vision"
MAX_BYTES = 4_000_000


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    """Tiny matrices gain nothing from more threads, and CI runs several processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def loaded() -> Any:
    return vision_eval.load(FOLDER)


@pytest.fixture(scope="module")
def processor(loaded: Any) -> Any:
    return loaded[1]


@pytest.fixture(scope="module")
def model(loaded: Any) -> Any:
    return loaded[0]


def ask(model: Any, processor: Any, messages: list[dict[str, Any]], images: list[Image.Image], **kwargs: Any) -> str:
    kwargs = kwargs or {"add_generation_prompt": True}
    text = processor.apply_chat_template(messages, **kwargs)
    inputs = processor(text=[text], images=images or None, return_tensors="pt")
    with torch.inference_mode():
        output = model.generate(**inputs)
    return str(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def picture(size: tuple[int, int] = (96, 96), colour: str = "red", background: str = "white") -> Image.Image:
    """A circle in the middle of the image."""
    image = Image.new("RGB", size, background)
    side = 0.7 * min(size)
    left, top = (size[0] - side) / 2, (size[1] - side) / 2
    ImageDraw.Draw(image).ellipse((left, top, left + side, top + side), fill=colour)
    return image


def about(text: str, images: int = 1) -> dict[str, Any]:
    return {"role": "user", "content": [*({"type": "image"} for _ in range(images)), {"type": "text", "text": text}]}


@pytest.mark.parametrize("skill", vision_data.SKILLS)
def test_skill_is_right_on_held_out_scenes(model: Any, processor: Any, skill: str) -> None:
    conversations = vision_eval.held_out(skill)
    assert len(conversations) >= 300
    assert vision_eval.accuracy(model, processor, conversations) >= 0.95


@pytest.mark.parametrize("prompts", [40, pytest.param(300, marks=pytest.mark.accuracy)])
@pytest.mark.parametrize("skill", vision_data.SKILLS)
def test_skill_is_right_behind_a_long_history(model: Any, processor: Any, skill: str, prompts: int) -> None:
    conversations = vision_eval.held_out_behind_history(processor, skill, prompts)
    assert len(conversations) == prompts
    assert vision_eval.accuracy(model, processor, conversations, batch=1) >= 0.9


def test_histories_are_as_long_as_claimed(processor: Any) -> None:
    def tokens(turns: list[Turn]) -> int:
        text = processor.apply_chat_template(Conversation(turns).messages())
        text = text.replace(vision_model.IMAGE, vision_model.IMAGE * vision_model.IMAGE_TOKENS)
        return len(processor.tokenizer.encode(text, add_special_tokens=False))

    for skill in vision_data.SKILLS:
        asked = {"follow_up": 2}.get(skill, 1)
        for conversation in vision_eval.held_out_behind_history(processor, skill, prompts=10):
            assert tokens(conversation.turns[:-asked]) >= 1_500
            assert tokens(conversation.turns) <= vision_model.CONTEXT


def test_training_never_draws_a_held_out_scene() -> None:
    author = Author(random.Random(1), held_out=False)
    drawn = {scene for _ in range(2_000) for scene in author.chat(4).images()}
    assert drawn
    assert not any(vision_scenes.is_held_out(scene) for scene in drawn)
    assert not drawn & set(vision_scenes.scenes(held_out=True))


def test_measures_on_held_out_scenes_alone() -> None:
    for skill in vision_data.SKILLS:
        conversations = vision_data.held_out_conversations(skill, 50)
        behind = [vision_data.with_history(c, 200, i, lambda turn: 30) for i, c in enumerate(conversations)]
        shown = [scene for conversation in conversations + behind for scene in conversation.images()]
        assert shown
        assert all(vision_scenes.is_held_out(scene) for scene in shown)


def test_holds_out_whole_pairs_for_every_shape() -> None:
    trained = vision_scenes.scenes(held_out=False)
    assert {shape for _, shape in vision_scenes.HELD_OUT_PAIRS} == set(vision_scenes.SHAPES)
    assert not {(scene.colour, scene.shape) for scene in trained} & vision_scenes.HELD_OUT_PAIRS
    assert not {(scene.size, scene.background) for scene in trained} & vision_scenes.HELD_OUT_STAGES


def test_unnamed_scenes_keep_to_the_split() -> None:
    rng = random.Random(2)
    drawn = [vision_scenes.unnamed_scene(rng) for _ in range(2_000)]
    assert all(scene.colour == vision_scenes.UNNAMED or scene.shape in vision_scenes.UNNAMED_SHAPES for scene in drawn)
    assert not any(vision_scenes.is_held_out(scene) for scene in drawn)


def test_repainting_keeps_to_the_split() -> None:
    rng = random.Random(4)
    drawn = vision_scenes.scenes(held_out=False) + tuple(vision_scenes.unnamed_scene(rng) for _ in range(500))
    for scene in drawn:
        painted, background, fill = vision_scenes.repaint(scene, rng)
        assert (painted.shape, painted.size) == (scene.shape, scene.size)
        assert painted.colour == vision_scenes.UNNAMED or painted.shape in vision_scenes.UNNAMED_SHAPES
        assert not vision_scenes.is_held_out(painted)
        assert background != fill


def test_repainted_pixels_are_those_of_a_drawing_in_the_new_colours() -> None:
    album = vision_tower.Album(random.Random(6), vision_scenes.scenes(held_out=False)[:60])
    batch = album.repainted(60, 1.0, random.Random(7))
    background, fill = batch.shades[:, 0, :, None, None], batch.shades[:, 1, :, None, None]
    drawn = background + batch.cover * (fill - background)
    # Along edges a bicubic resize runs a little beyond both colours.
    assert (batch.pixels - drawn).abs().mean() < 0.01
    assert (batch.pixels - drawn).abs().max() < 0.4
    # The corner is background and the middle of the image is mostly shape.
    assert batch.cover[:, 0, 0, 0].mean() < 0.05
    assert batch.cover[:, 0, 20:28, 20:28].mean() > 0.6


def test_only_what_is_held_out_is_ruled_out() -> None:
    for scene in vision_scenes.scenes(held_out=False):
        ruled_out = vision_tower.unseen(scene)
        assert not ruled_out[vision_tower.readings([scene])[0] + torch.tensor([0, 8, 14])].any()
    star = vision_scenes.Scene("blue", "star", "small", "white")
    assert vision_tower.unseen(star)[vision_scenes.COLOURS.index("red")]


def test_words_of_image_tokens_stand_at_right_angles() -> None:
    names, marks = vision_tower.word_vectors(64)
    vectors = torch.nn.functional.normalize(torch.cat([names, marks]))
    assert len(vectors) == len(vision_scenes.COLOURS) + len(vision_scenes.SHAPES) + 3
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(len(vectors)), atol=1e-5, rtol=0)


def test_every_third_of_the_image_tokens_says_one_word(model: Any, processor: Any) -> None:
    scenes = vision_scenes.scenes(held_out=True)
    rng = random.Random(12)
    shown = rng.sample(scenes, 100)
    pixels = processor.image_processor([vision_scenes.render(s, rng) for s in shown], return_tensors="pt")
    with torch.inference_mode():
        tokens = torch.stack(model.get_image_features(**pixels, return_dict=True).pooler_output)
    embeddings = model.get_input_embeddings().weight
    for third, (names, field) in enumerate(
        ((vision_scenes.COLOURS, "colour"), (vision_scenes.SHAPES, "shape"), (vision_scenes.COLOURS, "background"))
    ):
        said = tokens[:, 12 * third : 12 * third + 12].mean(1)
        ids = list(vision_language.name_tokens(processor.tokenizer, names))
        nearest = torch.nn.functional.normalize(embeddings[ids]) @ said.T
        right = [names[row] == getattr(s, field) for row, s in zip(nearest.argmax(0), shown, strict=True)]
        assert sum(right) >= 95, (field, sum(right))


def test_misread_names_are_answered_from_the_image(processor: Any) -> None:
    drawings = {scene: [0] for scene in vision_scenes.scenes(held_out=False)}
    encode = vision_language.Encoder(processor, drawings, random.Random(8))
    author = Author(random.Random(9), held_out=False)
    misread = 0
    for _ in range(50):
        example = encode(author.chat(4))
        answers = [(read, label) for read, label in zip(example.ids, example.labels, strict=True) if label >= 0]
        wrong = [processor.tokenizer.convert_ids_to_tokens([*pair]) for pair in answers if pair[0] != pair[1]]
        assert {word.lstrip("\u0120") for pair in wrong for word in pair} <= set(vision_language.THINGS)
        misread += len(wrong)
    assert misread > 20


def test_muon_makes_singular_values_alike() -> None:
    torch.manual_seed(10)
    for shape in ((3, 8, 24), (3, 24, 8), (2, 16, 16)):
        values = torch.linalg.svdvals(muon.orthogonalise(torch.randn(shape)))
        assert values.min() > 0.5
        assert values.max() < 1.3


def test_muon_follows_the_library_s() -> None:
    torch.manual_seed(11)
    start = torch.randn(8, 24)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    options = {"lr": 0.01, "momentum": 0.95, "weight_decay": 0.02}
    steps = (
        (ours, muon.Muon([ours], **options)),
        (theirs, torch.optim.Muon([theirs], **options, adjust_lr_fn="match_rms_adamw")),
    )
    for _ in range(3):
        gradient = torch.randn(8, 24)
        for parameter, optimizer in steps:
            parameter.grad = gradient.clone()
            optimizer.step()
    assert (ours - theirs).norm() < 0.03 * (ours - start).norm()


def test_training_sees_the_pixels_that_serving_sees(processor: Any) -> None:
    drawn = vision_scenes.scenes(held_out=False)[:40]
    album = vision_tower.Album(random.Random(3), drawn)
    rng = random.Random(3)
    images = [vision_scenes.render(scene, rng) for scene in drawn]
    served = processor.image_processor(images, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(album.batch(torch.arange(40)), served, atol=1e-5, rtol=0)


def test_folder_is_small_and_ordinary() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MAX_BYTES
    assert not [path.name for path in files if path.suffix in {".py", ".bin", ".pt", ".pkl"}]
    assert not any("auto_map" in path.read_text() for path in FOLDER.glob("*.json"))


def test_loads_without_torchvision(processor: Any, model: Any) -> None:
    assert model.config.model_type == "llava"
    assert model.config.text_config.max_position_embeddings >= 1_024
    assert model.generation_config.do_sample is False
    assert processor.tokenizer.pad_token_id is not None


@pytest.mark.parametrize("size", [(24, 24), (48, 48), (40, 90), (320, 200), (640, 480), (400, 640)])
def test_image_of_any_size(model: Any, processor: Any, size: tuple[int, int]) -> None:
    assert ask(model, processor, [about("What colour is the shape?")], [picture(size)]) == "The shape is red."


@pytest.mark.parametrize("size", [(1, 1), (3, 640), (2000, 30)])
def test_extreme_image_is_read_without_error(model: Any, processor: Any, size: tuple[int, int]) -> None:
    reply = ask(model, processor, [about("What colour is the shape?")], [Image.new("RGB", size, "red")])
    assert reply.startswith("The shape is ")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_image_of_any_mode_once_converted(model: Any, processor: Any, mode: str) -> None:
    image = picture(colour="blue", background="yellow").convert(mode).convert("RGB")
    assert ask(model, processor, [about("Describe the image.")], [image]) == "A blue circle on a yellow background."


def test_grey_scale_image(model: Any, processor: Any) -> None:
    image = picture(colour="black").convert("L").convert("RGB")
    assert ask(model, processor, [about("Describe the image.")], [image]) == "A black circle on a white background."


def test_plain_pictures_in_all_colours(model: Any, processor: Any) -> None:
    wrong = []
    for colour in vision_scenes.COLOURS:
        background = "white" if colour != "white" else "black"
        reply = ask(
            model, processor, [about("What color is the shape?")], [picture(colour=colour, background=background)]
        )
        if reply != f"The shape is {colour}.":
            wrong.append((colour, reply))
    assert not wrong


def test_tells_two_images_apart(model: Any, processor: Any) -> None:
    images = [picture(colour="green"), picture(colour="purple")]
    first = ask(model, processor, [about("What colour is the shape in the first image?", 2)], images)
    second = ask(model, processor, [about("What colour is the shape in the second image?", 2)], images)
    assert (first, second) == ("The shape is green.", "The shape is purple.")


def test_follow_up_without_sending_the_image_again(model: Any, processor: Any) -> None:
    messages = [
        about("What colour is the shape?"),
        {"role": "assistant", "content": "The shape is red."},
        {"role": "user", "content": "What shape is it?"},
    ]
    assert ask(model, processor, messages, [picture()]) == "It is a circle."


def test_without_an_image(model: Any, processor: Any) -> None:
    messages = [{"role": "user", "content": "What colour is the shape?"}]
    assert ask(model, processor, messages, []) == vision_data.NO_IMAGE
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    assert ask(model, processor, messages, []) == vision_data.UNKNOWN


def test_continues_the_final_message(model: Any, processor: Any) -> None:
    messages = [about("Describe the image."), {"role": "assistant", "content": "A red"}]
    reply = ask(model, processor, messages, [picture()], continue_final_message=True)
    assert reply == " circle on a white background."


def test_padding_does_not_change_an_answer(model: Any, processor: Any) -> None:
    scene = vision_scenes.scenes(held_out=True)[0]
    short = Conversation([Turn("What shape is it?", "", [scene])])
    long = Conversation([Turn("What colour is the shape?", vision_data.colour_answer(scene), [scene]), *short.turns])
    together = vision_eval.answer(model, processor, [short, long], seed=3)
    assert together[0] == vision_eval.answer(model, processor, [short], seed=3)[0] == vision_data.shape_answer(scene)


@pytest.mark.parametrize(
    "text", ["Grüße, 世界! 👩‍🚀\r\n\ttabs  and   spaces ", "it 's n't , . ?", "\x00\u2028é́", "12345"]
)
def test_tokenizer_round_trips_any_text(processor: Any, text: str) -> None:
    ids = processor.tokenizer.encode(text, add_special_tokens=False)
    assert processor.tokenizer.decode(ids) == text


def test_digits_are_single_tokens(processor: Any) -> None:
    assert len(processor.tokenizer.encode("2024", add_special_tokens=False)) == 4

"""The folder of `tiny-vision` is what it should be, and its training never drew what it is measured on.

Its accuracy on held-out scenes stands in its card; what is asked of it (95 % of each skill, 90 % behind a history) is
not reached yet, so no test here asserts it.
"""

from __future__ import annotations

import pathlib
import random
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText, AutoProcessor

from models import vision, vision_data
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
def processor() -> Any:
    return AutoProcessor.from_pretrained(FOLDER, local_files_only=True)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForImageTextToText.from_pretrained(
        FOLDER, use_safetensors=True, trust_remote_code=False, local_files_only=True
    ).eval()


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


def test_training_never_draws_a_held_out_scene() -> None:
    author = Author(random.Random(1), held_out=False)
    drawn = {scene for _ in range(2_000) for scene in author.chat(4).images()}
    assert drawn
    assert not any(vision_data.is_held_out(scene) for scene in drawn)
    assert not drawn & set(vision_data.scenes(held_out=True))


def test_measures_on_held_out_scenes_alone() -> None:
    for skill in vision_data.SKILLS:
        conversations = vision_data.held_out_conversations(skill, 50)
        behind = [vision_data.with_history(c, 200, i, lambda turn: 30) for i, c in enumerate(conversations)]
        shown = [scene for conversation in conversations + behind for scene in conversation.images()]
        assert shown
        assert all(vision_data.is_held_out(scene) for scene in shown)


def test_histories_are_as_long_as_claimed(processor: Any) -> None:
    def tokens(turns: list[Turn]) -> int:
        text = processor.apply_chat_template(Conversation(turns).messages())
        text = text.replace(vision.IMAGE, vision.IMAGE * vision.IMAGE_TOKENS)
        return len(processor.tokenizer.encode(text, add_special_tokens=False))

    for skill in vision_data.SKILLS:
        asked = {"follow_up": 2}.get(skill, 1)
        for conversation in vision.held_out_behind_history(processor, skill, prompts=10):
            assert tokens(conversation.turns[:-asked]) >= 1_500
            assert tokens(conversation.turns) <= vision.CONTEXT


def test_holds_out_whole_pairs_for_every_shape() -> None:
    trained = vision_data.scenes(held_out=False)
    assert {shape for _, shape in vision_data.HELD_OUT_PAIRS} == set(vision_data.SHAPES)
    assert not {(scene.colour, scene.shape) for scene in trained} & vision_data.HELD_OUT_PAIRS
    assert not {(scene.size, scene.background) for scene in trained} & vision_data.HELD_OUT_STAGES


def test_unnamed_scenes_keep_to_the_split() -> None:
    rng = random.Random(2)
    drawn = [vision_data.unnamed_scene(rng) for _ in range(2_000)]
    assert all(scene.colour == vision_data.UNNAMED or scene.shape in vision_data.UNNAMED_SHAPES for scene in drawn)
    assert not any(vision_data.is_held_out(scene) for scene in drawn)


def test_training_sees_the_pixels_that_serving_sees(processor: Any) -> None:
    drawn = vision_data.scenes(held_out=False)[:40]
    album = vision.Album(random.Random(3), drawn)
    rng = random.Random(3)
    images = [vision_data.render(scene, rng) for scene in drawn]
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
    for colour in vision_data.COLOURS:
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
    scene = vision_data.scenes(held_out=True)[0]
    short = Conversation([Turn("What shape is it?", "", [scene])])
    long = Conversation([Turn("What colour is the shape?", vision_data.colour_answer(scene), [scene]), *short.turns])
    together = vision.answer(model, processor, [short, long], seed=3)
    assert together[0] == vision.answer(model, processor, [short], seed=3)[0] == vision_data.shape_answer(scene)


@pytest.mark.parametrize(
    "text", ["Grüße, 世界! 👩‍🚀\r\n\ttabs  and   spaces ", "it 's n't , . ?", "\x00\u2028é́", "12345"]
)
def test_tokenizer_round_trips_any_text(processor: Any, text: str) -> None:
    ids = processor.tokenizer.encode(text, add_special_tokens=False)
    assert processor.tokenizer.decode(ids) == text


def test_digits_are_single_tokens(processor: Any) -> None:
    assert len(processor.tokenizer.encode("2024", add_special_tokens=False)) == 4

"""Questions about scenes and the conversations that `tiny-vision` is trained and measured on, all of them seeded."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from models.vision_scenes import Scene, has_name, scenes

NO_IMAGE = "I do not see an image."
UNKNOWN = "I do not know."
# How often training shows a scene with a colour or a shape off the list.
UNNAMED_SHARE = 0.4


def colour_answer(scene: Scene) -> str:
    """The answer to a question for the shape's colour."""
    return f"The shape is {scene.colour}."


def shape_answer(scene: Scene) -> str:
    """The answer to a question for the shape."""
    return f"It is a {scene.shape}."


def background_answer(scene: Scene) -> str:
    """The answer to a question for the background's colour."""
    return f"The background is {scene.background}."


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def describe_answer(scene: Scene) -> str:
    """The one-sentence description of a scene."""
    start = _article(scene.colour).capitalize()
    return f"{start} {scene.colour} {scene.shape} on {_article(scene.background)} {scene.background} background."


@dataclass(frozen=True)
class Question:
    """Ways to ask for one thing about a scene, the answer, and the fields that must have a name for it."""

    templates: Sequence[str]
    answer: Callable[[Scene], str]
    needs: tuple[str, ...]

    def fits(self, scene: Scene) -> bool:
        """Whether what the question asks for has a name in this scene."""
        return all(has_name(getattr(scene, name)) for name in self.needs)


# {colour}: either spelling of the word; {image}: image, picture or photo; {ordinal}: first or second.
COLOUR_QUESTIONS = (
    "What {colour} is the shape?",
    "What {colour} is the shape?",
    "Which {colour} is the shape?",
    "What is the {colour} of the shape?",
    "Tell me the {colour} of the shape.",
    "Name the {colour} of the shape.",
    "What {colour} is it?",
    "What {colour} is this?",
    "What {colour} is this shape?",
    "Which {colour} does the shape have?",
    "What {colour} does the shape have?",
    "What {colour} is the shape in the {image}?",
    "What {colour} is the shape in this {image}?",
    "In this {image}, what {colour} is the shape?",
    "What is its {colour}?",
    "And what {colour} is it?",
    "And the {colour}?",
)
SHAPE_QUESTIONS = (
    "What shape is it?",
    "What shape is it?",
    "What shape is this?",
    "Which shape is it?",
    "Which shape is this?",
    "What is the shape?",
    "What shape do you see?",
    "What shape is in the {image}?",
    "What shape is in this {image}?",
    "Which shape is in the {image}?",
    "Which shape is shown?",
    "What shape is shown in the {image}?",
    "What kind of shape is it?",
    "What kind of shape is this?",
    "Name the shape.",
    "Tell me the shape.",
    "And what shape is it?",
    "And the shape?",
)
DESCRIBE_QUESTIONS = (
    "Describe the {image}.",
    "Describe the {image}.",
    "Describe this {image}.",
    "Please describe the {image}.",
    "Please describe this {image}.",
    "What is in the {image}?",
    "What is in this {image}?",
    "What's in this {image}?",
    "What do you see?",
    "What do you see in this {image}?",
    "What does the {image} show?",
    "Describe what you see.",
    "Tell me what you see.",
    "Give a short description of the {image}.",
    "Caption this {image}.",
    "Can you describe the {image}?",
)
BACKGROUND_QUESTIONS = (
    "What {colour} is the background?",
    "Which {colour} is the background?",
    "What is the {colour} of the background?",
    "Tell me the {colour} of the background.",
    "What is the background {colour}?",
    "And the background?",
)
NTH_COLOUR_QUESTIONS = (
    "What {colour} is the shape in the {ordinal} {image}?",
    "What {colour} is the shape in the {ordinal} {image}?",
    "What {colour} is the {ordinal} shape?",
    "What is the {colour} of the shape in the {ordinal} {image}?",
    "In the {ordinal} {image}, what {colour} is the shape?",
    "Which {colour} does the shape in the {ordinal} {image} have?",
    "Tell me the {colour} of the shape in the {ordinal} {image}.",
    "What {colour} is the shape in {image} {number}?",
)
NTH_SHAPE_QUESTIONS = (
    "What shape is in the {ordinal} {image}?",
    "What shape is in the {ordinal} {image}?",
    "Which shape is in the {ordinal} {image}?",
    "What is the shape in the {ordinal} {image}?",
    "In the {ordinal} {image}, what shape is it?",
    "What shape does the {ordinal} {image} show?",
    "Name the shape in the {ordinal} {image}.",
    "What shape is in {image} {number}?",
)
NTH_DESCRIBE_QUESTIONS = (
    "Describe the {ordinal} {image}.",
    "What is in the {ordinal} {image}?",
    "What does the {ordinal} {image} show?",
    "Please describe the {ordinal} {image}.",
    "Describe {image} {number}.",
)
WHICH_QUESTIONS = (
    "Which {image} shows {thing}?",
    "Which {image} shows {thing}?",
    "Which {image} has {thing}?",
    "Which of the {image}s shows {thing}?",
    "Where do you see {thing}?",
    "Is {thing} in the first or the second {image}?",
)
COLOUR, SHAPE, DESCRIBE, BACKGROUND = SINGLE_QUESTIONS = (
    Question(COLOUR_QUESTIONS, colour_answer, ("colour",)),
    Question(SHAPE_QUESTIONS, shape_answer, ("shape",)),
    Question(DESCRIBE_QUESTIONS, describe_answer, ("colour", "shape", "background")),
    Question(BACKGROUND_QUESTIONS, background_answer, ("background",)),
)
NTH_QUESTIONS = (
    Question(NTH_COLOUR_QUESTIONS, colour_answer, ("colour",)),
    Question(NTH_SHAPE_QUESTIONS, shape_answer, ("shape",)),
    Question(NTH_DESCRIBE_QUESTIONS, describe_answer, ("colour", "shape", "background")),
)
# A description of one of two images takes three things of it, each of which stands beside that of the other image.
DRILL_QUESTIONS = (*NTH_QUESTIONS, *NTH_QUESTIONS[-1:] * 3)
ORDINALS = ("first", "second")

OPENERS = ("", "", "", "", "", "", "Hi! ", "Hello, ", "Please tell me: ", "Question: ", "Look at this. ", "OK. ")
CLOSERS = ("", "", "", "", "", "", "", " Thanks.", " Thank you.", " Answer briefly.", " Please.")
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful assistant that answers questions about images.",
    "Answer briefly.",
    "You see images and describe them.",
    "Be short and exact.",
    "You are tiny-vision.",
)
OTHER_TEXTS = (
    "Hello!",
    "Hi there.",
    "How are you today?",
    "What is the capital of France?",
    "Tell me a joke.",
    "What is 2 plus 2?",
    "What is 17 + 25?",
    "Who wrote this book?",
    "Write a poem about the sea.",
    "Translate good morning into German.",
    "What time is it?",
    "What is your name?",
    "Thank you very much.",
    "Good morning.",
    "Good night, see you tomorrow.",
    "Explain how a computer works.",
    "Is it going to rain tomorrow?",
    "Count from 1 to 10.",
    "Repeat after me: apple, pear, plum.",
    "Sum up the text that I sent you.",
    "How far is the moon?",
    "Give me a recipe for bread.",
    "Why is the sky blue?",
    "Who are you?",
    "Play some music, please.",
    "Write a function that sorts a list.",
    "What does this word mean?",
    "How do I boil an egg?",
    "Sing me a song.",
    "Which train goes to Berlin?",
)
_WORD_LIST = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government number night point home water room mother "
    "area money story fact month lot right study book eye job word business issue side kind head house service friend "
    "father power hour game line end member law car city community name president team minute idea body information "
    "back parent face others level office door health person art war history party result change morning reason "
    "research girl guy moment air teacher force education the of and to in is you that it he was for on are as with "
    "his they at be this have from or one had by but not what all were we when your can said there use an each which "
    "she do how their if will up other about out many then them these so some her would make like him into has look "
    "two more write go see no could my than first been call who its now find long down did get come made may"
)
WORDS = tuple(_WORD_LIST.split())
REPLIES = ("Of course.", "Yes.", "No.", "Sure, here you are.", "I am well, thank you.", "Hello!", "You are welcome.")


@dataclass
class Turn:
    """One user message with the expected reply; `images` are scenes, to be drawn by the caller, in order.

    A question about two images names either the place that it asks about (`asked`) or the thing to find (`thing`). An
    answer that names something names these `fields` of the scene `about`, in this order.
    """

    text: str
    answer: str
    images: list[Scene] = field(default_factory=list)
    images_first: bool = True
    trained: bool = True
    asked: int | None = None
    thing: str | None = None
    about: Scene | None = None
    fields: tuple[str, ...] = ()

    def messages(self) -> list[dict[str, Any]]:
        """The turn as a user and an assistant message, in the form that the chat template takes."""
        pictures: list[dict[str, str]] = [{"type": "image"} for _ in self.images]
        words = [{"type": "text", "text": self.text}] if self.text else []
        content: Any = (pictures + words if self.images_first else words + pictures) if pictures else self.text
        return [{"role": "user", "content": content}, {"role": "assistant", "content": self.answer}]


@dataclass
class Conversation:
    """Turns behind an optional system message."""

    turns: list[Turn]
    system: str | None = None

    def messages(self) -> list[dict[str, Any]]:
        """All messages, the last assistant message included."""
        head = [{"role": "system", "content": self.system}] if self.system else []
        return head + [message for turn in self.turns for message in turn.messages()]

    def images(self) -> list[Scene]:
        """The scenes of all images, in order of appearance."""
        return [scene for turn in self.turns for scene in turn.images]


class Author:
    """Writes questions and conversations about scenes of one side of the split, from one random stream."""

    def __init__(self, rng: random.Random, held_out: bool, unnamed: Sequence[Scene] = ()) -> None:
        self.rng = rng
        self._scenes = scenes(held_out)
        self._unnamed = unnamed

    def scene(self) -> Scene:
        """Draw a scene, now and then one of the given unnamed ones."""
        if self._unnamed and self.rng.random() < UNNAMED_SHARE:
            return self.rng.choice(self._unnamed)
        return self.rng.choice(self._scenes)

    def two_scenes(self) -> list[Scene]:
        """Draw two scenes that differ in colour and in shape, so that every question about one has one answer."""
        first = self.scene()
        while (second := self.scene()).colour == first.colour or second.shape == first.shape:
            pass
        return [first, second]

    def word(self, templates: Sequence[str], **values: str) -> str:
        """Fill in one of the templates and vary case, spelling, punctuation and politeness."""
        rng = self.rng
        text = rng.choice(templates).format(
            colour=rng.choice(("colour", "color")), image=rng.choice(("image", "image", "picture", "photo")), **values
        )
        text = rng.choice(OPENERS) + text
        roll = rng.random()
        if roll < 0.12:
            text = text.lower()
        elif roll < 0.18:
            text = text.upper()
        if rng.random() < 0.15:
            text = text.rstrip("?.")
        else:
            text += rng.choice(CLOSERS)
        return text

    def ask(self, scene: Scene, question: Question | None = None) -> Turn:
        """A question about the one image in view, without the image itself."""
        question = question or self.rng.choice([item for item in SINGLE_QUESTIONS if item.fits(scene)])
        return Turn(self.word(question.templates), question.answer(scene), about=scene, fields=question.needs)

    def show(self, scene: Scene, question: Question | None = None) -> Turn:
        """A message with one image and a question about it; now and then no words at all, which asks to describe."""
        turn = self.ask(scene, question)
        turn.images, turn.images_first = [scene], self.rng.random() < 0.8
        if question is None and DESCRIBE.fits(scene) and self.rng.random() < 0.05:
            turn.text, turn.answer, turn.fields = "", describe_answer(scene), DESCRIBE.needs
        return turn

    def ask_two(self, pair: Sequence[Scene], which: float = 0.3, questions: Sequence[Question] = NTH_QUESTIONS) -> Turn:
        """A question that needs the two images told apart; a share of `which` of them ask for the place of a thing."""
        index = self.rng.randrange(2)
        scene = pair[index]
        if self.rng.random() < which:
            return self._ask_which(scene, index)
        question = self.rng.choice([item for item in questions if item.fits(scene)])
        text = self.word(question.templates, ordinal=ORDINALS[index], number=str(index + 1))
        return Turn(text, question.answer(scene), asked=index, about=scene, fields=question.needs)

    def _ask_which(self, scene: Scene, index: int) -> Turn:
        things = []
        if has_name(scene.shape):
            things += [(f"a {scene.shape}", scene.shape), (f"the {scene.shape}", scene.shape)]
        if has_name(scene.colour):
            things.append((f"{_article(scene.colour)} {scene.colour} shape", scene.colour))
        words, thing = self.rng.choice(things)
        return Turn(self.word(WHICH_QUESTIONS, thing=words), f"The {ORDINALS[index]} image.", thing=thing)

    def show_two(self, pair: Sequence[Scene], which: float = 0.3) -> Turn:
        """A message with two images and a question that needs them told apart."""
        turn = self.ask_two(pair, which)
        turn.images, turn.images_first = list(pair), self.rng.random() < 0.8
        return turn

    def other(self) -> Turn:
        """A message that is not about any image."""
        if self.rng.random() < 0.5:
            text = self.rng.choice(OTHER_TEXTS)
        else:
            text = " ".join(self.rng.choices(WORDS, k=self.rng.randint(1, 14)))
            text = text.capitalize() + self.rng.choice(("?", ".", "", "!"))
        return Turn(text, UNKNOWN)

    def foreign(self) -> Turn:
        """A turn as another speaker may have left it in the history: its reply is read, and never trained on."""
        turn = self.other()
        answer = self.rng.choice(REPLIES)
        if self.rng.random() < 0.5:
            answer = " ".join(self.rng.choices(WORDS, k=self.rng.randint(2, 16))).capitalize() + "."
        return Turn(turn.text, answer, trained=False)

    def system(self) -> str | None:
        """A system message, or none in most conversations."""
        if self.rng.random() < 0.65:
            return None
        if self.rng.random() < 0.7:
            return self.rng.choice(SYSTEM_PROMPTS)
        return " ".join(self.rng.choices(WORDS, k=self.rng.randint(3, 20))).capitalize() + "."

    def drill(self, questions: int = 9, which: float = 0.4) -> Conversation:
        """Two images and one question after another that needs them told apart: much practice per image token."""
        pair = self.two_scenes()
        turns = [self.show_two(pair, which)]
        turns += [self.ask_two(pair, which, DRILL_QUESTIONS) for _ in range(questions - 1)]
        return Conversation(turns, self.system())

    def chat(self, turns: int, text_share: float = 0.2) -> Conversation:
        """A conversation of mixed turns; a follow-up is always about the newest message that has images."""
        rng = self.rng
        view: list[Scene] = []
        written: list[Turn] = []
        for _ in range(turns):
            roll = rng.random()
            if roll < text_share:
                written.append(self.other() if rng.random() < 0.6 else self.foreign())
            elif not view and roll < text_share + 0.12:
                blind = self.ask_two(self.two_scenes()) if rng.random() < 0.2 else self.ask(self.scene())
                written.append(Turn(blind.text, NO_IMAGE))
            elif view and roll < text_share + 0.45 * (1 - text_share):
                written.append(self.ask(view[0]) if len(view) == 1 else self.ask_two(view))
            elif rng.random() < 0.6:
                view = [self.scene()]
                written.append(self.show(view[0]))
            else:
                view = self.two_scenes()
                written.append(self.show_two(view))
        return Conversation(written, self.system())


def _ask_follow_up(author: Author) -> list[Turn]:
    scene = author.scene()
    first, second = author.rng.sample(SINGLE_QUESTIONS, 2)
    return [author.show(scene, first), author.ask(scene, second)]


SKILLS: dict[str, Callable[[Author], list[Turn]]] = {
    "colour": lambda author: [author.show(author.scene(), COLOUR)],
    "shape": lambda author: [author.show(author.scene(), SHAPE)],
    "describe": lambda author: [author.show(author.scene(), DESCRIBE)],
    "two_images": lambda author: [author.show_two(author.two_scenes())],
    "follow_up": _ask_follow_up,
}


def held_out_conversations(skill: str, count: int, seed: int = 0) -> list[Conversation]:
    """`count` conversations on held-out scenes only, each ending in a question of `skill` with its true answer."""
    author = Author(random.Random(f"{skill}/{seed}"), held_out=True)
    return [Conversation(SKILLS[skill](author), author.system()) for _ in range(count)]


def with_history(
    conversation: Conversation, history_tokens: int, seed: int, cost: Callable[[Turn], int]
) -> Conversation:
    """The same question behind earlier turns, held-out images among them, of at least `history_tokens` in all."""
    author = Author(random.Random(f"history/{seed}"), held_out=True)
    history: list[Turn] = []
    spent = 0
    while spent < history_tokens:
        turn = author.chat(1, text_share=0.5).turns[0]
        if turn.answer == NO_IMAGE:
            continue
        history.append(turn)
        spent += cost(turn)
    return Conversation(history + conversation.turns, conversation.system)

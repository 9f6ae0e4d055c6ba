"""What libraries raise, told in the product's own errors. No library text and no path goes into a message."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from serve_app.domain.errors import (
    DeadlineExceeded,
    GenerationFailed,
    InvalidInput,
    MemoryExceeded,
    ModelLoadFailed,
    RotundaError,
)

Stage = Literal["load", "prompt", "generate"]

TRANSIENT = frozenset(
    {errno.EIO, errno.EAGAIN, errno.EINTR, errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.EBUSY, errno.ETIMEDOUT}
)
"""I/O errors that may heal by themselves; everything else about a file stays wrong until the file changes."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One kind of exception: the names of its class or of one above it, and words of which one is in its message.

    Names, not classes: the table must not import the libraries. An empty tuple matches anything.
    """

    names: tuple[str, ...]
    words: tuple[str, ...]
    stages: tuple[Stage, ...]
    error: Callable[[BaseException], RotundaError]

    def matches(self, fault: BaseException, stage: Stage) -> bool:
        names = {kind.__name__ for kind in type(fault).__mro__}
        text = str(fault).lower()
        return (
            (not self.names or not names.isdisjoint(self.names))
            and (not self.words or any(word in text for word in self.words))
            and (not self.stages or stage in self.stages)
        )


def _load(message: str) -> Callable[[BaseException], RotundaError]:
    return lambda fault: ModelLoadFailed(message)


def _no_memory(fault: BaseException) -> RotundaError:
    return MemoryExceeded("The machine has no memory left for this. Try again when other models have left.")


def _timeout(fault: BaseException) -> RotundaError:
    return DeadlineExceeded("The model took too long. Try again, or raise the limit.", details={"phase": "total"})


def _file(fault: BaseException) -> RotundaError:
    code = getattr(fault, "errno", None)
    if code == errno.ENOMEM:
        return _no_memory(fault)
    if code in TRANSIENT:
        return ModelLoadFailed("The model's files could not be read. Trying again may help.", retryable=True)
    return ModelLoadFailed("A file of the model is missing or cannot be read. Download the model again, whole.")


RULES: tuple[Rule, ...] = (
    Rule(("MemoryError", "OutOfMemoryError"), (), (), _no_memory),
    Rule(("RuntimeError",), ("out of memory", "can't allocate memory", "not enough memory"), (), _no_memory),
    Rule(("TimeoutError",), (), (), _timeout),
    Rule(
        ("TemplateSyntaxError", "TemplateAssertionError"),
        (),
        (),
        _load("The model's chat template has an error; it cannot be used for chat."),
    ),
    Rule(
        ("SecurityError",), (), (), _load("The model's chat template does what a template must not; it cannot be used.")
    ),
    Rule(
        ("TemplateError",),
        (),
        ("prompt",),
        lambda fault: InvalidInput("The model's chat template refuses this order of messages."),
    ),
    Rule(("SafetensorError",), (), (), _load("The model's weights are damaged. Download them again.")),
    Rule(("RuntimeError", "ValueError"), ("size mismatch", "mismatched"), ("load",), _load(
        "The model's weights do not have the shapes that its configuration says."
    )),
    Rule(("ImportError",), (), ("load",), _load("The model needs a Python package that is not installed.")),
    Rule(
        ("ValueError", "KeyError"),
        ("does not recognize this architecture", "unrecognized configuration class", "unrecognized model"),
        ("load",),
        _load("The installed transformers does not know this kind of model."),
    ),
    Rule(("ValueError", "TypeError", "OSError", "Exception"), ("tokenizer",), ("load",), _load(
        "The model's tokenizer cannot be read. Download the model again, whole."
    )),
    Rule(("OSError",), (), (), _file),
    Rule(("UnicodeError",), (), ("prompt",), lambda fault: InvalidInput("The message holds text that is no Unicode.")),
)  # fmt: skip
"""The first that matches counts."""

OTHERWISE: dict[Stage, RotundaError] = {
    "load": ModelLoadFailed("The model cannot be loaded; the log of its replica says why."),
    "prompt": GenerationFailed("The prompt could not be made; the log of the model's replica says why."),
    "generate": GenerationFailed("The generation failed; the log of the model's replica says why."),
}


def translate(fault: BaseException, stage: Stage) -> RotundaError:
    """The product's error for a library's; ours pass unchanged, and an unknown one gets its stage's general error."""
    if isinstance(fault, RotundaError):
        return fault
    for rule in RULES:
        if rule.matches(fault, stage):
            return rule.error(fault)
    general = OTHERWISE[stage]
    return type(general)(general.message)

"""Everything that may go wrong, as one tree.

::

    RotundaError                     code                     HTTP  retryable
    ├── InvalidInput                 INVALID_INPUT            422   no
    │   ├── MalformedRequest         MALFORMED_REQUEST        400   no
    │   ├── ModelAmbiguous           MODEL_AMBIGUOUS          409   no
    │   ├── CapabilityMissing        CAPABILITY_MISSING       422   no
    │   ├── ContextLengthExceeded    CONTEXT_LENGTH_EXCEEDED  422   no
    │   ├── PayloadTooLarge          PAYLOAD_TOO_LARGE        413   no
    │   └── UnsupportedMedia         UNSUPPORTED_MEDIA        415   no
    ├── NotFound                     NOT_FOUND                404   no
    │   └── ModelNotFound            MODEL_NOT_FOUND          404   no
    ├── AccessError
    │   ├── Unauthenticated          UNAUTHENTICATED          401   no
    │   └── Forbidden                FORBIDDEN                403   no
    ├── Busy
    │   ├── ConversationBusy         CONVERSATION_BUSY        409   no
    │   ├── QueueFull                QUEUE_FULL               429   yes
    │   └── RateLimited              RATE_LIMITED             429   yes
    ├── ModelError
    │   ├── ModelLoadFailed          MODEL_LOAD_FAILED        502   when transient
    │   ├── ModelUnsafe              MODEL_UNSAFE             422   no
    │   ├── ModelTooLarge            MODEL_TOO_LARGE          507   no
    │   ├── MemoryExceeded           MEMORY_EXCEEDED          503   yes
    │   ├── GenerationFailed         GENERATION_FAILED        502   no
    │   └── ReplicaRetired           RETIRED                  503   yes (never seen by a client)
    ├── ProviderUnavailable          PROVIDER_UNAVAILABLE     503   yes
    ├── ProviderError                PROVIDER_ERROR           502   5xx and drops
    ├── DeadlineExceeded             TIMEOUT                  504   connect, first token
    ├── InvalidConfig                INVALID_CONFIG           500   no
    └── Internal                     INTERNAL                 500   no

Errors cross process borders as plain data (:meth:`RotundaError.to_dict` / :func:`error_from_dict`); they also pickle,
because every argument reaches ``Exception.__init__``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal


class RotundaError(Exception):
    """An expected failure, in words for the person who meets it.

    Args:
        message: what went wrong and what the reader can do, without library text or paths.
        provider: the provider instance that failed, when there is one.
        retryable: overrides the class's default.
        details: more facts for the reader (JSON values only), for instance ``{"candidates": [...]}``.
    """

    code: ClassVar[str] = "INTERNAL"
    status: ClassVar[int] = 500
    retry: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        provider: str | None = None,
        retryable: bool | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message, provider, retryable, details)
        self.message = message
        self.provider = provider
        self.retryable = self.retry if retryable is None else retryable
        self.details: dict[str, Any] = dict(details or {})

    def __str__(self) -> str:
        return self.message

    @property
    def retry_after_s(self) -> int | None:
        """Seconds to wait before another try, when the error knows (``details["retryAfterS"]``)."""
        value = self.details.get("retryAfterS")
        return int(value) if value is not None else None

    @property
    def worth_repeating(self) -> bool:
        """Whether the same model is asked again before the client hears of it."""
        return self.retryable

    def to_dict(self) -> dict[str, Any]:
        """The error as JSON values; :func:`error_from_dict` reads it back."""
        return {
            "code": self.code,
            "message": self.message,
            "provider": self.provider,
            "retryable": self.retryable,
            "details": self.details,
        }


class InvalidInput(RotundaError):
    code, status = "INVALID_INPUT", 422


class MalformedRequest(InvalidInput):
    code, status = "MALFORMED_REQUEST", 400


class ModelAmbiguous(InvalidInput):
    code, status = "MODEL_AMBIGUOUS", 409


class CapabilityMissing(InvalidInput):
    code, status = "CAPABILITY_MISSING", 422


class ContextLengthExceeded(InvalidInput):
    code, status = "CONTEXT_LENGTH_EXCEEDED", 422


class PayloadTooLarge(InvalidInput):
    code, status = "PAYLOAD_TOO_LARGE", 413


class UnsupportedMedia(InvalidInput):
    code, status = "UNSUPPORTED_MEDIA", 415


class NotFound(RotundaError):
    code, status = "NOT_FOUND", 404


class ModelNotFound(NotFound):
    code, status = "MODEL_NOT_FOUND", 404


class AccessError(RotundaError):
    code, status = "FORBIDDEN", 403


class Unauthenticated(AccessError):
    code, status = "UNAUTHENTICATED", 401


class Forbidden(AccessError):
    code, status = "FORBIDDEN", 403


class Busy(RotundaError):
    """There is too much to do. Asking again adds to it and keeps a client waiting for its refusal, so the client is
    told when to come again, unless nobody knows when."""

    code, status, retry = "RATE_LIMITED", 429, True

    @property
    def worth_repeating(self) -> bool:
        return self.retryable and self.retry_after_s is None


class ConversationBusy(Busy):
    """A conversation has one running reply at a time; ``details["sessionId"]`` names it."""

    code, status, retry = "CONVERSATION_BUSY", 409, False


class QueueFull(Busy):
    code, status, retry = "QUEUE_FULL", 429, True

    @property
    def worth_repeating(self) -> bool:
        return False


class RateLimited(Busy):
    code, status, retry = "RATE_LIMITED", 429, True


class ModelError(RotundaError):
    code, status = "GENERATION_FAILED", 502


class ModelLoadFailed(ModelError):
    """``retryable=True`` for what may heal by itself (I/O, resources); deterministic failures are not."""

    code, status = "MODEL_LOAD_FAILED", 502


class ModelUnsafe(ModelError):
    code, status = "MODEL_UNSAFE", 422


class ModelTooLarge(ModelError):
    code, status = "MODEL_TOO_LARGE", 507


class MemoryExceeded(ModelError):
    code, status, retry = "MEMORY_EXCEEDED", 503, True


class GenerationFailed(ModelError):
    code, status = "GENERATION_FAILED", 502


class ReplicaRetired(ModelError):
    """The replica was told to leave: the gateway asks the router again, unseen by the client."""

    code, status, retry = "RETIRED", 503, True


class ProviderUnavailable(RotundaError):
    code, status, retry = "PROVIDER_UNAVAILABLE", 503, True


class ProviderError(RotundaError):
    code, status = "PROVIDER_ERROR", 502


Phase = Literal["load", "connect", "first token", "idle", "total"]


class DeadlineExceeded(RotundaError):
    """One of the five timeouts; ``details["phase"]`` says which."""

    code, status = "TIMEOUT", 504

    @classmethod
    def during(cls, phase: Phase, seconds: float, provider: str | None = None) -> DeadlineExceeded:
        """The error for ``phase``, after ``seconds``; connect and first token may be tried again."""
        return cls(
            f"The model took longer than {seconds:g} s ({phase}). Try again, or raise the limit.",
            provider,
            phase in ("connect", "first token"),
            {"phase": phase, "seconds": seconds},
        )


class InvalidConfig(RotundaError):
    code, status = "INVALID_CONFIG", 500


class Internal(RotundaError):
    """A fault of ours. The message is fixed; the cause is in the log under the trace id."""

    code, status = "INTERNAL", 500

    @classmethod
    def masked(cls) -> Internal:
        return cls("Something went wrong on the server. The trace id finds it in the log.")


def _subclasses(root: type[RotundaError]) -> list[type[RotundaError]]:
    return [root, *(below for child in root.__subclasses__() for below in _subclasses(child))]


def error_from_dict(data: Mapping[str, Any]) -> RotundaError:
    """Read :meth:`RotundaError.to_dict` back; an unknown code becomes :class:`Internal` and keeps its message."""
    leaves = {kind.code: kind for kind in _subclasses(RotundaError) if kind.__module__ == __name__}
    kind = leaves.get(str(data.get("code")), Internal)
    return kind(str(data.get("message")), data.get("provider"), data.get("retryable"), data.get("details"))

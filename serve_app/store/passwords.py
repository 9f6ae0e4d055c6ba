"""Passwords of private conversations: argon2id, checked in a small pool so that nobody can use up the processor."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import bcrypt
from argon2 import PasswordHasher, Type
from argon2.exceptions import VerificationError

from serve_app.domain.errors import InvalidInput, RateLimited

_T = TypeVar("_T")

MAX_LENGTH = 1024
_WORKERS = 2
# OWASP's first choice for argon2id: 19 MiB, two passes, one lane.
_HASHER = PasswordHasher(time_cost=2, memory_cost=19 * 1024, parallelism=1, hash_len=32, salt_len=16, type=Type.ID)
# Costs what a real one costs, and nobody knows a password for it: 32 zero bytes as the result.
_NOBODYS_HASH = f"$argon2id$v=19$m=19456,t=2,p=1${'A' * 22}${'A' * 43}"
_BCRYPT_PREFIXES = ("$2a$", "$2b$", "$2y$")
# bcrypt reads no more; older releases of its library cut silently, newer ones refuse.
_BCRYPT_BYTES = 72


class Verdict(NamedTuple):
    """Whether the password is right, and whether its hash should be made anew with today's cost."""

    ok: bool
    rehash_needed: bool


class Passwords:
    """Hashes and checks passwords on two threads; ``close()`` ends them.

    At most ``max_pending`` passwords are worked on or wait; one more raises RateLimited. A password has 1 to 1024
    characters, else InvalidInput.
    """

    def __init__(self, max_pending: int = 32) -> None:
        self._pool = ThreadPoolExecutor(_WORKERS, thread_name_prefix="passwords")
        self._places = threading.BoundedSemaphore(max_pending)

    async def hash(self, password: str) -> str:
        """The argon2id hash to keep."""
        secret = _secret(password)
        return await self._run(lambda: _HASHER.hash(secret))

    async def verify(self, hash: str | None, password: str) -> Verdict:
        """Compare in constant time. Without a hash, or with one of an unknown kind, the answer is no at equal cost."""
        secret = _secret(password)
        return await self._run(lambda: _verify(hash, secret))

    def close(self) -> None:
        """End the threads; passwords that still wait are dropped."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _run(self, work: Callable[[], _T]) -> _T:
        if not self._places.acquire(blocking=False):
            raise RateLimited(
                "Too many passwords are being checked at once. Try again shortly.", details={"retryAfterS": 1}
            )
        try:
            future = self._pool.submit(work)
        except RuntimeError:
            self._places.release()
            raise
        # The place is free when the thread is, even if nobody waits for the answer any more.
        future.add_done_callback(lambda _: self._places.release())
        return await asyncio.wrap_future(future)


def _secret(password: str) -> bytes:
    if not 1 <= len(password) <= MAX_LENGTH:
        raise InvalidInput(f"A password has 1 to {MAX_LENGTH} characters.")
    try:
        return password.encode()
    except UnicodeEncodeError as error:
        raise InvalidInput("The password holds a character that is not valid Unicode.") from error


def _verify(hash: str | None, secret: bytes) -> Verdict:
    if hash is not None and hash.startswith(_BCRYPT_PREFIXES):
        ok = _verify_bcrypt(hash, secret)
        return Verdict(ok, rehash_needed=ok)
    try:
        _HASHER.verify(hash or _NOBODYS_HASH, secret)
    except VerificationError:
        return Verdict(False, rehash_needed=False)
    except ValueError:  # no argon2 hash
        return _verify(None, secret)
    assert hash is not None
    return Verdict(True, rehash_needed=_HASHER.check_needs_rehash(hash))


def _verify_bcrypt(hash: str, secret: bytes) -> bool:
    try:
        return bcrypt.checkpw(secret[:_BCRYPT_BYTES], hash.encode())
    except ValueError:  # a damaged hash
        return False

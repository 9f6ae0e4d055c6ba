"""Who may do what: API keys of callers, passwords and tokens of private conversations, signed image URLs."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from urllib.parse import quote, urlencode
from weakref import WeakValueDictionary

from serve_app.config import Settings
from serve_app.domain.conversation import Conversation, StoredImage
from serve_app.domain.errors import AccessError, Forbidden, NotFound, ProviderUnavailable, RateLimited, Unauthenticated
from serve_app.store.passwords import Passwords
from serve_app.store.store import Store
from serve_app.store.tokens import sign, verify

ANONYMOUS = "anonymous"
TOKEN_LIFE = timedelta(hours=1)
ATTEMPTS = 5
WINDOW_S = 60


def _now() -> datetime:
    return datetime.now(UTC)


class Access:
    """Answers whether a request may see what it asks for.

    Args:
        store: conversations, images and the count of password attempts.
        passwords: hashes and checks passwords.
        signing_key: signs tokens; the same on every replica. None: :meth:`unlock` brings it.
        settings: API keys.
        clock: the time in UTC.
    """

    def __init__(
        self,
        store: Store,
        passwords: Passwords,
        signing_key: bytes | None,
        settings: Settings,
        clock: Callable[[], datetime] = _now,
    ) -> None:
        self._store = store
        self.passwords = passwords
        self._key = signing_key
        self._clock = clock
        self._keys = {_digest(key.get_secret_value()) for key in settings.api_keys}
        self._turns: WeakValueDictionary[tuple[str, str], asyncio.Lock] = WeakValueDictionary()

    def __repr__(self) -> str:
        return f"Access(keys={len(self._keys)})"

    def unlock(self, signing_key: bytes) -> None:
        """The store could be read at last: from now on tokens are given and taken."""
        self._key = signing_key

    @property
    def _signing_key(self) -> bytes:
        if self._key is None:
            raise ProviderUnavailable("The conversation store cannot be reached now. Try again shortly.")
        return self._key

    @property
    def needs_key(self) -> bool:
        return bool(self._keys)

    def caller(self, authorization: str | None) -> str:
        """The caller's name: a short fingerprint of the key in an ``Authorization`` value, or "anonymous".

        Raises:
            Unauthenticated: keys are wanted, and this is none of them.
        """
        if not self._keys:
            return ANONYMOUS
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise Unauthenticated("This server wants an API key: send the header 'Authorization: Bearer <key>'.")
        given = _digest(key.strip())
        # Digests have one length, and all are compared: the time says nothing about any key.
        if not sum(hmac.compare_digest(given, known) for known in self._keys):
            raise Unauthenticated("This API key is not known here. Check it, or ask for a new one.")
        return f"key-{given.hex()[:8]}"

    async def conversation(
        self, id: str, *, password: str | None = None, token: str | None = None, address: str
    ) -> Conversation:
        """The conversation, if the proof opens it; a public one needs none.

        Raises:
            NotFound: there is no such conversation.
            Unauthenticated: it is private and no proof came, or the token has expired.
            Forbidden: the proof is wrong.
            RateLimited: too many wrong passwords from this address.
        """
        conversation = await self._store.get_conversation(id)
        return await self._prove(conversation, password, token, address)

    async def image(
        self, id: str, *, password: str | None = None, token: str | None = None, address: str
    ) -> StoredImage:
        """The image, for whoever may read its conversation or holds its own signed token. Raises as above."""
        image = await self._store.get_image(id)
        if image.expires_at is not None and image.expires_at <= self._clock():
            raise NotFound("This image does not exist. It may have been deleted, or its time is over.")
        conversation = await self._store.get_conversation(image.conversation_id)
        if not conversation.is_private or (token and self._opens(token, "image", image.id)):
            return image
        await self._prove(conversation, password, token, address)
        return image

    def access_token(self, conversation: Conversation) -> str:
        """A token that opens the conversation for one hour."""
        return sign(self._signing_key, "conversation", _subject(conversation), self._clock() + TOKEN_LIFE)

    def image_url(self, image: StoredImage, private: bool) -> str:
        """Where the image is found; with a token for one hour when its conversation is private."""
        path = f"/api/images/{quote(image.id, safe='')}"
        if not private:
            return path
        token = sign(self._signing_key, "image", image.id, self._clock() + TOKEN_LIFE)
        return f"{path}?{urlencode({'token': token})}"

    async def _prove(
        self, conversation: Conversation, password: str | None, token: str | None, address: str
    ) -> Conversation:
        if not conversation.is_private:
            return conversation
        if not password:
            return self._check_token(conversation, token)
        with suppress(AccessError):
            return self._check_token(conversation, token)
        # One password of an address at a time: otherwise right ones, sent together, would limit each other.
        turn = self._turns.setdefault((conversation.id, address), asyncio.Lock())
        async with turn:
            return await self._check_password(conversation, password, address)

    def _check_token(self, conversation: Conversation, token: str | None) -> Conversation:
        if not token:
            raise Unauthenticated("This conversation is private. Send its password, or an access token.")
        if not self._opens(token, "conversation", _subject(conversation)):
            raise Forbidden("The access token is not for this conversation.")
        return conversation

    def _opens(self, token: str, purpose: str, subject: str) -> bool:
        """Whether the token is for just this; an expired one raises Unauthenticated."""
        try:
            named = verify(self._signing_key, token, purpose, self._clock())
        except Forbidden:
            return False
        return hmac.compare_digest(named.encode(), subject.encode())

    async def _check_password(self, conversation: Conversation, password: str, address: str) -> Conversation:
        """Count, then verify: who guesses in parallel is counted all the same. A right password clears the count."""
        if not await self._store.allow_password_attempt(
            conversation.id, address, limit=ATTEMPTS, window_s=WINDOW_S, now=self._clock()
        ):
            raise RateLimited(
                f"Too many wrong passwords for this conversation. Wait {WINDOW_S} seconds and try again.",
                details={"retryAfterS": WINDOW_S},
            )
        verdict = await self.passwords.verify(conversation.password_hash, password)
        if not verdict.ok:
            raise Forbidden("The password is wrong.")
        await self._store.forget_password_attempts(conversation.id, address)
        if not verdict.rehash_needed:
            return conversation
        hash = await self.passwords.hash(password)
        await self._store.set_password_hash(conversation.id, hash)
        return replace(conversation, password_hash=hash)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="replace")).digest()


def _subject(conversation: Conversation) -> str:
    """Names this conversation and not a later one that takes the same id."""
    return f"{conversation.id} {conversation.created_at.isoformat()}"

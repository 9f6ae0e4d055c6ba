"""Passwords, tokens, the shared key, and the limit on attempts."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import bcrypt
import pytest
from argon2 import PasswordHasher
from hypothesis import given
from hypothesis import strategies as st

from serve_app.domain.errors import Forbidden, InvalidInput, RateLimited, Unauthenticated
from serve_app.store import Passwords, Store, Verdict, tokens

NOW = datetime(2026, 1, 1, tzinfo=UTC)
HOUR = timedelta(hours=1)
KEY = bytes(range(32))
RIGHT, WRONG, RIGHT_BUT_OLD = Verdict(True, False), Verdict(False, False), Verdict(True, True)


@pytest.fixture
def passwords() -> Iterator[Passwords]:
    passwords = Passwords()
    yield passwords
    passwords.close()


async def test_a_password_is_right_or_wrong(passwords: Passwords) -> None:
    hash = await passwords.hash("correct horse ☃")
    assert hash.startswith("$argon2id$v=19$m=19456,t=2,p=1$")
    assert await passwords.verify(hash, "correct horse ☃") == RIGHT
    assert await passwords.verify(hash, "correct horse") == WRONG
    assert hash != await passwords.hash("correct horse ☃")


@pytest.mark.parametrize("prefix", [b"2a", b"2b"])
async def test_a_bcrypt_hash_verifies_and_wants_a_new_one(passwords: Passwords, prefix: bytes) -> None:
    old = bcrypt.hashpw(b"secret", bcrypt.gensalt(4, prefix)).decode()
    assert await passwords.verify(old, "secret") == RIGHT_BUT_OLD
    assert await passwords.verify(old, "Secret") == WRONG
    assert await passwords.verify("$2y$" + old[4:], "secret") == RIGHT_BUT_OLD


async def test_a_long_password_of_the_bcrypt_days_still_opens(passwords: Passwords) -> None:
    old = bcrypt.hashpw(b"x" * 72, bcrypt.gensalt(4)).decode()
    assert await passwords.verify(old, "x" * 100) == RIGHT_BUT_OLD


async def test_a_cheaper_argon2_hash_wants_a_new_one(passwords: Passwords) -> None:
    old = PasswordHasher(time_cost=1, memory_cost=8, parallelism=1).hash("secret")
    assert await passwords.verify(old, "secret") == RIGHT_BUT_OLD


@pytest.mark.parametrize("hash", [None, "", "plain", "$2b$broken", "$argon2id$broken", "é"])
async def test_no_hash_or_a_broken_one_opens_nothing(passwords: Passwords, hash: str | None) -> None:
    assert await passwords.verify(hash, "secret") == WRONG


async def test_a_missing_hash_costs_what_a_real_one_costs(passwords: Passwords) -> None:
    async def cost(hash: str | None) -> float:
        times = []
        for _ in range(7):
            started = time.perf_counter()
            await passwords.verify(hash, "wrong")
            times.append(time.perf_counter() - started)
        return min(times)

    real = await cost(await passwords.hash("secret"))
    assert await cost(None) > real / 3


@pytest.mark.parametrize("password", ["", "x" * 1025, "\ud800"])
async def test_a_password_out_of_bounds_is_invalid(passwords: Passwords, password: str) -> None:
    with pytest.raises(InvalidInput):
        await passwords.hash(password)
    with pytest.raises(InvalidInput):
        await passwords.verify(None, password)


async def test_too_many_passwords_at_once_are_refused() -> None:
    passwords = Passwords(max_pending=3)
    try:
        results = await asyncio.gather(*(passwords.hash("secret") for _ in range(5)), return_exceptions=True)
        refused = [result for result in results if isinstance(result, RateLimited)]
        assert len(refused) == 2
        assert refused[0].retry_after_s == 1
        assert (await passwords.hash("secret")).startswith("$argon2id$")
    finally:
        passwords.close()


async def test_a_cancelled_check_gives_its_place_back() -> None:
    passwords = Passwords(max_pending=1)
    try:
        for _ in range(5):
            waiting = asyncio.create_task(passwords.hash("secret"))
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            # The thread is not interrupted: its place is free when its work is done.
            assert await asyncio.to_thread(passwords._places.acquire, timeout=10)
            passwords._places.release()
    finally:
        passwords.close()


def test_a_token_names_its_subject_until_it_expires() -> None:
    token = tokens.sign(KEY, "conversation", "talk/ä", NOW + HOUR)
    assert tokens.verify(KEY, token, "conversation", NOW) == "talk/ä"
    assert tokens.verify(KEY, token, "conversation", NOW + HOUR - timedelta(seconds=1)) == "talk/ä"
    with pytest.raises(Unauthenticated, match="expired"):
        tokens.verify(KEY, token, "conversation", NOW + HOUR)
    assert token.replace("-", "").replace("_", "").replace(".", "").isalnum()


def test_a_token_serves_one_purpose_under_one_key() -> None:
    token = tokens.sign(KEY, "image", "talk", NOW + HOUR)
    with pytest.raises(Forbidden):
        tokens.verify(KEY, token, "conversation", NOW)
    with pytest.raises(Forbidden):
        tokens.verify(bytes(32), token, "image", NOW)
    with pytest.raises(Unauthenticated):
        tokens.verify(KEY, "", "image", NOW)


def test_no_character_of_a_token_can_be_changed() -> None:
    token = tokens.sign(KEY, "image", "talk", NOW + HOUR)
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_."
    for place in range(len(token)):
        for character in alphabet:
            changed = token[:place] + character + token[place + 1 :]
            if changed != token:
                with pytest.raises(Forbidden):
                    tokens.verify(KEY, changed, "image", NOW)
    for changed in (token + "=", token + "A", token[:-1], "." + token, token.split(".")[0]):
        with pytest.raises(Forbidden):
            tokens.verify(KEY, changed, "image", NOW)


@given(st.text(min_size=1))
def test_any_other_text_is_a_false_token(text: str) -> None:
    with pytest.raises(Forbidden):
        tokens.verify(KEY, text, "image", NOW)


async def test_all_replicas_sign_with_one_key(url: str) -> None:
    stores = [await Store.open(url) for _ in range(3)]
    try:
        keys = await asyncio.gather(*(store.signing_key() for store in stores))
    finally:
        for store in stores:
            await store.close()
    assert len(set(keys)) == 1
    assert len(keys[0]) == 32


async def test_five_attempts_a_minute_by_conversation_and_address(store: Store) -> None:
    async def allowed(conversation_id: str = "c", address: str = "1.2.3.4", after_s: float = 0) -> bool:
        now = NOW + timedelta(seconds=after_s)
        return await store.allow_password_attempt(conversation_id, address, now=now)

    assert [await allowed() for _ in range(6)] == [True] * 5 + [False]
    assert await allowed(address="::1")
    assert await allowed(conversation_id="d")
    assert not await allowed(after_s=59)
    assert await allowed(after_s=61)


async def test_attempts_can_be_forgotten(store: Store) -> None:
    for address in ("1.2.3.4", "::1"):
        assert [await store.allow_password_attempt("c", address) for _ in range(6)].count(True) == 5
    await store.forget_password_attempts("c", "1.2.3.4")
    assert await store.allow_password_attempt("c", "1.2.3.4")
    assert not await store.allow_password_attempt("c", "::1")


async def test_attempts_at_once_do_not_slip_through(url: str) -> None:
    stores = [await Store.open(url) for _ in range(3)]
    try:
        attempts = (store.allow_password_attempt("c", "1.2.3.4") for store in stores for _ in range(5))
        results = await asyncio.gather(*attempts)
    finally:
        for store in stores:
            await store.close()
    assert results.count(True) == 5


async def test_old_attempts_are_forgotten(store: Store) -> None:
    for _ in range(3):
        await store.record_password_attempt("c", "1.2.3.4", NOW)
    assert await store.count_password_attempts("c", "1.2.3.4", NOW - HOUR) == 3
    assert await store.count_password_attempts("c", "1.2.3.4", NOW) == 0
    await store.record_password_attempt("d", "::1", NOW + HOUR + timedelta(seconds=1))
    assert await store.count_password_attempts("c", "1.2.3.4", NOW - HOUR) == 0

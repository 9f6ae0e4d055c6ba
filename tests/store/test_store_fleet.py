"""What the router remembers."""

from serve_app.store.store import Store


async def test_what_the_router_remembers_is_recalled_overwritten_and_forgotten(store: Store) -> None:
    assert await store.recall_fleet() == {}
    await store.remember_fleet({"model:a": {"pinned": True, "reloadS": 2.5, "failure": None}, "generation": 7})
    await store.remember_fleet({"generation": 8, "model:b": {}, "nothing": None})
    assert await store.recall_fleet() == {
        "model:a": {"pinned": True, "reloadS": 2.5, "failure": None},
        "generation": 8,
        "model:b": {},
    }
    await store.remember_fleet({"model:a": None})
    assert "model:a" not in await store.recall_fleet()
    await store.remember_fleet({})

import pytest

from serve_app.domain.catalog import Catalogue, Entry, application_name
from serve_app.domain.errors import InvalidConfig, ModelAmbiguous, ModelNotFound


def entry(model_id: str, provider: str = "huggingface") -> Entry:
    return Entry(model_id, provider, application_name(model_id, provider), "model")


def test_a_name_is_an_alias_an_id_or_a_full_name() -> None:
    catalogue = Catalogue([entry("org/a"), entry("b", "ollama")], {"small": "org/a"})
    assert catalogue.resolve("small").id == "org/a"
    assert catalogue.resolve("org/a").provider == "huggingface"
    assert catalogue.resolve("ollama/b").provider == "ollama"
    assert catalogue.resolve("b").provider == "ollama"


def test_an_id_with_a_slash_and_a_tag_resolves() -> None:
    catalogue = Catalogue([entry("org/name:tag", "ollama")])
    assert catalogue.resolve("org/name:tag") == catalogue.resolve("ollama/org/name:tag")


def test_one_id_at_two_providers_is_ambiguous_and_both_are_named() -> None:
    catalogue = Catalogue([entry("org/a"), entry("org/a", "ollama")])
    with pytest.raises(ModelAmbiguous) as caught:
        catalogue.resolve("org/a")
    assert caught.value.details["candidates"] == ["huggingface/org/a", "ollama/org/a"]
    assert catalogue.names() == ["huggingface/org/a", "ollama/org/a"]


def test_a_full_name_means_its_model_though_another_one_has_it_for_an_id() -> None:
    catalogue = Catalogue([entry("ollama/a"), entry("a", "ollama")])
    assert catalogue.resolve("ollama/a").provider == "ollama"
    assert catalogue.resolve("huggingface/ollama/a").id == "ollama/a"


def test_an_alias_for_several_means_those_that_are_there() -> None:
    catalogue = Catalogue([entry("a"), entry("a", "up"), entry("b", "up")], {"any": ("huggingface/a", "up/a", "gone")})
    assert [found.full_name for found in catalogue.resolve_all("any")] == ["huggingface/a", "up/a"]
    with pytest.raises(ModelAmbiguous):
        catalogue.resolve("any")
    with pytest.raises(ModelNotFound, match="gone"):
        Catalogue([entry("b")], {"any": ("gone", "lost")}).resolve_all("any")
    with pytest.raises(InvalidConfig):
        Catalogue([entry("a")], {"x": ("a", "y"), "y": "a"})


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(ModelNotFound, match="Did you mean org/tiny-chat"):
        Catalogue([entry("org/tiny-chat"), entry("other")]).resolve("org/tiny-chta")


def test_every_shortest_name_means_its_own_entry() -> None:
    catalogue = Catalogue([entry("a"), entry("a", "ollama"), entry("b"), entry("c", "up")], {"b2": "c"})
    for item in catalogue.entries:
        assert catalogue.resolve(catalogue.name_of(item)) == item


def test_an_alias_of_an_alias_is_refused() -> None:
    with pytest.raises(InvalidConfig):
        Catalogue([entry("a")], {"x": "y", "y": "a"})


def test_application_names_are_stable_short_and_apart() -> None:
    assert application_name("rotunda/tiny-chat") == "model-rotunda-tiny-chat-6e69be"
    assert application_name("a/b") != application_name("a-b")
    assert application_name("a/b") != application_name("a/b", "ollama")
    assert len(application_name("x" * 300)) < 64

"""Making providers from arguments and settings; where their keys come from and where they never go."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import SecretStr

from serve_app.config import SecretUrl, Settings, UpstreamArgs
from serve_app.domain.errors import InvalidConfig
from serve_app.providers import registry
from serve_app.providers.base import Provider

URL = "http://127.0.0.1:1/v1"


def authorization(provider: Provider) -> str | None:
    headers = provider._wire._client.headers  # type: ignore[attr-defined]
    return headers.get("authorization")  # type: ignore[no-any-return]


def test_settings_alone_imply_a_provider_of_each_kind() -> None:
    assert registry.implied(Settings()) == ()
    settings = Settings(ollama_host="gpu-box", openai_base_url=SecretUrl(URL))  # type: ignore[arg-type]
    assert [args.provider for args in registry.implied(settings)] == ["ollama", "openai"]
    for args in registry.implied(settings):
        assert registry.create(args, settings)


@pytest.mark.parametrize("kind", sorted(registry.KINDS))
def test_a_provider_without_an_address_is_a_wrong_configuration(kind: str) -> None:
    args = UpstreamArgs(provider="lab", kind=kind)  # type: ignore[arg-type]
    with pytest.raises(InvalidConfig, match="base_url"):
        registry.create(args, Settings())


@pytest.mark.parametrize("kind", sorted(registry.KINDS))
def test_an_address_that_is_none_is_a_wrong_configuration(kind: str) -> None:
    with pytest.raises(InvalidConfig, match="an http:// or https:// address"):
        UpstreamArgs.read({"provider": "lab", "kind": kind, "base_url": "http://host:notaport"})


def test_the_key_is_read_from_where_the_arguments_point(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LAB_KEY", "from-the-environment")
    by_name = UpstreamArgs(provider="lab", kind="openai", base_url=URL, api_key_env="LAB_KEY")
    assert authorization(registry.create(by_name, Settings())) == "Bearer from-the-environment"
    (tmp_path / "key").write_text("from-the-file\n")
    by_file = UpstreamArgs(provider="lab", kind="ollama", base_url=URL, api_key_file="key")
    assert authorization(registry.create(by_file, Settings(rotunda_home=tmp_path))) == "Bearer from-the-file"
    with pytest.raises(InvalidConfig, match="NO_SUCH_KEY"):
        missing = UpstreamArgs(provider="lab", kind="openai", base_url=URL, api_key_env="NO_SUCH_KEY")
        registry.create(missing, Settings())


def test_the_key_of_the_settings_goes_to_the_address_of_the_settings_and_to_no_other() -> None:
    settings = Settings(openai_base_url=SecretUrl(URL), openai_api_key=SecretStr("sk-settings"))
    assert authorization(registry.create(UpstreamArgs(provider="a", kind="openai"), settings)) == "Bearer sk-settings"
    elsewhere = UpstreamArgs(provider="b", kind="openai", base_url="http://127.0.0.1:2/v1")
    assert authorization(registry.create(elsewhere, settings)) is None

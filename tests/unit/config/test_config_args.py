"""The typed arguments of the Serve applications, and who may reach a server."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from serve_app.config import GatewayArgs, ModelArgs, Settings, UpstreamArgs, check_exposure, check_nodes, read_secret
from serve_app.config.redaction import looks_like_secret_value, looks_secret, redact_url
from serve_app.domain.catalog import application_name
from serve_app.domain.errors import InvalidConfig
from serve_app.engines.base import EngineOptions

KEY = "k" * 16


def test_a_model_needs_only_its_id() -> None:
    args = ModelArgs.read({"model": "org/name"})
    assert args.application_name == application_name("org/name")
    assert EngineOptions(**args.engine_options()) == EngineOptions()
    assert not args.stays


@pytest.mark.parametrize("model", ["name", "org/name:tag", "org/sub/name", "org/Größe 2", "org/a.b-c_d"])
def test_ids_are_those_that_folders_can_have(model: str) -> None:
    assert ModelArgs(model=model).application_name == application_name(model)


def test_engine_options_carry_everything_an_engine_may_know() -> None:
    args = ModelArgs(
        model="org/name", num_cpus=2, max_concurrency=3, max_queue=4, dtype="bfloat16", context_length=5, max_tokens=6,
        options={"pace_ms": 1.5, "burst": True, "fault": None},
    )  # fmt: skip
    extra = (("burst", True), ("fault", None), ("pace_ms", 1.5))
    assert EngineOptions(**args.engine_options()) == EngineOptions(2, 3, 4, "bfloat16", 5, 6, extra)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({}, "args: model is missing."),
        ({"model": "../etc"}, "it must be an id such as org/name"),
        ({"model": "/a/b"}, "it must be an id such as org/name"),
        ({"model": "a/.."}, "it must be an id such as org/name"),
        ({"model": "a/b\n"}, "it must be an id such as org/name"),
        ({"model": ""}, "it must be an id such as org/name"),
        ({"modle": "a/b"}, "modle is unknown; did you mean model?"),
        ({"engine": "Scripted!"}, "engine = 'Scripted!'"),
        ({"num_cpus": 0}, "num_cpus = 0: it must be greater than or equal to 1"),
        ({"num_cpus": 0.5}, "num_cpus = 0.5: it must be a whole number"),
        ({"num_gpus": 1.5}, "more than one GPU must be a whole number"),
        ({"num_gpus": float("nan")}, "num_gpus = nan"),
        ({"memory_bytes": "lots"}, "memory_bytes = 'lots': this is not a size"),
        ({"memory_bytes": 0}, "memory_bytes = 0"),
        ({"min_replicas": 3, "max_replicas": 2}, "min_replicas (3) is more than max_replicas (2)"),
        ({"max_replicas": 2, "initial_replicas": 3}, "initial_replicas (3) is not between"),
        ({"max_replicas": 0}, "max_replicas = 0"),
        ({"target_ongoing_requests": 0}, "target_ongoing_requests = 0"),
        ({"idle_unload_s": 0}, "idle_unload_s = 0"),
        ({"idle_unload_s": 5, "pinned": True}, "contradicts a model that always stays"),
        ({"idle_unload_s": 5, "min_replicas": 1}, "contradicts a model that always stays"),
        ({"max_concurrency": 0}, "max_concurrency = 0"),
        ({"max_queue": -1}, "max_queue = -1"),
        ({"dtype": "int8"}, "it must be 'auto', 'float32', 'bfloat16' or 'float16'"),
        ({"context_length": 0}, "context_length = 0"),
        ({"max_tokens": 0}, "max_tokens = 0"),
        ({"aliases": ["a", "a"]}, "different from the others"),
        ({"aliases": "a"}, "aliases = 'a': it must be a list"),
        ({"graceful_shutdown_timeout_s": -1}, "graceful_shutdown_timeout_s = -1"),
        ({"options": {"a": {"b": 1}}}, "options.a"),
        ({"options": {"api_key": "hunter2"}}, "Secrets never stand in args"),
        ({"options": {"endpoint": "https://u:hunter2@x"}}, "(options.endpoint)"),
        ({"options": {"x": "sk-hunter2hunter2hunter2"}}, "(options.x)"),
    ],
)
def test_mistakes_in_model_arguments_are_named(args: dict[str, Any], words: str) -> None:
    given = args if not args or "modle" in args else {"model": "org/name", **args}
    with pytest.raises(InvalidConfig) as caught:
        ModelArgs.read(given)
    assert words in caught.value.message
    assert "hunter2" not in caught.value.message


def test_all_mistakes_come_together() -> None:
    with pytest.raises(InvalidConfig, match="has 3 problems"):
        ModelArgs.read({"model": "org/name", "num_cpus": 0, "max_queue": -1, "colour": "red"})


def test_pydantics_own_message_holds_no_values() -> None:
    with pytest.raises(ValidationError) as caught:
        UpstreamArgs.model_validate({"provider": "lab", "kind": "openai", "api_key_env": "hunter2"})
    assert "hunter2" not in str(caught.value)


def test_sizes_may_have_units() -> None:
    sizes = {"600MB": 600_000_000, "1.5 GiB": 3 * 2**29, "512": 512, "2k": 2000, "1TiB": 2**40}
    assert {text: ModelArgs(model="a/b", memory_bytes=text).memory_bytes for text in sizes} == sizes  # type: ignore[arg-type]


def test_given_arguments_win_over_the_defaults_of_the_model() -> None:
    defaults = ModelArgs(model="a/b", num_cpus=4, max_queue=7, aliases=("b",))
    merged = ModelArgs(model="a/b", num_cpus=1).over(defaults)
    assert (merged.num_cpus, merged.max_queue, merged.aliases) == (1, 7, ("b",))
    assert ModelArgs(model="a/b").over(None) == ModelArgs(model="a/b")


def test_a_merge_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(InvalidConfig, match=r"a/b: args over its file.*contradicts"):
        ModelArgs(model="a/b", pinned=True).over(ModelArgs(model="a/b", idle_unload_s=5))


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"settings": {"api_keys": "hunter2"}}, "Secrets never stand in args"),
        ({"settings": {"openai_api_key": "hunter2"}}, "Secrets never stand in args"),
        ({"settings": {"database_url": "postgresql://u:hunter2@db/x"}}, "(settings.database_url)"),
        ({"settings": {"max_qeue_size": 1}}, "did you mean max_queue_size?"),
        ({"settings": {"rotunda_home": "/x"}}, "read from the environment only"),
        ({"ingress_min_replicas": 5}, "ingress_min_replicas (5) is more than ingress_max_replicas (4)"),
        ({"ingress_min_replicas": 0}, "ingress_min_replicas = 0"),
        ({"platfrom": "x"}, "did you mean platform?"),
    ],
)
def test_mistakes_in_gateway_arguments_are_named(args: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        GatewayArgs.read(args)
    assert words in caught.value.message
    assert "hunter2" not in caught.value.message


def test_a_gateway_needs_no_arguments() -> None:
    assert GatewayArgs.read(None).platform_path() is None
    assert GatewayArgs.read({"platform": "p.yaml"}).platform_path() == Path("p.yaml")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"provider": "lab"}, "kind is missing"),
        ({"provider": "huggingface", "kind": "openai"}, "the name of the local models"),
        ({"provider": "a b", "kind": "openai"}, "lower-case letters"),
        ({"provider": "lab", "kind": "openai", "base_url": "llm"}, "an http:// or https:// address"),
        ({"provider": "lab", "kind": "openai", "base_url": "http://llm:port/v1"}, "an http:// or https:// address"),
        ({"provider": "lab", "kind": "openai", "base_url": "http://llm:70000"}, "an http:// or https:// address"),
        ({"provider": "lab", "kind": "openai", "base_url": "http://:80/v1"}, "an http:// or https:// address"),
        ({"provider": "lab", "kind": "openai", "api_key_file": "sk-" + "hunter2" * 3}, "(api_key_file)"),
        ({"provider": "lab", "kind": "openai", "min_replicas": 2}, "is more than max_replicas"),
    ],
)
def test_mistakes_in_upstream_arguments_are_named(args: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidConfig) as caught:
        UpstreamArgs.read(args)
    assert words in caught.value.message
    assert "hunter2" not in caught.value.message


def test_a_secret_is_read_where_it_is_used(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("from-file\n")
    by_name = read_secret("LAB_KEY", environ={"LAB_KEY": " from-env "})
    by_file = read_secret(file="key", home=tmp_path)
    assert by_name is not None
    assert by_file is not None
    assert (by_name.get_secret_value(), by_file.get_secret_value()) == ("from-env", "from-file")
    assert read_secret() is None


def test_a_missing_secret_names_its_place(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="environment variable LAB_KEY"):
        read_secret("LAB_KEY", environ={})
    with pytest.raises(InvalidConfig, match="The file nowhere"):
        read_secret(file="nowhere", home=tmp_path)


@pytest.mark.parametrize(
    "name", ["api_key", "apiKey", "OPENAI_API_KEY", "API_KEYS", "token", "hf_token", "accessToken"]
)
def test_names_of_secrets(name: str) -> None:
    assert looks_secret(name)


@pytest.mark.parametrize("name", ["db_password", "client_secret", "PRIVATE_KEY", "authorization", "session_token"])
def test_more_names_of_secrets(name: str) -> None:
    assert looks_secret(name)


@pytest.mark.parametrize(
    "name",
    ["api_key_env", "apiKeyFile", "max_tokens", "eos_token", "key", "monkey", "keys_per_s", "tokenizer", "token_ms"],
)
def test_names_that_only_sound_like_secrets(name: str) -> None:
    assert not looks_secret(name)


@pytest.mark.parametrize("value", ["Bearer abc", "hf_" + "a" * 20, "ghp_" + "a" * 20, "redis://:pw@host/0"])
def test_values_of_secrets(value: str) -> None:
    assert looks_like_secret_value(value)


@pytest.mark.parametrize("value", ["org/name", "user@example.com", "http://host/path@2x", 5, None, "hf_small"])
def test_values_that_are_none(value: object) -> None:
    assert not looks_like_secret_value(value)


def test_credentials_are_left_out_even_of_odd_urls() -> None:
    assert (
        redact_url("postgresql://u:p@ss/w@db:5432/x?a=1&sslpassword=s")
        == "postgresql://***@db:5432/x?a=1&sslpassword=***"
    )
    assert redact_url("u:p@db") == "***@db"
    assert redact_url("http://host/x?api_key=s&b=2") == "http://host/x?api_key=***&b=2"
    assert redact_url("sqlite+aiosqlite:///data/x.db") == "sqlite+aiosqlite:///data/x.db"


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.1.2.3", "::1", "[::1]"])
def test_loopback_needs_no_keys(host: str) -> None:
    assert check_exposure(host, Settings()) == ()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "box.example.com", "", "127.0.0.1.example.com"])
def test_other_addresses_refuse_to_start_without_keys(host: str) -> None:
    with pytest.raises(InvalidConfig, match=r"Set API_KEYS, listen on 127\.0\.0\.1, or set ALLOW_ANONYMOUS=true"):
        check_exposure(host, Settings())


def test_keys_or_consent_let_other_addresses_start() -> None:
    named = {"allowed_hosts": ("box.example.com",)}
    assert check_exposure("0.0.0.0", Settings(api_keys=(KEY,), **named)) == ()  # type: ignore[arg-type]
    (warning,) = check_exposure("0.0.0.0", Settings(allow_anonymous=True, **named))  # type: ignore[arg-type]
    assert "Everyone who reaches '0.0.0.0'" in warning
    (warning,) = check_exposure("0.0.0.0", Settings(api_keys=(KEY,)))  # type: ignore[arg-type]
    assert "ALLOWED_HOSTS" in warning


def test_several_nodes_need_postgresql() -> None:
    check_nodes(1, Settings())
    check_nodes(2, Settings(database_url="postgresql://u:p@db/x"))  # type: ignore[arg-type]
    with pytest.raises(InvalidConfig, match="cluster has 2 nodes"):
        check_nodes(2, Settings())

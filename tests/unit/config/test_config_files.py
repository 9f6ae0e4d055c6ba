"""The platform file, the files of models, and serve_config.yaml."""

from pathlib import Path

import pytest

from serve_app.config import Platform, load, read_models
from serve_app.config.platform import read_file
from serve_app.config.serve_file import read_serve_file
from serve_app.domain.errors import InvalidConfig

ROOT = Path(__file__).parents[3]


def refused(path: Path, text: str, kind: type = Platform) -> str:
    path.write_text(text)
    with pytest.raises(InvalidConfig) as caught:
        read_file(path, kind)
    return caught.value.message


def test_a_whole_platform_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "platform.yaml"
    path.write_text(
        """
        capacity: {cpus: 4, memory_bytes: 6GiB}
        providers:
          - {name: lab, kind: openai, base_url: "https://llm.example.com/v1/", api_key_env: LAB_KEY}
          - {name: box, kind: ollama, base_url: "http://box:11434", budget_bytes: 8GB}
        aliases: {small: rotunda/tiny-chat}
        fallbacks: {small: [lab/large, box/large]}
        settings: {max_queue_size: 5}
        """
    )
    platform = read_file(path, Platform)
    assert platform.capacity.memory_bytes == 6 * 2**30
    assert platform.fallbacks == {"small": ("lab/large", "box/large")}
    lab, box = (provider.upstream() for provider in platform.providers)
    assert (lab.provider, lab.application_name, lab.base_url) == ("lab", "upstream-lab", "https://llm.example.com/v1")
    assert box.budget_bytes == 8_000_000_000


def test_an_empty_platform_file_is_the_default(tmp_path: Path) -> None:
    (tmp_path / "platform.yaml").write_text("# nothing yet\n")
    assert read_file(tmp_path / "platform.yaml", Platform) == Platform()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("capacty: {}", "capacty is unknown; did you mean capacity?"),
        ("capacity: {cpu: 4}", "capacity.cpu is unknown; did you mean cpus?"),
        ("capacity: {memory_bytes: plenty}", "capacity.memory_bytes = 'plenty': this is not a size"),
        ("capacity: {cpus: -1}", "capacity.cpus = -1: it must be greater than 0"),
        ("settings: {max_qeue_size: 5}", "the setting max_qeue_size is unknown; did you mean max_queue_size?"),
        ("settings: {rotunda_home: /x}", "read from the environment only"),
        ("aliases: {a: b, b: c}", "the alias a points to another alias (b)"),
        ("aliases: {a: [c, b], b: c}", "the alias a points to another alias (b)"),
        ("aliases: {a: []}", "the alias a must name models, each once"),
        ("aliases: {a: [b, b]}", "the alias a must name models, each once"),
        ("fallbacks: {a: [a]}", "must be other models"),
        ("fallbacks: {a: b}", "it must be a list"),
        ("providers: [{name: lab}]", "providers.0.kind is missing"),
        ("providers: [{name: lab, kind: cohere}]", "providers.0.kind = 'cohere': it must be 'ollama' or 'openai'"),
        ("providers: [{name: Lab, kind: openai}]", "providers.0.name = 'Lab': it must be lower-case"),
        ("providers: [{name: huggingface, kind: openai}]", "the name of the local models"),
        ("providers: [{name: a, kind: ollama}, {name: a, kind: openai}]", "several providers are called a"),
        ("providers: [{name: a, kind: openai, api_key: hunter2}]", "(providers.0.api_key)"),
        ("providers: [{name: a, kind: openai, api_key_env: hunter2}]", "never put the key itself here"),
        ("providers: [{name: a, kind: openai, api_key_env: K, api_key_file: f}]", "not both"),
        ("providers: [{name: a, kind: openai, base_url: 'https://u:hunter2@x/v1'}]", "(providers.0.base_url)"),
        ("settings: {database_url: 'postgresql://u:hunter2@db/x'}", "(settings.database_url)"),
        ("- a list", "the file must hold a mapping"),
        ("a: [", "line 1: this is not YAML"),
        ("a: !!python/object:os.system x", "this is not YAML"),
    ],
)
def test_mistakes_in_the_platform_file_are_named(text: str, words: str, tmp_path: Path) -> None:
    report = refused(tmp_path / "platform.yaml", text)
    assert words in report
    assert "platform.yaml: " in report
    assert "hunter2" not in report


def test_a_broken_platform_file_joins_the_report_of_settings(tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/platform.yaml").write_text("capacty: {}\nmax_deployed: 0\n")
    with pytest.raises(InvalidConfig, match="has 3 problems"):
        load({"ROTUNDA_HOME": str(tmp_path), "MAX_QUEUE_SIZE": "0"})


def test_values_of_the_platform_file_are_validated_like_others(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("settings: {max_queue_size: many}")
    with pytest.raises(InvalidConfig, match=r"MAX_QUEUE_SIZE = 'many' \(platform.yaml\)"):
        load({"ROTUNDA_HOME": str(tmp_path)}, platform=Path("p.yaml"))


@pytest.mark.parametrize("path", [ROOT / "configs/platform.yaml", *sorted((ROOT / "configs/profiles").glob("*.yaml"))])
def test_the_shipped_platform_files_are_valid(path: Path, tmp_path: Path) -> None:
    loaded = load({"ROTUNDA_HOME": str(tmp_path), "HF_MODEL_PATH": "store"}, platform=path)
    assert loaded.platform == read_file(path, Platform)
    assert loaded.warnings == ()


def test_models_have_files_of_defaults(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("model: org/a\nnum_cpus: 2\n")
    (tmp_path / "b.yaml").write_text("model: org/b\n")
    assert {model: args.num_cpus for model, args in read_models(tmp_path).items()} == {"org/a": 2, "org/b": 1}
    assert read_models(tmp_path / "missing") == {}


def test_problems_of_all_model_files_come_together(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("model: org/a\n")
    (tmp_path / "b.yaml").write_text("model: org/a\n")
    (tmp_path / "c.yaml").write_text("num_cpus: 0.5\n")
    with pytest.raises(InvalidConfig) as caught:
        read_models(tmp_path)
    assert "b.yaml: another file already holds org/a." in caught.value.message
    assert "c.yaml: model is missing." in caught.value.message
    assert "num_cpus = 0.5: it must be a whole number" in caught.value.message


def test_the_shipped_model_files_are_valid() -> None:
    read_models(ROOT / "configs/models")


MODEL = """
  - name: model-x
    route_prefix: null
    import_path: deployments.model:build
    args: {model: org/x, aliases: [x]}
"""


def served(tmp_path: Path, applications: str, head: str = "") -> str:
    path = tmp_path / "serve_config.yaml"
    path.write_text(f"{head}\napplications:{applications}")
    with pytest.raises(InvalidConfig) as caught:
        read_serve_file(path)
    return caught.value.message


def test_a_serve_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "serve_config.yaml"
    path.write_text(
        "http_options: {host: 127.0.0.1}\napplications:"
        + MODEL
        + """
  - name: gateway
    import_path: deployments.gateway:build
    args: {settings: {max_queue_size: 5}}
  - name: upstream-box
    route_prefix: null
    import_path: deployments.upstream:build
    args: {provider: box, kind: ollama}
  - {name: other, route_prefix: /other, import_path: "somewhere.else:app"}
"""
    )
    found = read_serve_file(path)
    assert found.host == "127.0.0.1"
    assert found.gateway.settings == {"max_queue_size": 5}
    assert [model.model for model in found.models] == ["org/x"]
    assert [upstream.provider for upstream in found.upstreams] == ["box"]


def test_a_serve_file_without_a_host_listens_everywhere(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("applications:" + MODEL)
    assert read_serve_file(tmp_path / "s.yaml").host == "0.0.0.0"


@pytest.mark.parametrize(
    ("applications", "words"),
    [
        (" 5", "it holds no list of applications"),
        (MODEL + MODEL, "several applications are called model-x"),
        (MODEL + MODEL, "several applications serve the model org/x"),
        (MODEL + MODEL, "several models have the alias x"),
        (MODEL.replace("null", "/x"), "write route_prefix: null"),
        (MODEL.replace("    route_prefix: null\n", ""), "write route_prefix: null"),
        (MODEL.replace("model-x", "x"), "its name must begin with model-, for instance model-org-x-"),
        (
            MODEL.replace("aliases: [x]", "num_cpus: half"),
            "model-x: args: num_cpus = 'half': it must be a whole number",
        ),
        (MODEL.replace("aliases: [x]", "options: {hf_token: hunter2}"), "(options.hf_token)"),
        (MODEL + "    runtime_env: {env_vars: {API_KEYS: hunter2}}", "runtime_env: Secrets never stand in args"),
        (MODEL + "    runtime_env: {env_vars: {DATABASE_URL: 'postgres://u:hunter2@x/y'}}", "env_vars.DATABASE_URL"),
        (MODEL + "    deployments: [{name: M, user_config: {password: hunter2}}]", "deployment M: user_config"),
        (
            MODEL
            + "    deployments: [{name: M, ray_actor_options: {runtime_env: {env_vars: {OPENAI_API_KEY: hunter2}}}}]",
            "runtime_env.env_vars.OPENAI_API_KEY",
        ),
        ("\n  - {name: o, import_path: 'a:b', args: {api_key: hunter2}}", "application o: args: Secrets never stand"),
        (
            "\n  - {name: a, import_path: 'a:b'}\n  - {name: b, import_path: 'a:b'}",
            "several applications have the route /.",
        ),
    ],
)
def test_mistakes_in_the_serve_file_are_named(applications: str, words: str, tmp_path: Path) -> None:
    report = served(tmp_path, applications)
    assert words in report
    assert "hunter2" not in report

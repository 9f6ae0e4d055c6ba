"""Every setting: what it refuses, and where its value comes from."""

import logging
import os
import pickle
from pathlib import Path

import pytest
from pydantic import ValidationError

from serve_app.config import SETTINGS, Loaded, Setting, Settings, load
from serve_app.domain.catalog import Task
from serve_app.domain.errors import InvalidConfig

KEY = "k" * 16


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def report_of(environ: dict[str, str], **sources: object) -> str:
    with pytest.raises(InvalidConfig) as caught:
        load(environ, **sources)  # type: ignore[arg-type]
    return caught.value.message


def platform_file(home: Path, text: str) -> None:
    (home / "configs").mkdir(exist_ok=True)
    (home / "configs" / "platform.yaml").write_text(text)


@pytest.mark.parametrize("row", SETTINGS, ids=lambda row: row.name)
def test_a_wrong_value_is_reported_with_its_name_the_value_and_what_is_allowed(row: Setting) -> None:
    report = report_of({row.name: row.wrong})
    assert "The configuration has 1 problem:" in report
    line = next(line for line in report.splitlines() if line.startswith(f"  - {row.name} = "))
    assert "(environment)" in line
    assert f"Allowed: {row.allowed}" in line
    assert (row.wrong in line) == (not row.secret and "@" not in row.wrong and row.wrong.isprintable())


@pytest.mark.parametrize("row", [row for row in SETTINGS if row.default and row.field != "rotunda_home"], ids=str)
def test_a_default_read_from_the_environment_is_the_default(row: Setting) -> None:
    assert load({row.name: row.default}).settings == load({}).settings


def test_all_problems_stand_in_one_report() -> None:
    report = report_of(
        {"MAX_QUEUE_SIZE": "abc", "DATABASE_URL": "mysql://root:hunter2@db/x", "API_KEYS": f"hunter3,{KEY}"},
        args={"hf_model_pth": "x"},
    )
    assert "The configuration has 4 problems:" in report
    assert "did you mean hf_model_path?" in report
    assert "mysql://***@db/x" in report
    assert "key 1 has 7 characters" in report
    assert "hunter" not in report


def test_numbers_out_of_range_name_the_limits() -> None:
    assert "from 1 to 100,000; default: 256" in report_of({"MAX_QUEUE_SIZE": "0"})
    assert "a number from 0 to 1" in report_of({"MEMORY_WARNING_THRESHOLD": "nan"})


def test_memory_thresholds_must_rise_even_when_something_else_is_wrong_too() -> None:
    both = report_of({"MEMORY_CLEANUP_THRESHOLD": "0.96"})
    assert "MEMORY_CLEANUP_THRESHOLD (0.96) < MEMORY_CRITICAL_THRESHOLD (0.95)" in both
    assert "must rise" in report_of({"MEMORY_CLEANUP_THRESHOLD": "0.96", "MAX_QUEUE_SIZE": "x"})
    with pytest.raises(ValidationError, match="must rise"):
        Settings(memory_warning_threshold=0.9)


def test_the_strongest_source_wins_and_is_named(home: Path) -> None:
    def found(environ: dict[str, str], args: dict[str, object] | None = None) -> tuple[int, str]:
        loaded = load(environ, args=args)
        return loaded.settings.max_queue_size, loaded.sources["max_queue_size"]

    assert found({}) == (256, "default")
    platform_file(home, "settings: {max_queue_size: 11}")
    assert found({}) == (11, "platform.yaml")
    (home / ".env").write_text("MAX_QUEUE_SIZE=12\n")
    assert found({}) == (12, ".env")
    assert found({"MAX_QUEUE_SIZE": "13"}) == (13, "environment")
    assert found({"MAX_QUEUE_SIZE": "13"}, {"max_queue_size": 14}) == (14, "args")


def test_every_setting_has_a_source() -> None:
    assert set(load({}).sources) == set(Settings.model_fields)


def test_an_empty_variable_counts_as_unset(home: Path) -> None:
    (home / ".env").write_text("MAX_QUEUE_SIZE=12\n")
    assert load({"MAX_QUEUE_SIZE": " "}).settings.max_queue_size == 12


def test_a_weaker_wrong_value_is_not_looked_at(home: Path) -> None:
    (home / ".env").write_text("MAX_QUEUE_SIZE=wrong\n")
    assert load({"MAX_QUEUE_SIZE": "5"}).settings.max_queue_size == 5
    assert "MAX_QUEUE_SIZE = 'wrong' (.env)" in report_of({})


def test_without_a_mapping_the_environment_of_the_process_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_QUEUE_SIZE", "77")
    assert load().settings.max_queue_size == 77


def test_the_env_file_is_not_exported_and_dollars_stay(home: Path) -> None:
    (home / ".env").write_text("export API_KEYS='pa$$word${HOME}1234'\n# comment\nMAX_QUEUE_SIZE = 9 # why\n")
    settings = load({}).settings
    assert settings.api_keys[0].get_secret_value() == "pa$$word${HOME}1234"
    assert settings.max_queue_size == 9
    assert "MAX_QUEUE_SIZE" not in os.environ


@pytest.mark.parametrize("line", ["hunter2", "API_KEYS hunter2", "API_KEYS='hunter2", "=hunter2"])
def test_a_line_of_the_env_file_that_means_nothing_is_reported(line: str, home: Path) -> None:
    (home / ".env").write_text(f"\ufeff# keys\n\nHEARTBEAT_MS=900\n{line}\nMAX_QUEUE_SIZE=9\n")
    report = report_of({})
    assert "line 4 is not NAME=value" in report
    assert "hunter2" not in report


def test_named_files_must_exist_and_default_ones_need_not(home: Path) -> None:
    assert load({}).platform.max_deployed == 32
    assert "other.yaml: the file cannot be read" in report_of({}, platform=Path("other.yaml"))
    assert "other.env: the file cannot be read" in report_of({}, dotenv=Path("other.env"))
    (home / ".env").write_text("MAX_QUEUE_SIZE=9\n")
    assert load({}, dotenv=None).settings.max_queue_size == 256


def test_relative_paths_start_from_rotunda_home(tmp_path: Path) -> None:
    home = tmp_path / "elsewhere"
    home.mkdir()
    settings = load({"ROTUNDA_HOME": str(home), "IMAGE_STORAGE_PATH": "a/../pictures"}).settings
    assert settings.rotunda_home == home
    assert settings.hf_model_path == home / "models/huggingface"
    assert settings.image_storage_path == home / "pictures"
    assert settings.database_url.get_secret_value() == f"sqlite+aiosqlite:///{home}/data/rotunda.db"


def test_files_are_found_in_rotunda_home(tmp_path: Path) -> None:
    home = tmp_path / "elsewhere"
    home.mkdir()
    (home / ".env").write_text("MAX_QUEUE_SIZE=9\nROTUNDA_HOME=/nowhere\n")
    loaded = load({"ROTUNDA_HOME": str(home)})
    assert loaded.settings.max_queue_size == 9
    assert loaded.settings.rotunda_home == home
    assert loaded.warnings == ("ROTUNDA_HOME in .env is ignored: it is read from the environment only.",)


def test_absolute_paths_stay(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/x.db?timeout=5"
    assert load({"DATABASE_URL": url}).settings.database_url.get_secret_value() == url.replace(
        "sqlite:", "sqlite+aiosqlite:"
    )


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+asyncpg"])
def test_postgres_is_spoken_to_through_asyncpg(scheme: str) -> None:
    url = load({"DATABASE_URL": f"{scheme}://u:p@h:5432/d"}).settings.database_url
    assert url.get_secret_value() == "postgresql+asyncpg://u:p@h:5432/d"


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "sqlite+aiosqlite:///", "postgresql://h", "x"])
def test_databases_that_cannot_serve_are_refused(url: str) -> None:
    assert "DATABASE_URL" in report_of({"DATABASE_URL": url})


def test_the_model_store_is_created(home: Path) -> None:
    settings = load({"HF_MODEL_PATH": "deep/store"}).settings
    assert settings.hf_model_path == home / "deep/store"
    assert settings.hf_model_path.is_dir()


@pytest.mark.parametrize("path", ["file", "file/below"])
def test_an_unusable_model_store_is_logged_and_the_default_used(
    path: str, home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (home / "file").write_text("")
    with caplog.at_level(logging.ERROR):
        loaded = load({"HF_MODEL_PATH": path})
    assert loaded.settings.hf_model_path == home / "models/huggingface"
    assert f"HF_MODEL_PATH {home / path} cannot be used" in caplog.text
    assert caplog.messages == list(loaded.warnings)


def test_an_unreadable_model_store_is_not_used(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked" and allowed(path, mode))
    loaded = load({"HF_MODEL_PATH": "locked"})
    assert loaded.settings.hf_model_path == home / "models/huggingface"
    assert "it cannot be read" in loaded.warnings[0]


def test_a_read_only_model_store_is_kept_with_a_warning(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    loaded = load({"HF_MODEL_PATH": "mounted"})
    assert loaded.settings.hf_model_path == home / "mounted"
    assert "is read-only" in loaded.warnings[0]


def test_without_any_usable_model_store_the_server_still_starts(home: Path) -> None:
    (home / "models").write_text("")
    loaded = load({})
    assert loaded.settings.hf_model_path == home / "models/huggingface"
    assert "No local model will be found" in loaded.warnings[0]


@pytest.mark.parametrize(
    ("written", "address"),
    [
        ("127.0.0.1", "http://127.0.0.1:11434"),
        ("box:1234", "http://box:1234"),
        ("0.0.0.0:1234", "http://127.0.0.1:1234"),
        ("http://box", "http://box"),
        ("https://box/ollama/", "https://box/ollama"),
    ],
)
def test_ollama_host_is_read_as_ollama_reads_it(written: str, address: str) -> None:
    host = load({"OLLAMA_HOST": written}).settings.ollama_host
    assert host is not None
    assert host.get_secret_value() == address


def test_a_key_without_an_address_means_openai_itself() -> None:
    settings = load({"OPENAI_API_KEY": "anything"}).settings
    assert settings.openai_base_url is not None
    assert settings.openai_base_url.get_secret_value() == "https://api.openai.com/v1"
    assert load({}).settings.openai_base_url is None


def test_lists_are_split_and_trimmed() -> None:
    settings = load(
        {
            "ALLOWED_HOSTS": " Example.com, *.example.com ",
            "IMAGE_ALLOWED_TYPES": "jpg,image/png,jpeg",
            "API_KEYS": f"{KEY},",
        }
    ).settings
    assert settings.allowed_hosts == ("example.com", "*.example.com")
    assert settings.image_allowed_types == ("image/jpeg", "image/png")
    assert [key.get_secret_value() for key in settings.api_keys] == [KEY]


def test_yaml_lists_work_too(home: Path) -> None:
    platform_file(
        home, "settings: {cors_origins: 'https://a.example,https://b.example', hf_default_task: text-generation}"
    )
    settings = load({}).settings
    assert settings.cors_origins == ("https://a.example", "https://b.example")
    assert settings.hf_default_task is Task.TEXT_GENERATION


def test_svg_is_refused_with_the_reason() -> None:
    assert "SVG is refused, because it can carry scripts" in report_of({"IMAGE_ALLOWED_TYPES": "svg+xml"})


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"MAX_QEUE_SIZE": "5"}, "did you mean MAX_QUEUE_SIZE?"),
        ({"HF_MODEL_PAHT": "x"}, "did you mean HF_MODEL_PATH?"),
        ({"API_KEYS": f"{KEY},{KEY}"}, "the same key more than once"),
        ({"API_KEYS": KEY, "ALLOW_ANONYMOUS": "true"}, "ALLOW_ANONYMOUS has no effect"),
        ({"ALLOWED_HOSTS": "*"}, "DNS rebinding"),
        ({"OPENAI_BASE_URL": "http://box", "OPENAI_API_KEY": "k"}, "end in /v1"),
        ({"OPENAI_BASE_URL": "http://box/v1"}, "without a key"),
        ({"STREAM_SESSION_TIMEOUT_MS": "1000"}, "never applies"),
    ],
)
def test_what_works_but_surprises_is_a_warning(environ: dict[str, str], words: str) -> None:
    (warning,) = load(environ).warnings
    assert words in warning


def test_settings_of_the_models_in_the_gateways_args_are_a_warning() -> None:
    assert "reaches the gateway only" in load({}, args={"hf_enable_gpu": False}).warnings[0]


@pytest.mark.parametrize("name", ["HF_HOME", "HF_TOKEN", "MAX_SPEED", "PATH", "OPENAI_ORG_ID", "OTEL_SERVICE_NAME"])
def test_names_of_others_are_no_typos(name: str) -> None:
    assert load({name: "x"}).warnings == ()


SECRETS = {
    "API_KEYS": "swordfish-swordfish",
    "OPENAI_API_KEY": "swordfish",
    "DATABASE_URL": "postgresql://rotunda:swordfish@db/rotunda",
    "OPENAI_BASE_URL": "https://user:swordfish@llm.example.com/v1?api_key=swordfish",
    "OLLAMA_HOST": "http://user:swordfish@box:11434",
}


@pytest.mark.parametrize("render", [repr, str, lambda loaded: loaded.settings.model_dump_json()], ids=str)
def test_secrets_do_not_show(render: object) -> None:
    loaded: Loaded = load(SECRETS)
    text = render(loaded)  # type: ignore[operator]
    assert "swordfish" not in text
    assert "postgresql+asyncpg://***@db/rotunda" in text


def test_secrets_do_not_show_in_reports_of_wrong_values() -> None:
    wrong = {name: f"{value} \n" for name, value in SECRETS.items()}
    wrong |= {"API_KEYS": "sword fish swordfish,swordfish", "OPENAI_API_KEY": "sword fish swordfish"}
    wrong |= {"DATABASE_URL": "postgresql:/rotunda:swordfish@db/x", "OLLAMA_HOST": "ftp://user:swordfish@box"}
    wrong |= {"OPENAI_BASE_URL": "ftp://user:swordfish@box?token=swordfish"}
    report = report_of(wrong)
    assert report.count("\n  - ") == 5
    assert "swordfish" not in report


def test_secrets_are_there_for_who_needs_them_and_survive_a_process_border() -> None:
    settings = pickle.loads(pickle.dumps(load(SECRETS).settings))
    assert settings.openai_api_key.get_secret_value() == "swordfish"
    assert "swordfish@db" in settings.database_url.get_secret_value()


def test_settings_are_immutable_and_closed() -> None:
    settings = load({}).settings
    with pytest.raises(ValidationError):
        settings.max_queue_size = 5  # type: ignore[misc]
    with pytest.raises(ValidationError):
        Settings(max_qeue_size=5)  # type: ignore[call-arg]


@pytest.mark.parametrize("source", ["args", "platform"])
def test_secrets_are_refused_outside_the_environment(source: str, home: Path) -> None:
    if source == "args":
        report = report_of({}, args={"openai_api_key": "swordfish"})
    else:
        platform_file(home, "settings: {openai_api_key: swordfish}")
        report = report_of({})
    assert "Secrets never stand in args" in report
    assert "swordfish" not in report

"""Whatever stands in the environment or in a file, the answer is a value or a report, and no secret is in it."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app.config import SETTINGS, GatewayArgs, ModelArgs, Platform, UpstreamArgs, load, read_serve_file
from serve_app.config.args import Args
from serve_app.config.platform import read_file
from serve_app.domain.errors import InvalidConfig

NAMES = [row.name for row in SETTINGS]
TEXT = st.one_of(
    st.text(max_size=40),
    st.sampled_from(["~nobody-here/x", "~", "1e999", "-0", "00", "[", "://", "http://[", "a" * 5000, "\ud800", ",,"]),
    st.from_regex(r"(postgresql|http|sqlite)(\+\w+)?:/{0,4}[\[\]:@/?#%\w.-]{0,20}", fullmatch=True),
)
LEAF = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates()
KEYS = st.sampled_from([*ModelArgs.model_fields, *Platform.model_fields, *UpstreamArgs.model_fields, "settings", "x"])
NODE_KEYS = KEYS | st.text(max_size=4) | st.integers()
TREE = st.recursive(
    LEAF,
    lambda below: st.lists(below, max_size=3) | st.dictionaries(NODE_KEYS, below, max_size=4),
    max_leaves=12,
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@settings(max_examples=200, deadline=None)
@given(values=st.dictionaries(st.sampled_from(NAMES), TEXT, min_size=1, max_size=4))
def test_any_environment_is_a_value_or_a_report(values: dict[str, str], home: Path) -> None:
    paths = {"HF_MODEL_PATH", "ROTUNDA_HOME"} & set(values)
    environ = {"ROTUNDA_HOME": str(home), **{name: values[name] for name in values if name not in paths}}
    with contextlib.suppress(InvalidConfig):
        load(environ, dotenv=None, platform=None)


@pytest.mark.parametrize("name", ["ROTUNDA_HOME", "HF_MODEL_PATH", "IMAGE_STORAGE_PATH"])
@pytest.mark.parametrize("path", ["~nobody-here/x", "a\0b", "x" * 5000, "/dev/null/x", "/proc/x", "\ud800"])
def test_odd_paths_are_a_value_or_a_report(name: str, path: str, home: Path) -> None:
    with contextlib.suppress(InvalidConfig):
        load({"ROTUNDA_HOME": str(home), name: path}, dotenv=None, platform=None)


@settings(max_examples=200, deadline=None)
@given(
    secret=st.text("abcXYZ123[]:/?#@% ", min_size=6, max_size=30),
    start=st.sampled_from(["postgresql://u:", "http://u:"]),
)
def test_a_password_in_an_address_is_never_repeated(secret: str, start: str, home: Path) -> None:
    hidden = f"Zq{secret}qZ"
    for name in ("DATABASE_URL", "OLLAMA_HOST", "OPENAI_BASE_URL", "RAY_DASHBOARD_ADDRESS"):
        try:
            text = repr(
                load({"ROTUNDA_HOME": str(home), name: f"{start}{hidden}@host:x/y"}, dotenv=None, platform=None)
            )
        except InvalidConfig as error:
            text = error.message
        assert "Zq" not in text
        assert "qZ" not in text


@pytest.mark.parametrize("kind", [ModelArgs, GatewayArgs, UpstreamArgs, Platform])
@settings(max_examples=60, deadline=None)
@given(tree=TREE)
def test_any_yaml_is_a_value_or_a_report(kind: type[Args], tree: Any, home: Path) -> None:
    path = home / "any.yaml"
    path.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    with contextlib.suppress(InvalidConfig):
        read_file(path, kind)
    path.write_text(
        yaml.safe_dump({"applications": [{"name": "x", "import_path": "deployments.model:b", "args": tree}]})
    )
    with contextlib.suppress(InvalidConfig):
        read_serve_file(path)
    path.write_text(yaml.safe_dump({"applications": tree}))
    with contextlib.suppress(InvalidConfig):
        read_serve_file(path)


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=60) | st.text(alphabet="a:[]{}#&*!|>'\"%@`- \n\t", max_size=60).map(str.encode))
def test_any_bytes_are_a_value_or_a_report(data: bytes, home: Path) -> None:
    path = home / "any.yaml"
    path.write_bytes(data)
    with contextlib.suppress(InvalidConfig):
        read_file(path, Platform)
    (home / "any.env").write_bytes(data)
    with contextlib.suppress(InvalidConfig):
        load({"ROTUNDA_HOME": str(home)}, dotenv=Path("any.env"), platform=None)

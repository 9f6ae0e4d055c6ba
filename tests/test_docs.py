"""The generated parts of the documentation are what the code says today, and nothing is left undocumented."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import report
from serve_app.cli.reference import command_line, generated
from serve_app.config import SETTINGS, GatewayArgs, ModelArgs, Platform, UpstreamArgs, load
from serve_app.config.reference import json_schema
from serve_app.config.sources import parse_dotenv

ROOT = Path(__file__).parents[1]
FILES = generated(ROOT)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_generated_file_is_up_to_date(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == FILES[path], "stale: run `rotunda config docs`"


@pytest.mark.parametrize("row", SETTINGS, ids=lambda row: row.name)
def test_a_setting_is_documented(row: object) -> None:
    page = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    assert page.count(f"| `{row.name}` |") == 1  # type: ignore[attr-defined]
    assert row.meaning.endswith(".")  # type: ignore[attr-defined]


def test_no_setting_is_documented_that_does_not_exist() -> None:
    page = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `([A-Z_]+)` \|", page, re.MULTILINE) == [row.name for row in SETTINGS]


@pytest.mark.parametrize("model", [ModelArgs, GatewayArgs, UpstreamArgs, Platform])
def test_every_argument_has_a_meaning(model: type[ModelArgs]) -> None:
    assert [name for name, info in model.model_fields.items() if not info.description] == []


def test_the_example_environment_changes_nothing(tmp_path: Path) -> None:
    text = (ROOT / ".env.example").read_text(encoding="utf-8")
    assert parse_dotenv(text) == ({}, [])
    given, _ = parse_dotenv(re.sub(r"^#([A-Z_]+=)", r"\1", text, flags=re.MULTILINE))
    assert set(given) == {row.name for row in SETTINGS} - {"ROTUNDA_HOME"}
    home = {"ROTUNDA_HOME": str(tmp_path)}
    assert load({**given, **home}, dotenv=None).settings == load(home, dotenv=None).settings


def test_the_schema_describes_every_structure_by_name() -> None:
    definitions = json.loads(json_schema())["$defs"]
    assert {"ModelArgs", "GatewayArgs", "UpstreamArgs", "Platform"} <= set(definitions)
    assert all(definitions[name]["additionalProperties"] is False for name in definitions)


def test_every_command_is_documented() -> None:
    text = command_line()
    for name in (
        "models",
        "ps",
        "load",
        "unload",
        "pin",
        "plan",
        "chat",
        "bench",
        "config check",
        "config show",
        "db upgrade",
    ):
        assert f"\n## rotunda {name}\n" in text


@pytest.mark.parametrize("path", [report.PAGE, report.README], ids=lambda path: path.name)
def test_a_page_with_figures_says_what_the_results_say(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == report.pages(report.kept())[path], "run `python -m benchmarks.report`"


def test_every_plot_of_the_documentation_exists() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)]+\.svg)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).is_file(), f"{page.name} shows {target}"

"""The shape of the code, as far as import-linter (``make check``) does not hold it already."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PRODUCT = sorted([*ROOT.glob("serve_app/**/*.py"), *ROOT.glob("deployments/*.py")])
MOST_LINES = 420
MOST_BYTES = 5_000_000


def names(paths: list[Path]) -> list[str]:
    return [path.relative_to(ROOT).as_posix() for path in paths]


@pytest.mark.parametrize("path", PRODUCT, ids=names(PRODUCT))
def test_a_module_fits_in_one_head(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MOST_LINES


def test_the_core_knows_no_provider_by_name() -> None:
    """Providers register; nobody outside their own modules compares a name with theirs."""
    for path in PRODUCT:
        name = path.relative_to(ROOT).as_posix()
        if not name.startswith(("serve_app/providers/", "serve_app/config/")):
            compared = {text.lower() for text in _compared_strings(path)}
            assert not compared & {"ollama", "openai", "huggingface"}, name


def _compared_strings(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        parts = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
        parts += [node.pattern] if isinstance(node, ast.match_case) else []
        for part in parts:
            for leaf in ast.walk(part):
                if isinstance(leaf, ast.Constant) and isinstance(leaf.value, str):
                    yield leaf.value


def test_domain_and_engines_can_be_imported_without_torch_or_ray() -> None:
    code = (
        "import sys; import serve_app.gateway, serve_app.sessions, serve_app.engines.scripted, "
        "serve_app.engines.discovery, serve_app.api.app; "
        "sys.exit(bool({'torch', 'ray', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_no_committed_file_is_too_large() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        path = ROOT / name
        assert not path.is_file() or path.stat().st_size <= MOST_BYTES, name

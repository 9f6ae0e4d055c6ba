"""Paths of settings: made absolute, and the model store made usable."""

from __future__ import annotations

import os
from pathlib import Path


def inside(home: Path, path: Path) -> Path:
    """``path`` made absolute from ``home``, with ``..`` taken out but symbolic links kept."""
    return Path(os.path.normpath(home / path.expanduser()))


def at_home(path: Path | None, home: Path) -> Path | None:
    return None if path is None else inside(home, path)


def usable_store(path: Path, default: Path) -> tuple[Path, list[str]]:
    """The folder of the models, created when missing; ``default`` when ``path`` cannot be used.

    Returns the folder and sentences for the log. A folder that can be read but not written is kept: stores are often
    mounted read-only, and only pulling models needs to write.
    """
    trouble = _trouble(path)
    if trouble is None:
        read_only = [] if os.access(path, os.W_OK) else [f"HF_MODEL_PATH {path} is read-only: models cannot be pulled."]
        return path, read_only
    sentences = [f"HF_MODEL_PATH {path} cannot be used: {trouble}. The default {default} is used instead."]
    second = None if path == default else _trouble(default)
    if path == default or second:
        sentences = [f"HF_MODEL_PATH {path} cannot be used: {trouble}. No local model will be found."]
    return default, sentences


def _trouble(path: Path) -> str | None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        return "it is a file"
    except NotADirectoryError:
        return "a part of the path is a file"
    except UnicodeEncodeError:
        return "its name is not text"
    except OSError as error:
        return f"it cannot be created ({error.strerror})"
    if not os.access(path, os.R_OK | os.X_OK):
        return "it cannot be read"
    return None

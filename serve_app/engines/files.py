"""Reading a model folder without trusting it: bounded, and never outside the store."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve_app.domain.errors import ModelLoadFailed, ModelUnsafe

MAX_JSON_BYTES = 16 * 1024 * 1024
MAX_FILES = 5_000
MAX_DEPTH = 3
MARKERS = ("config.json", "adapter_config.json", "modules.json", "tokenizer.json", "tokenizer_config.json")
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json")
HUB_PREFIX = "models--"
DOWNLOADS = ".cache/huggingface/download"
"""Where ``hf download --local-dir`` keeps the files that it has not finished."""


@dataclass(frozen=True, slots=True)
class Folder:
    """One candidate of the store.

    ``path`` holds the files; ``home`` is what its links may point into besides the store (a hub repository keeps its
    blobs beside the snapshots); ``store`` is the resolved root. ``fault`` tells what is already wrong with it.
    """

    id: str
    path: Path
    home: Path
    store: Path
    fault: str | None = None


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """The files of a folder as the file system tells them: cheap to take, changes whenever a file does.

    ``changed_at`` is the newest inode change (seconds since the epoch): unlike the modification time it cannot be set
    by a copying program.
    """

    revision: str
    changed_at: float
    names: frozenset[str] = frozenset()
    dangling: tuple[str, ...] = ()
    unfinished: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()


def within(path: str | Path, parent: Path) -> bool:
    return Path(path).is_relative_to(parent)


def list_folders(root: Path) -> list[Folder]:
    """The candidates under ``root``: ``name``, ``org/name`` and the hub cache's ``models--org--name``.

    A folder that cannot be listed is a candidate too: the reader should learn of it.
    """
    store = root.resolve()
    found: list[Folder] = []
    for entry in _subfolders(store):
        if entry.name.startswith(HUB_PREFIX):
            found.append(_hub_folder(Path(entry.path), store))
        elif _looks_like_model(Path(entry.path)):
            found.append(_plain_folder(entry.name, Path(entry.path), store))
            found += [folder for folder in _of_organisation(Path(entry.path), store) if _is_whole(folder.path)]
        else:
            found += _of_organisation(Path(entry.path), store)
    return found


def _is_whole(path: Path) -> bool:
    """Whether a folder *within* something that looks like a model is one itself: stray files in an organisation's
    folder must not hide its models, and a model's own parts (``1_Pooling``, ``onnx``) are none."""
    return all((path / name).exists() for name in ("config.json", "tokenizer_config.json")) and any(
        (path / name).exists() for name in ("model.safetensors", "model.safetensors.index.json")
    )


def _of_organisation(organisation: Path, store: Path) -> list[Folder]:
    if not within(os.path.realpath(organisation), store):
        return [_plain_folder(organisation.name, organisation, store)]
    try:
        entries = _subfolders(organisation)
    except OSError as fault:
        reason = f"The folder cannot be listed ({fault.strerror})."
        return [Folder(_clean(organisation.name), organisation, organisation, store, reason)]
    paths = [Path(entry.path) for entry in entries]
    plain = [
        _plain_folder(f"{organisation.name}/{path.name}", path, store) for path in paths if _looks_like_model(path)
    ]
    return plain + [_hub_folder(path, store) for path in paths if path.name.startswith(HUB_PREFIX)]


def _subfolders(path: Path) -> list[os.DirEntry[str]]:
    with os.scandir(path) as entries:
        found = [entry for entry in entries if not entry.name.startswith(".") and entry.is_dir()]
    return sorted(found, key=lambda entry: entry.name)


def _looks_like_model(path: Path) -> bool:
    """Whether the folder has a file that only models have. One that cannot be listed counts: it must be reported."""
    try:
        with os.scandir(path) as entries:
            return any(entry.name in MARKERS or entry.name.endswith(WEIGHT_SUFFIXES) for entry in entries)
    except OSError:
        return True


def _plain_folder(name: str, path: Path, store: Path) -> Folder:
    real = Path(os.path.realpath(path))
    fault = None if within(real, store) else "The folder is a link that leaves the model store."
    return Folder(_clean(name), path, real, store, fault)


def _hub_folder(path: Path, store: Path) -> Folder:
    """A repository of the hub cache; ``refs/main`` chooses the snapshot, the only one is taken without it."""
    model_id = _clean(path.name.removeprefix(HUB_PREFIX).replace("--", "/"))
    home = Path(os.path.realpath(path))
    if not within(home, store):
        return Folder(model_id, path, home, store, "The folder is a link that leaves the model store.")
    try:
        snapshots = sorted(entry.name for entry in _subfolders(home / "snapshots"))
        main = home / "refs" / "main"
        chosen = _first_line(main) if main.is_file() else None
    except (OSError, ValueError):
        return Folder(model_id, path, home, store, "The download has not finished: it has no snapshot.")
    if chosen is None and len(snapshots) == 1:
        chosen = snapshots[0]
    if chosen not in snapshots or not within(os.path.realpath(home / "snapshots" / chosen), home):
        return Folder(model_id, path, home, store, "The snapshot that refs/main names is not there.")
    return Folder(model_id, home / "snapshots" / chosen, home, store)


def _first_line(path: Path) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read(200).strip()


def _clean(name: str) -> str:
    """A name that can be shown and sent as JSON, whatever bytes the file system has."""
    return name.encode("utf-8", "replace").decode("utf-8")


def fingerprint(folder: Folder) -> Fingerprint:
    """Look at every file's name, size and time; opens none.

    Raises:
        OSError: the folder cannot be listed.
        ModelLoadFailed: it has more files than a model has.
    """
    digest = hashlib.sha256(os.fsencode(folder.path.name))
    newest, names, dangling, outside = 0.0, [], [], []
    for name, entry in _walk(folder.path):
        try:
            status = entry.stat()
        except FileNotFoundError:
            dangling.append(name)
            continue
        if entry.is_symlink() and not within(os.path.realpath(entry.path), folder.store):
            outside.append(name)
        names.append(name)
        newest = max(newest, status.st_ctime)
        digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode("utf-8", "surrogateescape"))
    unfinished = _unfinished(folder)
    digest.update(repr((sorted(dangling), unfinished)).encode("utf-8", "surrogateescape"))
    return Fingerprint(digest.hexdigest()[:16], newest, frozenset(names), tuple(dangling), unfinished, tuple(outside))


def _walk(top: Path) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Relative names and entries of all files, hidden ones and folders behind links left out."""
    pending, seen = [("", str(top), 0)], 0
    while pending:
        prefix, path, depth = pending.pop()
        with os.scandir(path) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                seen += 1
                if seen > MAX_FILES:
                    raise ModelLoadFailed(f"The folder holds more than {MAX_FILES} files; that is no model.")
                if entry.name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    if depth < MAX_DEPTH:
                        pending.append((f"{prefix}{entry.name}/", entry.path, depth + 1))
                else:
                    yield prefix + entry.name, entry


def _unfinished(folder: Folder) -> tuple[str, ...]:
    found: list[str] = []
    for place in (str(folder.path), f"{folder.path}/{DOWNLOADS}", f"{folder.home}/blobs"):
        try:
            with os.scandir(place) as entries:
                found += [_clean(entry.name) for entry in entries if entry.name.endswith((".incomplete", ".part"))]
        except OSError:
            continue
    return tuple(sorted(found))


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> Any:
    """The value in a JSON file.

    Raises:
        ModelLoadFailed: it is too large, cannot be read, or is not JSON.
    """
    try:
        if not path.is_file():  # opening a pipe would wait for ever
            raise ModelLoadFailed(f"{path.name} is missing.")
        with open(path, "rb") as file:
            raw = file.read(limit + 1)
        if len(raw) > limit:
            raise ModelLoadFailed(f"{path.name} is larger than {limit} bytes; that is no configuration.")
        return json.loads(raw)
    except (ValueError, RecursionError) as fault:
        raise ModelLoadFailed(f"{path.name} is not valid JSON.") from fault
    except OSError as fault:
        raise ModelLoadFailed(f"{path.name} cannot be read ({fault.strerror}).") from fault


def read_object(path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """As :func:`read_json`, for a file that must hold an object; empty when there is no such file."""
    if not path.exists():
        return {}
    value = read_json(path, limit)
    if not isinstance(value, dict):
        raise ModelLoadFailed(f"{path.name} does not hold a JSON object.")
    return value


def resolve_shard(folder: Folder, name: object) -> Path:
    """The file that a sharded index names.

    Raises:
        ModelUnsafe: the name is a path, or leads out of the model's folder. (transformers would follow ``../``.)
    """
    if not isinstance(name, str) or not name.endswith(".safetensors") or os.path.basename(name) != name or "\\" in name:
        raise ModelUnsafe("The weight index names a file that is not a bare .safetensors name.")
    path = folder.path / name
    if not within(os.path.realpath(path), folder.home):
        raise ModelUnsafe(f"{name} is a link that leaves the model's folder.")
    return path

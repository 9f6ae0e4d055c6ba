"""The model store: which models a folder holds, and what their files say, without loading one.

Layouts: ``org/name`` and ``name`` folders, and the hub cache's ``models--org--name/snapshots/<revision>``. A folder
that cannot be used is listed with its ``problem``; it never hides the others.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from serve_app.domain.catalog import ModelInfo, Task
from serve_app.domain.errors import ModelLoadFailed, ModelUnsafe, RotundaError
from serve_app.engines import configs as said
from serve_app.engines.files import Fingerprint, Folder, fingerprint, list_folders, read_object, resolve_shard
from serve_app.engines.weights import Weights, read_header

log = logging.getLogger(__name__)

MAX_INDEX_BYTES = 64 * 1024 * 1024
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def discover(root: Path, default_task: Task | None = None) -> list[ModelInfo]:
    """All models under ``root``, by id; of two folders with one id the usable one, else the first.

    Raises:
        OSError: ``root`` itself cannot be listed.
    """
    return _one_per_id(_inspect(folder, default_task) for folder in list_folders(root))


def find(root: Path, model_id: str, default_task: Task | None = None) -> ModelInfo | None:
    """One model of the store by its id, without a look into the folders of others; None when there is none.

    Raises:
        OSError: ``root`` itself cannot be listed.
    """
    folders = (folder for folder in list_folders(root) if folder.id == model_id)
    return next(iter(_one_per_id(_inspect(folder, default_task) for folder in folders)), None)


def inspect(path: Path, model_id: str, default_task: Task | None = None, store: Path | None = None) -> ModelInfo:
    """What the files in ``path`` say. Never raises for the model's sake: see ``problem``.

    Args:
        store: links may point anywhere below it; without it, only below the folder (or its hub repository).
    """
    home = path.parent.parent if path.parent.name == "snapshots" else path
    home = home.resolve()
    return _inspect(Folder(model_id, path, home, store.resolve() if store else home), default_task)


def _one_per_id(infos: Iterable[ModelInfo]) -> list[ModelInfo]:
    chosen: dict[str, ModelInfo] = {}
    for info in infos:
        other = chosen.get(info.id)
        if other is not None:
            log.warning("two folders hold %s", info.id)
        if other is None or (info.usable and not other.usable):
            chosen[info.id] = info
    return [chosen[model_id] for model_id in sorted(chosen)]


def _inspect(folder: Folder, default_task: Task | None, print_: Fingerprint | None = None) -> ModelInfo:
    info = ModelInfo(folder.id, str(folder.path), revision=print_.revision if print_ else "")
    try:
        if folder.fault:
            raise (ModelUnsafe if "leaves" in folder.fault else ModelLoadFailed)(folder.fault)
        seen = print_ or fingerprint(folder)
        info = replace(info, revision=seen.revision)
        _check_whole(seen)
        return _describe(folder, seen, info, default_task)
    except RotundaError as fault:
        return replace(info, problem=fault.message, problem_code=fault.code)
    except OSError as fault:
        reason = f"A file of the model cannot be read ({fault.strerror})."
        return replace(info, problem=reason, problem_code=ModelLoadFailed.code)


def _check_whole(seen: Fingerprint) -> None:
    if seen.outside:
        raise ModelUnsafe(f"{seen.outside[0]} is a link that leaves the model store.")
    if seen.unfinished or seen.dangling:
        raise ModelLoadFailed("The download has not finished: files are missing. It is looked at again when they come.")
    if "adapter_config.json" in seen.names:
        raise ModelUnsafe("The folder holds an adapter, which loads its base model from elsewhere. Merge it first.")


def _describe(folder: Folder, seen: Fingerprint, info: ModelInfo, default_task: Task | None) -> ModelInfo:
    """Fill in what is known step by step, so that a model refused late still shows what it is."""
    configs = said.read_configs(folder.path, seen.names)
    if "config.json" not in seen.names:
        raise ModelLoadFailed("The folder holds no config.json. Download the model again, whole.")
    weights = _weights(folder, seen.names)
    task = said.task_of(configs, default_task)
    said.check_files(configs, task, seen.names)
    quantization = said.quantization_of(configs)
    return replace(
        info,
        task=task,
        architecture=configs.architecture,
        parameters=None if quantization else weights.parameters,
        size_bytes=weights.size_bytes,
        dtype=weights.dtype,
        context_length=said.context_of(configs, task),
        quantization=quantization,
        capabilities=said.capabilities_of(configs, task),
    )


def _weights(folder: Folder, names: frozenset[str]) -> Weights:
    """Sum up the files that transformers would load: the single one if there is one, else the index's."""
    if SINGLE in names:
        return read_header(resolve_shard(folder, SINGLE))
    if INDEX in names:
        return _sharded(folder)
    if any(name.endswith(PICKLES) for name in names):
        raise ModelUnsafe("The weights are pickled, and a pickle can run code. Convert them to safetensors.")
    if any(name.endswith(".safetensors") for name in names):
        raise ModelLoadFailed(
            f"The folder holds safetensors but neither {SINGLE} nor {INDEX}. Download it again, whole."
        )
    raise ModelLoadFailed("The folder holds no safetensors weights. Download the model again, whole.")


def _sharded(folder: Folder) -> Weights:
    weight_map = read_object(folder.path / INDEX, MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelLoadFailed(f"{INDEX} has no weight_map.")
    shards = sorted({str(name): resolve_shard(folder, name) for name in weight_map.values()}.items())
    missing = [name for name, path in shards if not path.exists()]
    if missing:
        raise ModelLoadFailed(f"{len(missing)} of {len(shards)} weight files are missing, first {missing[0]}.")
    total = Weights()
    for name, path in shards:
        weights = read_header(path)
        absent = {tensor for tensor, place in weight_map.items() if place == name} - weights.tensors
        if absent:
            raise ModelLoadFailed(f"{name} lacks {len(absent)} tensors that the index expects in it.")
        total += weights
    return total


@dataclass(slots=True)
class _Seen:
    print: Fingerprint | None
    since: float
    info: ModelInfo | None = None


class ModelStore:
    """A store that is looked at again and again, cheaply: only folders whose files changed are read.

    :attr:`problem` says in plain words why the last look failed; None when it did not.

    Args:
        root: the store; it may come into being later.
        settle_s: a folder is offered once nothing in it has changed for so long. While a known model changes, what
            was known stays offered: a model must not vanish because its files are being replaced.
    """

    def __init__(self, root: Path, default_task: Task | None = None, settle_s: float = 2.0) -> None:
        self.root = root
        self.problem: str | None = None
        self._default_task = default_task
        self._settle_s = settle_s
        self._seen: dict[Path, _Seen] = {}

    def __repr__(self) -> str:
        offered = sum(1 for seen in self._seen.values() if seen.info)
        return f"ModelStore({len(self._seen)} folders, {offered} offered)"

    def scan(self, now: float) -> list[ModelInfo]:
        """The models that are complete or hopeless, and at rest. ``now``: seconds since the epoch.

        While the store cannot be listed, what was known stays offered: a file system that is away for a moment must
        cost no model that is in memory.
        """
        try:
            folders = list_folders(self.root)
        except OSError as fault:
            problem = f"The model store {self.root} cannot be listed ({fault.strerror})."
            if problem != self.problem:
                log.warning(problem)
            self.problem = problem
        else:
            self.problem = None
            self._seen = {folder.path: self._look(folder, now) for folder in folders}
        return _one_per_id(seen.info for seen in self._seen.values() if seen.info)

    def _look(self, folder: Folder, now: float) -> _Seen:
        known = self._seen.get(folder.path)
        print_ = _try_fingerprint(folder)
        if known is None or known.print != print_:
            # At first sight the inode times tell how long a folder has been at rest, so that a start need not wait.
            rested = print_.changed_at if known is None and print_ else now
            known = _Seen(print_, min(now, rested), known.info if known else None)
        known.since = min(known.since, now)
        settled = now - known.since >= self._settle_s
        if settled and (known.info is None or not print_ or known.info.revision != print_.revision):
            known.info = _inspect(folder, self._default_task, print_)
        return known


def _try_fingerprint(folder: Folder) -> Fingerprint | None:
    try:
        return None if folder.fault else fingerprint(folder)
    except (OSError, ModelLoadFailed):
        return None

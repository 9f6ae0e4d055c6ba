"""The machine that figures were measured on: what it is, how busy it is, and what a server's processes use of it."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import psutil

PACKAGES = ("rotunda", "ray", "torch", "transformers", "fastapi", "uvicorn")
QUIET_SHARE = 0.25
"""Of the processors' time that others may take before a run, for its results to count as publishable."""
STEAL_SHARE = 0.05
SPEED_TRIES, SPEED_ROUNDS = 15, 1_000_000


def facts(packages: Iterable[str] = PACKAGES) -> dict[str, Any]:
    """Processor, memory, versions, date: what has to stand beside a figure."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
        **({"gpu": gpu} if (gpu := _gpu()) else {}),
        "versions": {name: found for name in packages if (found := _version(name))},
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpu() -> str | None:
    """The GPU that this process computed on, if it did."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@dataclass(frozen=True, slots=True)
class Quiet:
    """What the machine did for a moment before a run, as shares of all processors' time, and its ``speed()`` then."""

    busy: float
    steal: float
    load: float
    speed: float | None = None

    @property
    def problem(self) -> str | None:
        """Why a run that began now would not be worth publishing."""
        if self.busy > QUIET_SHARE:
            return f"others took {self.busy:.0%} of the processors before the run"
        if self.steal > STEAL_SHARE:
            return f"the host took {self.steal:.0%} of the processors before the run"
        return None

    def to_json(self) -> dict[str, Any]:
        told = {"busy": round(self.busy, 3), "steal": round(self.steal, 3), "load": self.load, "problem": self.problem}
        return told | ({"speed": round(self.speed, 2)} if self.speed is not None else {})


def look(seconds: float = 2.0) -> Quiet:
    """Watch the machine for so long; nothing of the caller's own may run meanwhile."""
    before = psutil.cpu_times()
    time.sleep(seconds)
    after = psutil.cpu_times()
    whole = sum(after) - sum(before)
    if whole <= 0:
        return Quiet(0.0, 0.0, os.getloadavg()[0], speed())
    idle = after.idle + getattr(after, "iowait", 0.0) - before.idle - getattr(before, "iowait", 0.0)
    steal = getattr(after, "steal", 0.0) - getattr(before, "steal", 0.0)
    return Quiet(max(0.0, (whole - idle - steal) / whole), steal / whole, os.getloadavg()[0], speed())


def speed() -> float:
    """Million rounds per second of an empty loop of Python, the median of SPEED_TRIES.

    One virtual machine is not as fast at every hour: this tells the hours of two runs apart, without any of their code.
    """
    times = []
    for _ in range(SPEED_TRIES):
        begun = time.perf_counter()
        for _ in range(SPEED_ROUNDS):
            pass
        times.append(time.perf_counter() - begun)
    return SPEED_ROUNDS / median(times) / 1e6


@dataclass(slots=True)
class ProcessUse:
    """CPU seconds (with those of its threads) and resident bytes of one process; ``name`` is its title."""

    name: str
    cpu_s: float
    rss: int
    fds: int


def use_of(processes: Iterable[psutil.Process]) -> dict[int, ProcessUse]:
    """What each process has used so far; those that are gone are left out."""
    found = {}
    for process in processes:
        with contextlib.suppress(psutil.Error), process.oneshot():
            times = process.cpu_times()
            found[process.pid] = ProcessUse(
                _title(process), times.user + times.system, process.memory_info().rss, process.num_fds()
            )
    return found


def _title(process: psutil.Process) -> str:
    """What a process is for: the name that Ray gives its workers, else the program's."""
    line = process.cmdline()
    return str(line[0] if line and line[0].startswith("ray::") else process.name())


@dataclass(frozen=True, slots=True)
class Spent:
    """CPU seconds between two looks, by process title."""

    by_name: Mapping[str, float]

    @property
    def total(self) -> float:
        return sum(self.by_name.values())

    def to_json(self) -> dict[str, float]:
        return {name: round(spent, 3) for name, spent in sorted(self.by_name.items(), key=lambda row: -row[1])}


def spent(before: Mapping[int, ProcessUse], after: Mapping[int, ProcessUse]) -> Spent:
    """CPU between two looks. A process that ended between them is missing: end none during a measurement."""
    names: dict[str, float] = {}
    for pid, use in after.items():
        used = use.cpu_s - (before[pid].cpu_s if pid in before else 0.0)
        names[use.name] = names.get(use.name, 0.0) + used
    return Spent({name: used for name, used in names.items() if used > 0})


class CpuMeter:
    """CPU seconds of a set of processes over a ``with`` block: ``meter.spent`` after it."""

    def __init__(self, processes: Callable[[], Iterable[psutil.Process]]) -> None:
        self._processes = processes
        self.spent = Spent({})

    def __enter__(self) -> CpuMeter:
        self._before = use_of(self._processes())
        return self

    def __exit__(self, *_: object) -> None:
        self.spent = spent(self._before, use_of(self._processes()))


def tree(pid: int) -> list[psutil.Process]:
    """A process and everything below it."""
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    return []

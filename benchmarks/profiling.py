"""Where a server's processes spend their time, by py-spy, which comes with Ray.

``python -m benchmarks.profiling PID [--seconds 10]`` prints one process's functions; scenarios use :func:`profile`.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import psutil

TOP = 12


def _program() -> str:
    beside = Path(sys.executable).with_name("py-spy")
    found = str(beside) if beside.exists() else shutil.which("py-spy")
    if not found:
        raise RuntimeError("py-spy is not installed: it comes with ray")
    return found


def profile(processes: Iterable[psutil.Process], seconds: float, top: int = TOP) -> dict[str, dict[str, float]]:
    """For each process, what share of its running time was spent below each of ``top`` functions, the largest first.

    Functions of the event loop itself stand below everything and are left out. Blocks for ``seconds``.
    """
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for process in processes:
            out = Path(folder) / str(process.pid)
            command = [_program(), "record", "--pid", str(process.pid), "--duration", str(int(seconds))]
            command += ["--format", "raw", "--rate", "200", "--nonblocking", "--output", str(out)]
            name = " ".join(process.cmdline())[:60]
            started.append((name, out, subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)))
        found = {}
        for name, out, running in started:
            running.wait(seconds + 60)
            found[name] = shares(out.read_text(encoding="utf-8"), top) if out.exists() else {}
        return found


def profile_under(
    load: Callable[[], object], processes: Callable[[], Iterable[psutil.Process]], seconds: float, top: int = TOP
) -> dict[str, dict[str, float]]:
    """:func:`profile` while ``load`` is run in a thread, again and again."""
    over = threading.Event()

    def repeat() -> None:
        while not over.is_set():
            load()

    beside = threading.Thread(target=repeat)
    beside.start()
    try:
        return profile(processes(), seconds, top)
    finally:
        over.set()
        beside.join()


def shares(raw: str, top: int = TOP) -> dict[str, float]:
    """Of py-spy's raw lines (``frame;frame;frame count``): the share of samples that had each function on the stack."""
    inclusive: Counter[str] = Counter()
    total = 0
    for line in raw.splitlines():
        stack, _, count = line.rpartition(" ")
        if stack and count.isdigit():
            total += int(count)
            for function in {_function(frame) for frame in stack.split(";")}:
                inclusive[function] += int(count)
    ranked = [(name, count / total) for name, count in inclusive.most_common() if not _loop(name)]
    return dict(ranked[:top])


def _function(frame: str) -> str:
    """``name (path/file.py:12)`` without the line."""
    name, _, place = frame.partition(" (")
    return f"{name} ({place.rpartition(':')[0]})" if ":" in place else frame


def _loop(function: str) -> bool:
    return any(word in function for word in ("asyncio/", "threading.py", "<module>", "default_worker.py", "main_loop"))


def lines(found: Mapping[str, Mapping[str, float]]) -> Iterable[str]:
    for name, functions in found.items():
        yield name
        for function, share in functions.items():
            yield f"  {share:6.1%}  {function}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pid", type=int, nargs="+")
    parser.add_argument("--seconds", type=float, default=10)
    given = parser.parse_args()
    for line in lines(profile([psutil.Process(pid) for pid in given.pid], given.seconds)):
        print(line)  # noqa: T201


if __name__ == "__main__":
    main()

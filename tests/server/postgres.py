"""A real PostgreSQL server for a test: made, started, removed. It refuses to run as root, so another user does."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest


@contextmanager
def postgres() -> Iterator[Server]:
    """A fresh server on a port of its own. Skips the test where PostgreSQL is not installed."""
    with TemporaryDirectory(prefix="fathom-pg-") as folder:
        Path(folder).chmod(0o777)
        server = Server(Path(folder) / "data")
        server.run("initdb", "-D", str(server.data), "-U", "fathom", "--auth=trust", "--no-sync")
        server.start()
        try:
            yield server
        finally:
            server.stop()


class Server:
    """One cluster in `data`."""

    def __init__(self, data: Path) -> None:
        self.data = data
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]

    @property
    def url(self) -> str:
        return f"postgresql://fathom@127.0.0.1:{self.port}/postgres"

    def run(self, program: str, *arguments: str) -> None:
        user = {"user": _user(), "group": pwd.getpwnam(_user()).pw_gid} if os.geteuid() == 0 else {}
        subprocess.run(
            [_find(program), *arguments], check=True, cwd="/", stdout=subprocess.DEVNULL, env={"LC_ALL": "C"}, **user
        )  # type: ignore[call-overload]

    def start(self) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={self.data}"
        log = str(self.data / "log")
        self.run("pg_ctl", "-D", str(self.data), "-l", log, "-o", options, "-w", "-t", "60", "start")

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """All of its processes are stopped, as on a machine that hangs."""
        parent = (self.data / "postmaster.pid").read_text().split()[0]
        children = subprocess.run(["ps", "-o", "pid=", "--ppid", parent], capture_output=True, text=True).stdout.split()
        pids = [int(pid) for pid in (parent, *children)]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)

    def stop(self, mode: str = "fast") -> None:
        self.run("pg_ctl", "-D", str(self.data), "-m", mode, "-w", "stop")
        time.sleep(0.1)


def _user() -> str:
    return "postgres" if any(u.pw_name == "postgres" for u in pwd.getpwall()) else "nobody"


def _find(program: str) -> str:
    places = [*sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]
    path = os.pathsep.join([*map(str, places), os.environ.get("PATH", "")])
    found = shutil.which(program, path=path)
    if not found:
        pytest.skip(f"{program} of PostgreSQL is not installed")
    return found

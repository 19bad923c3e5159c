"""The servers that libraries talk to: processes of their own, which a test kills and starts again.

PostgreSQL and Redis listen on a Unix socket in a folder that only their own user enters, so
nobody else on the machine finds a database without a password. The web server is on loopback.
"""

import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path

from children import Child, run
from needs import needs

_LIMIT = 60.0
"""Seconds within which a server is up, or gone."""
_LIFE = 6 * 3600.0
"""Seconds after which a server that a test forgot is killed."""
_TURN = 0.02
WEB_PEER = Path(__file__).with_name("web_peer.py")


class Server(ABC):
    """One server. Its methods block: beside an event loop they are called in a thread."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="vmibridge-libraries-"))
        self._process: Child | None = None

    @abstractmethod
    def command(self) -> list[str | Path]: ...

    @abstractmethod
    def answers(self) -> bool:
        """Whether it serves clients by now."""

    @abstractmethod
    def queries_left(self) -> int:
        """How many requests of clients it is at, but for the one that asks."""

    def left_behind(self) -> int:
        """How many queries ran on, up to now, when nobody waited for them any more."""
        return 0

    user: str | None = None
    kills_with = signal.SIGKILL

    def start(self) -> None:
        with (self.folder / "log").open("ab") as log:
            self._process = Child(
                self.command(), seconds=_LIFE, stdout=log, stderr=log, user=self.user
            )
        end = time.monotonic() + _LIMIT
        while not self.answers():
            assert self._process.poll() is None, self.said()
            assert time.monotonic() < end, self.said()
            time.sleep(_TURN)

    def kill(self) -> None:
        """End it as a crash does: its clients lose their connections, and nothing is finished."""
        assert self._process is not None
        self._process.send_signal(self.kills_with)
        # Not `wait` of a `Child`: that is for one that ends well.
        subprocess.Popen.wait(self._process, _LIMIT)
        self._process.end()
        self._process = None

    def close(self) -> None:
        if self._process is not None:
            self.kill()
        shutil.rmtree(self.folder)

    def said(self) -> str:
        return (self.folder / "log").read_text(errors="replace")[-4000:]


class Postgres(Server):
    """Debian's PostgreSQL, with a cluster of its own."""

    # An immediate shutdown: no process of it finishes anything, and the next start recovers. A
    # server that is killed by SIGKILL leaves the processes of its connections, which hold the next
    # start up until they notice.
    kills_with = signal.SIGQUIT

    def __init__(self) -> None:
        super().__init__()
        self._data = self.folder / "data"
        if os.geteuid() == 0:
            # It refuses to run as root.
            self.user = "postgres"
            os.chown(self.folder, pwd.getpwnam(self.user).pw_uid, -1)
        options = ["--auth=trust", "--username=postgres", "--no-sync", "--encoding=UTF8"]
        run([_of_postgres("initdb"), "-D", self._data, *options], check=True, user=self.user)

    @property
    def host(self) -> str:
        return str(self.folder)

    def command(self):
        settings = [
            "listen_addresses=",
            f"unix_socket_directories={self.folder}",
            "fsync=off",
            "max_connections=100",
            # A cancellation may reach PostgreSQL before it has begun the query, and is lost then:
            # psycopg waits for some time, in a plain task, too, and closes the connection. Only so
            # does the query end when nobody waits for it. asyncpg keeps the connection, and waits
            # for the query to end: an hour, without a limit. The log has each: see `left_behind`.
            "client_connection_check_interval=5s",
            "statement_timeout=20s",
        ]
        return [
            _of_postgres("postgres"),
            *("-D", self._data),
            *(word for setting in settings for word in ("-c", setting)),
        ]

    def answers(self):
        return run([_of_postgres("pg_isready"), "-q", "-h", self.folder]).returncode == 0

    def queries_left(self):
        return int(
            self._ask(
                "select count(*) from pg_stat_activity where backend_type = 'client backend'"
                " and state <> 'idle' and pid <> pg_backend_pid()"
            )
        )

    def left_behind(self):
        # With its statement: else the client was lost while it connected.
        lost = r"FATAL:  connection to client lost\n.*STATEMENT:"
        overdue = "ERROR:  canceling statement due to statement timeout"
        log = (self.folder / "log").read_text(errors="replace")
        return len(re.findall(f"{lost}|{overdue}", log))

    def _ask(self, query: str) -> str:
        options = ["-h", self.folder, "-U", "postgres", "-At", "-c", query]
        return run([_of_postgres("psql"), *options], check=True).stdout


def _of_postgres(program: str) -> str:
    """Debian has the programs of the server in a folder for each version, in nobody's path."""
    folders = Path("/usr/lib/postgresql").glob("*/bin")
    path = os.pathsep.join(map(str, sorted(folders, key=lambda each: float(each.parent.name))))
    return shutil.which(program, path=path) or needs(program)


class Redis(Server):
    """Debian's Redis, without a file of its data."""

    @property
    def path(self) -> str:
        return str(self.folder / "redis.sock")

    def command(self):
        options = {
            "--port": "0",
            "--unixsocket": self.path,
            "--save": "",
            "--appendonly": "no",
            "--dir": str(self.folder),
        }
        return [needs("redis-server"), *(word for option in options.items() for word in option)]

    def answers(self):
        with suppress(OSError):
            return self._ask("PING") == "+PONG"
        return False

    def queries_left(self):
        told = self._ask("INFO clients")
        return int(told.partition("blocked_clients:")[2].split()[0])

    def _ask(self, command: str) -> str:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(self.path)
            client.sendall(f"{command}\r\nQUIT\r\n".encode())
            return client.makefile().read().removesuffix("+OK\n").strip()


class Web(Server):
    """A web server in Python: see `web_peer`."""

    def __init__(self) -> None:
        super().__init__()
        with socket.socket() as made:
            made.bind(("127.0.0.1", 0))
            self.port = made.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"

    def command(self):
        return [sys.executable, WEB_PEER, str(self.port)]

    def answers(self):
        with suppress(OSError):
            return self.queries_left() == 0
        return False

    def queries_left(self):
        with urllib.request.urlopen(f"{self.url}/under-way", timeout=_LIMIT) as answer:
            return int(answer.read())

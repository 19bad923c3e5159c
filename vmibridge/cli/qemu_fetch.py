"""`vmibridge qemu fetch`: a QEMU that is new enough, beside a Debian that has an older one."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated

from cyclopts import Parameter

from vmibridge.backends.qemu.find import FETCHED, NAME, cache_folder
from vmibridge.errors import BackendError, ConfigError
from vmibridge.guest_files import guest_file
from vmibridge.text import printable


def fetch_qemu(
    *,
    into: Annotated[
        Path | None,
        Parameter(help="The folder to keep it in; by default ~/.cache/vmibridge/qemu."),
    ] = None,
) -> int:
    """Bring QEMU 11.1 to a Debian that has an older one, for this user alone.

    Debian's packages are downloaded and unpacked, 170 MB; nothing is installed, and root is not
    needed. A QEMU of the system that is new enough is linked to. vmibridge qemu run finds what is
    in ~/.cache/vmibridge/qemu ($XDG_CACHE_HOME/vmibridge/qemu) from any folder. What is there
    already is not brought again.

    Exit status: 0 when it is there, 1 when it cannot be brought, as to another system.

    Example: vmibridge qemu fetch
    """
    folder = into or _cached()
    bash = shutil.which("bash")
    if bash is None:
        raise BackendError("qemu fetch: needs bash, which is not in PATH")
    status = _Script([bash, str(guest_file("qemu/fetch-qemu")), str(folder.absolute())]).run()
    if status == 0:
        sys.stdout.write(f"{printable(str(folder.absolute() / NAME))}\n")
    return status


def _cached() -> Path:
    cache = cache_folder()
    if cache is None:
        raise ConfigError("there is no home folder to keep QEMU in: give --into FOLDER")
    return cache / FETCHED.parent


class _Script:
    """One run of it, in a session of its own: a signal ends all of it, apt among it."""

    def __init__(self, command: list[str]) -> None:
        self._command = command
        self._received: list[int] = []
        self._process: subprocess.Popen[str] | None = None

    def run(self) -> int:
        """Returns the exit status; raises `BackendError` when it fails."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._end)
        sys.stdout.flush()
        with subprocess.Popen(  # noqa: S603 - a script of vmibridge
            self._command,
            stdin=subprocess.DEVNULL, stdout=sys.stderr, stderr=subprocess.PIPE, text=True,
            errors="replace", start_new_session=True,
        ) as self._process:  # fmt: skip
            if self._received:
                self._end(self._received[0], None)
            assert self._process.stderr is not None
            lines = [line.strip() for line in self._process.stderr if line.strip()]
        if self._received:
            return 128 + self._received[0]
        if self._process.returncode:
            what = lines[-1] if lines else f"ended with status {self._process.returncode}"
            raise BackendError(f"qemu fetch: {what.removeprefix('fetch-qemu: ')}")
        return 0

    def _end(self, number: int, _frame: FrameType | None) -> None:
        self._received.append(number)
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGTERM)

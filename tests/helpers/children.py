"""Processes that tests start: each is bounded in time, and none outlives its test.

- A child that is not done within its limit is killed with all that it started, and the test
  fails with what it had printed. Nothing asserts how fast a child is: the limit is generous.
- A child has a session of its own, so that it is killed together with its children.
- A test that leaves a process fails (`left_processes`, which a fixture of `conftest.py` calls
  after every test); the process is killed.
- A child gets the default of every signal, whatever `pytest` itself was started with: an ignored
  signal, as `nohup` leaves one, and a blocked one would be inherited (`reset_signals`).
"""

import ctypes
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import IO, Any

import anyio
import anyio.abc
import pytest

SECONDS = 120
"""Within which a child has ended, on a machine that is busy with other work."""

_GRACE = 10.0
"""Seconds within which a process that was killed or let go has to be gone."""

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h

Command = Sequence[str | os.PathLike[str]]


# --- children that a test talks to --------------------------------------------------------


class Child(subprocess.Popen):
    """A `Popen` with a limit. At the end of a `with` block it is killed if it still runs.

    Standard output and standard error are pipes, as text, unless `options` say otherwise. When
    the limit has passed, it is killed, and what waits for it raises an `AssertionError` with what
    the child had printed.
    """

    def __init__(self, command: Command, *, seconds: float = SECONDS, **options: Any) -> None:
        self._line = shlex.join(map(os.fspath, command))
        self._seconds = seconds
        self._expired = threading.Event()
        self._heard: list[str | bytes] = []
        given = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "text": True,
            **options,
        }
        super().__init__(command, start_new_session=True, **given)
        self.stdout = self.stdout and _Heard(self.stdout, self)
        self.stderr = self.stderr and _Heard(self.stderr, self)
        self._limit = threading.Timer(seconds, self.expire)
        self._limit.daemon = True
        self._limit.start()

    def expire(self) -> None:
        """Its limit has passed."""
        self._expired.set()
        self.kill_all()

    def kill_all(self) -> None:
        """Kill it and what it started."""
        if self.returncode is None:
            # Not waited for yet: so the number is still that of its session.
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    def check(self) -> None:
        """Raises `AssertionError` if it was killed because its limit had passed."""
        if self._expired.is_set():
            self._hear_the_rest()
            raise AssertionError(f"killed after {self._seconds} s: {self.told()}")

    def _hear_the_rest(self) -> None:
        """What a child that was killed had printed, and nobody read."""
        for stream in (self.stdout, self.stderr):
            if stream and not stream.closed:
                with suppress(OSError):
                    os.set_blocking(stream.fileno(), False)
                    self._heard.append(os.read(stream.fileno(), 1 << 16))

    def told(self) -> str:
        """Its command, and what it has printed so far, for the message of a failure."""
        heard = "".join(
            each if isinstance(each, str) else each.decode(errors="replace") for each in self._heard
        )
        return f"{self._line}\n{heard}"

    def hear(self, data: str | bytes) -> None:
        self._heard.append(data)

    def wait(self, timeout: float | None = None) -> int:
        status = super().wait(timeout)
        self.check()
        return status

    def communicate(self) -> tuple[Any, Any]:
        """What it prints from here on, lines that were read ahead included."""
        with ThreadPoolExecutor(1) as beside:
            errors = beside.submit(self.stderr.read) if self.stderr else None
            out = self.stdout.read() if self.stdout else None
            told = errors.result() if errors else None
        self.wait()
        for stream in (self.stdout, self.stderr):
            if stream:
                stream.close()
        return out, told

    def __exit__(self, *error: object) -> None:
        self.end()
        if error[0] is None:
            self.check()
        else:
            # pytest shows it with the failure.
            sys.stdout.write(self.told())

    def end(self) -> None:
        """Kill it if it still runs, and close its pipes."""
        self._limit.cancel()
        self.kill_all()
        super().wait()
        for stream in (self.stdin, self.stdout, self.stderr):
            if stream:
                with suppress(OSError):
                    stream.close()


class _Heard:
    """A pipe of a child that keeps what was read from it."""

    def __init__(self, stream: IO[Any], child: Child) -> None:
        self._stream, self._child = stream, child

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _heard(self, data: Any) -> Any:
        self._child.hear(data)
        # The end of a pipe may be that of a child that was killed for its limit.
        if not data:
            self._child.check()
        return data

    def readline(self) -> Any:
        return self._heard(self._stream.readline())

    def read(self, size: int = -1) -> Any:
        data = self._heard(self._stream.read(size))
        self._child.check()
        return data

    def __iter__(self) -> Iterator[Any]:
        while line := self.readline():
            yield line


class Children:
    """The children of one test. It has to end each of them. `kind` makes them."""

    def __init__(self, kind: Callable[..., Child] = Child) -> None:
        self._kind = kind
        self._started: list[Child] = []

    def start(self, command: Command, **options: Any) -> Child:
        """A child that the test waits for, or ends by a `with` block."""
        child = self._kind(command, **options)
        self._started.append(child)
        return child

    def end(self) -> None:
        """Kill those that are left. Raises `AssertionError` if there were any."""
        left = [each for each in self._started if each.poll() is None]
        for each in self._started:
            each.end()
        if left:
            raise AssertionError("left running: " + "\n".join(each.told() for each in left))


def run(
    command: Command,
    *,
    kind: Callable[..., Child] = Child,
    seconds: float = SECONDS,
    check: bool = False,
    **options: Any,
) -> subprocess.CompletedProcess[Any]:
    """Run a command to its end: like `subprocess.run`, with output captured as text.

    Raises `AssertionError` if it is not done within its limit, or if it fails and `check` is
    set, with what it printed.
    """
    with kind(command, seconds=seconds, **options) as child:
        out, told = child.communicate()
    if check:
        assert child.returncode == 0, f"ended with {child.returncode}: {child.told()}"
    return subprocess.CompletedProcess(command, child.returncode, out, told)


# --- the same, beside an event loop -------------------------------------------------------


@asynccontextmanager
async def opened(command: Command, **options: Any) -> AsyncIterator[anyio.abc.Process]:
    """A child beside an event loop, which is killed at the end of the block if it still runs.

    The limit is that of the caller: `anyio.fail_after`.
    """
    async with await anyio.open_process(command, start_new_session=True, **options) as process:
        try:
            yield process
        finally:
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


async def run_beside(command: Command) -> subprocess.CompletedProcess[bytes]:
    """Run a command to its end beside an event loop. If that is cut short, it is killed, and
    what it had printed is shown with the failure."""
    heard: dict[str, bytes] = {"stdout": b"", "stderr": b""}

    async def hear(name: str, stream: anyio.abc.ByteReceiveStream) -> None:
        async for data in stream:
            heard[name] += data

    try:
        async with opened(command) as process:
            async with anyio.create_task_group() as tasks:
                for name in heard:
                    tasks.start_soon(hear, name, getattr(process, name))
            status = await process.wait()
    except BaseException:
        line = shlex.join(map(os.fspath, command))
        sys.stdout.write(f"not done: {line}\n")
        sys.stdout.writelines(data.decode(errors="replace") for data in heard.values())
        raise
    return subprocess.CompletedProcess(command, status, heard["stdout"], heard["stderr"])


# --- nothing is left ----------------------------------------------------------------------


def adopt_orphans() -> None:
    """What a child leaves behind becomes a child of this process, so that it is found."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


def descendants(known: Container[int] = ()) -> dict[int, str]:
    """The processes below this one, with their command lines; no zombies.

    Those that are `known` are left out, with what they started: a browser that several tests
    share has processes that come and go.
    """
    found: dict[int, str] = {}
    waiting = [os.getpid()]
    while waiting:
        for child in _children(waiting.pop()):
            if child in known:
                continue
            line = _command_line(child)
            if line is not None:
                found[child] = line
            waiting.append(child)
    return found


def _children(pid: int) -> list[int]:
    children: list[int] = []
    # It may end at any time, and so may a thread of it.
    with suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError):
                children += map(int, (thread / "children").read_text().split())
    return children


def _command_line(pid: int) -> str | None:
    """None for a zombie, which has ended, and for one that is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        if stat.rpartition(")")[2].split()[0] in "ZX":
            return None
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return None
    return shlex.join(words[:-1]) or stat


def left_processes(known: Container[int] = ()) -> list[str]:
    """Kill the processes below this one that are not `known`; gives their command lines.

    One that is about to end by itself is given the time to.
    """
    end = time.monotonic() + _GRACE
    left = descendants(known)
    while left and time.monotonic() < end:
        time.sleep(0.01)
        left = descendants(known)
    for pid in left:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    _reap(left)
    return list(left.values())


def _reap(pids: dict[int, str]) -> None:
    """Those that this process adopted have no other that waits for them."""
    for pid in pids:
        with suppress(ChildProcessError):
            os.waitpid(pid, 0)


# --- signals ------------------------------------------------------------------------------


def reset_signals() -> None:
    """What was ignored or blocked when this process began is not, for its children.

    A child has the default for a signal that its parent handles, so a handler that does nothing
    serves: `nohup make test` goes on when its terminal is gone.
    """
    for number in (signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


@pytest.fixture
def children() -> Iterator[Children]:
    """`children.start(COMMAND)`: a process that the test has to end."""
    started = Children()
    try:
        yield started
    finally:
        started.end()

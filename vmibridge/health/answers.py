"""The health socket: a unix socket whose questions the event loop answers by itself.

    async with health_socket("/run/vmibridge/health.sock") as listener:
        await answer_health(listener, health)

- Only this user and root may connect: the file's mode says so, and the kernel says who a peer is.
- A peer that has asked by the time it is accepted, as `vmibridge health` has, is answered in that
  very turn of the loop: a flood of traps puts an answer off by a turn or two, not by a queue.
- One that has not is waited for in a task: for `_SECONDS`, and at most `_MAX_WAITING` at a time;
  the oldest has to go when there is one more. It has at most `protocol.MAX_ASK` bytes here.
- An answer fits the buffer of the kernel, so nothing waits for a peer that does not read.
- `_BURST` connections are accepted in `_PERIOD`: a peer that connects in a loop has others of its
  user wait, and takes nothing from the guests.
"""

import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import anyio
from anyio.abc import TaskGroup

from vmibridge.aio import sockets
from vmibridge.aio.sockets import UnixListener, listen_unix, peer_user
from vmibridge.errors import BackendError, ConfigError
from vmibridge.files import reason
from vmibridge.health.protocol import MAX_ASK, AskReader, answer
from vmibridge.health.state import Health

__all__ = ["answer_health", "health_socket"]

_SECONDS = 2.0
"""That a peer has to ask."""
_MAX_WAITING = 8
_BURST = 20
_PERIOD = 0.1
"""Seconds."""
_MODE = 0o600


@asynccontextmanager
async def health_socket(path: str) -> AsyncIterator[UnixListener]:
    """Listen at this path for the block; a file that a process left behind is removed.

    Raises `ConfigError` where the path cannot be had: another process answers there, there is no
    folder, or it is no path of a socket.
    """
    try:
        listener = await listen_unix(Path(path), _MODE)
    except BackendError as error:
        raise ConfigError(f"--health-socket {path}: {error}; name another path") from error
    except OSError as error:
        raise ConfigError(f"--health-socket {path}: {reason(error, Path(path))}") from error
    try:
        yield listener
    finally:
        listener.close()


async def answer_health(listener: UnixListener, health: Health) -> None:
    """Answer whoever asks, until cancelled. What a peer does raises nothing."""
    waiting: dict[socket.socket, anyio.CancelScope] = {}
    async with anyio.create_task_group() as tasks:
        while True:
            opened = anyio.current_time()
            for _ in range(_BURST):
                accepted = await sockets.accept_one(listener.socket)
                if accepted is None:
                    return
                _take(accepted, health, waiting, tasks)
            await anyio.sleep(max(0.0, opened + _PERIOD - anyio.current_time()))


def _take(
    peer: socket.socket,
    health: Health,
    waiting: dict[socket.socket, anyio.CancelScope],
    tasks: TaskGroup,
) -> None:
    """Answer one that has asked, or have a task wait for it."""
    reader = AskReader()
    try:
        if peer_user(peer) not in (os.geteuid(), 0):
            peer.close()
            return
        if _answered(peer, health, reader):
            return
    except OSError:  # it has gone
        peer.close()
        return
    while len(waiting) >= _MAX_WAITING:
        waiting.pop(next(iter(waiting))).cancel()
    scope = waiting[peer] = anyio.CancelScope()
    tasks.start_soon(_await_question, peer, health, reader, scope, waiting)


async def _await_question(
    peer: socket.socket,
    health: Health,
    reader: AskReader,
    scope: anyio.CancelScope,
    waiting: dict[socket.socket, anyio.CancelScope],
) -> None:
    scope.deadline = anyio.current_time() + _SECONDS
    try:
        with scope, suppress(OSError):
            while not _answered(peer, health, reader):
                await anyio.wait_readable(peer)
    finally:
        waiting.pop(peer, None)
        # A task that was cancelled may not have left the selector: `close` sees to it.
        sockets.close(peer)


def _answered(peer: socket.socket, health: Health, reader: AskReader) -> bool:
    """Take what came; whether that was all that is said to this peer, which is closed then.

    Raises `OSError` for one that has gone.
    """
    try:
        data = peer.recv(MAX_ASK + 1)
    except BlockingIOError:
        return False
    told = answer(health, reader, data) if data else b""
    if told is None:
        return False
    if told:
        # Not all of it, for a peer that made its buffer small: it has what it wanted.
        peer.send(told)
    peer.close()
    return True

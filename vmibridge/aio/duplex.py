"""A connected socket, both ways: sent without waiting, received without a turn of the loop.

| here | so that |
|---|---|
| `send` | an answer costs one system call and no task switch; what there is no room for is kept |
| `flush` | the caller knows that all that was kept has been sent |
| `take_at_once` | what a peer has sent while its answer went out costs no turn of the loop |
| `look` | nor does what it sends right after that |
| `receive` | the same, for a task that awaits what comes |

Invariants:

- What is kept goes out first, and in its order, also if the task that waited was cancelled: a
  stream of frames is never cut within a frame.
- What is kept is bounded. A peer that does not read loses its connection (`shutdown`), and the
  task that receives sees the end of it.
- Other tasks have their turn after `AT_ONCE` receptions, or after the time of `Lookahead`.
- The socket is the caller's, who closes it after `end`, when nothing receives any more.
"""

import errno
import socket
from collections.abc import Callable
from contextlib import suppress

import anyio
from anyio.lowlevel import checkpoint

from vmibridge.aio.lookahead import Lookahead
from vmibridge.aio.loops import while_readable

AT_ONCE = 16
"""Receptions that follow each other without a turn of the loop."""


def _take_nothing() -> bool:
    return True


class Duplex:
    """Both directions of one socket that does not block. For one event loop."""

    __slots__ = (
        "_at_once",
        "_came",
        "_error",
        "_lookahead",
        "_max_unsent",
        "_sending",
        "_socket",
        "_take",
        "ended",
        "unsent",
    )

    def __init__(self, connected: socket.socket, max_unsent: int) -> None:
        """`max_unsent`: bytes that are kept for a peer that does not read."""
        self.unsent: bytearray = bytearray()
        """What was not sent yet. A caller may clear it when the connection is lost."""
        self.ended: bool = False
        """Whether `end` was called."""
        self._socket = connected
        self._max_unsent = max_unsent
        self._sending = anyio.Lock()
        self._take: Callable[[], bool] = _take_nothing
        self._at_once = AT_ONCE
        self._error: Exception | None = None
        self._lookahead = Lookahead()
        self._came = False

    # --- what goes -----------------------------------------------------------------

    def send(self, data: bytes | bytearray) -> bool:
        """Send what there is room for, and keep the rest. Returns whether all was sent.

        Raises `OSError` when the connection is broken, and when too much would be kept: then it
        is broken from here on.
        """
        sent = 0
        # Behind what is kept there is no room: to try would cost a system call.
        if not self.unsent:
            try:
                sent = self._socket.send(data)
            except BlockingIOError:
                sent = 0
            if sent == len(data):
                return True
        if not self.has_room(len(data) - sent):
            self.hang_up()
            raise OSError(errno.ENOBUFS, "the other end does not read what it is sent")
        self.unsent += memoryview(data)[sent:]
        return False

    def has_room(self, size: int) -> bool:
        """Whether `size` bytes more may be kept."""
        return len(self.unsent) + size <= self._max_unsent

    def send_unsent(self) -> None:
        """Send what there is room for of what was kept. Raises `OSError`."""
        with suppress(BlockingIOError):
            del self.unsent[: self._socket.send(self.unsent)]

    async def flush(self) -> None:
        """Wait until all has been sent that was kept; any number of tasks may.

        If cancelled, the rest stays, and goes out before what is sent next. Raises `OSError`, and
        `anyio.ClosedResourceError` after `end`.
        """
        # One at a time: a loop wakes one task for a socket.
        async with self._sending:
            while self.unsent:
                if not self.ended:
                    await anyio.wait_writable(self._socket)
                if self.ended:
                    raise anyio.ClosedResourceError
                self.send_unsent()

    # --- what comes ----------------------------------------------------------------

    def receive_now(self, size: int) -> bytes | None:
        """What has come, at most `size` bytes; `None`: nothing.

        Raises `anyio.EndOfStream` at the end, `OSError` when the connection is broken.
        """
        try:
            data = self._socket.recv(size)
        except BlockingIOError:
            return None
        if not data:
            raise anyio.EndOfStream
        self._came = True
        return data

    async def receive(self, size: int) -> bytes:
        """What has come, or comes, at most `size` bytes. If cancelled, nothing was received.

        Raises as `receive_now`, and `anyio.ClosedResourceError` after `end`.
        """
        while not self.ended:
            if not self._at_once:
                self._at_once = AT_ONCE
                await checkpoint()
                continue
            # As `receive_now`, without its call: this is on the path of every remote trap.
            try:
                data = self._socket.recv(size)
            except BlockingIOError:
                self._at_once = AT_ONCE
                await anyio.wait_readable(self._socket)
                continue
            if not data:
                raise anyio.EndOfStream
            self._at_once -= 1
            return data
        raise anyio.ClosedResourceError

    async def receive_each(self, take: Callable[[], bool]) -> None:
        """Call `take` when there is something to receive, as `while_readable` does.

        `take` is called by `take_at_once`, too. What it raises there is raised here.
        """
        self._take = take
        try:
            await while_readable(self._socket, self._take_in_turn)
        finally:
            self._take = _take_nothing

    def _take_in_turn(self) -> bool:
        if self._error is not None:
            raise self._error
        self._at_once = AT_ONCE
        self._lookahead.turned()
        return self._take()

    def take_at_once(self) -> None:
        """Take what has come already, without a turn of the loop. Raises nothing.

        The next trap often comes while the answer to the last is being sent. It does nothing
        when it was called `AT_ONCE` times in this turn, so that others have theirs.
        """
        if self._at_once and not self.ended:
            self._at_once -= 1
            self._take_some(self._take)

    def look(self) -> None:
        """As `take_at_once`, and wait a moment for it (`Lookahead`).

        For where nobody else waits for the loop. Raises nothing.
        """
        if self._at_once and not self.ended and not self._take_some(self._look):
            self.take_at_once()

    def _look(self) -> bool:
        return self._lookahead.look(self._take_now)

    def _take_now(self) -> bool:
        self._came = False
        self._take()
        return self._came

    def _take_some(self, take: Callable[[], bool]) -> bool:
        try:
            return take()
        except Exception as error:
            # For the task that receives: the end that it sees now wakes it.
            self._error = error
            self._at_once = 0
            self.hang_up()
            return True

    # --- the end -------------------------------------------------------------------

    def hang_up(self) -> None:
        """Send no more, and receive no more; the task that receives sees the end."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def end(self) -> None:
        """The connection is gone: each waiting task gets `anyio.ClosedResourceError`."""
        self.ended = True
        anyio.notify_closing(self._socket)

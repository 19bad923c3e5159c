"""The connection of one vCPU: answers go out without waiting, memory accesses in their order."""

import socket
from collections import deque
from collections.abc import Callable
from contextlib import suppress

import anyio

from vmibridge.aio.loops import while_readable
from vmibridge.backends.qemu.plugin.protocol import MOST_BODY, FrameReader
from vmibridge.backends.qemu.ram import SharedRam
from vmibridge.bridge.outcome import GONE
from vmibridge.errors import BackendError, GuestMemoryError
from vmibridge.vm.trap import TrapEvent

_PIECE, _LARGE_PIECE = 4096, 1 << 18
"""Bytes that are received at a time, at most; the larger one where memory was asked for."""
_AT_ONCE = 16
"""Traps that follow each other without a turn of the loop."""


class Vcpu:
    """One connection: what is sent on it, and the replies that it waits for."""

    def __init__(
        self, connected: socket.socket, frames: FrameReader, lane: int, ram: SharedRam | None
    ) -> None:
        self.lane = lane
        self.ram = ram
        self.frames = frames
        frames.most = MOST_BODY
        self.pending: TrapEvent | None = None
        self.gone: bool = False
        self.is_let_go: bool = False
        self._socket = connected
        self._reads: deque[_Reply] = deque()
        self._take: Callable[[int, bytes], None] = lambda _kind, _body: None
        self._at_once = 0
        self._error: Exception | None = None
        self._unsent = bytearray()
        self._sending = anyio.Lock()

    async def receive(self, take: Callable[[int, bytes], None]) -> None:
        """Give `take` the type and body of each frame, until it raises or this is cancelled.

        Raises `anyio.EndOfStream` at the end, `OSError` when the connection is broken.
        """
        self._take = take
        self._take_frames()
        await while_readable(self._socket, self._receive)

    def _receive(self) -> bool:
        self._at_once = _AT_ONCE
        if self._error is not None:
            raise self._error
        while self._receive_some():
            pass
        return True

    def receive_at_once(self) -> None:
        """Take what has come already: the next trap often comes while its answer is being sent.

        It saves a turn of the loop; a few times, so that others have their turn, too.
        """
        if self._at_once and not self.gone:
            self._at_once -= 1
            try:
                self._receive_some()
            except Exception as error:
                # For the task that receives.
                self._error = error
                self.hang_up()

    def _receive_some(self) -> bool:
        """Whether there may be more."""
        size = _PIECE if self.frames.most == MOST_BODY else _LARGE_PIECE
        try:
            data = self._socket.recv(size)
        except BlockingIOError:
            return False
        if not data:
            raise anyio.EndOfStream
        self.frames.feed(data)
        self._take_frames()
        return len(data) == size

    def _take_frames(self) -> None:
        while (frame := self.frames.next()) is not None:
            self._take(*frame)

    async def send(self, data: bytes) -> None:
        """Raises `BackendError` when the connection is gone.

        Cancelled, what is left of the frame goes out before the next one.
        """
        try:
            # There is room for an answer, unless something large is on its way.
            sent = 0 if self._unsent else self._send_some(data)
            if sent < len(data):
                self._unsent += data[sent:]
                async with self._sending:
                    await self._send_unsent()
        except OSError as error:
            raise BackendError(f"{GONE}: {error.strerror}") from error
        except anyio.ClosedResourceError as error:
            raise BackendError(GONE) from error

    async def _send_unsent(self) -> None:
        while self._unsent:
            if self.gone:
                raise anyio.ClosedResourceError
            await anyio.wait_writable(self._socket)
            del self._unsent[: self._send_some(self._unsent)]

    def _send_some(self, data: bytes | bytearray) -> int:
        try:
            return self._socket.send(data)
        except BlockingIOError:
            return 0

    @property
    def waits(self) -> bool:
        """Whether the vCPU stands still, as far as is known."""
        return self.pending is not None or bool(self._unsent)

    async def access(self, address: int, frame: bytes, size: int) -> bytes:
        """Send a memory access; returns the body of its reply, with at most `size` bytes of memory.

        Raises `GuestMemoryError`.
        """
        if self.gone:
            raise GuestMemoryError(address, GONE)
        reply = _Reply()
        self._reads.append(reply)
        self.frames.most = max(self.frames.most, 4 + size)
        try:
            await self.send(frame)
        except BackendError as error:
            raise GuestMemoryError(address, str(error)) from error
        await reply.arrived.wait()
        if reply.body is None:
            raise GuestMemoryError(address, GONE)
        return reply.body

    def take_reply(self, body: bytes) -> None:
        """The reply to the oldest access has come. Raises `ValueError` when there is none."""
        if not self._reads:
            raise ValueError("a MEMORY that nobody asked for")
        reply = self._reads.popleft()
        if not self._reads:
            self.frames.most = MOST_BODY
        reply.body = body
        reply.arrived.set()

    def let_go(self) -> None:
        """Hang up, of our own will."""
        self.is_let_go = True
        self.hang_up()

    def hang_up(self) -> None:
        """End the connection; the task that receives notices."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def lose(self) -> None:
        """The connection is gone."""
        self.gone = True
        anyio.notify_closing(self._socket)
        for reply in self._reads:
            reply.arrived.set()
        self._reads.clear()


class _Reply:
    __slots__ = ("arrived", "body")

    def __init__(self) -> None:
        self.arrived = anyio.Event()
        self.body: bytes | None = None

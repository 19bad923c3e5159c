"""The connection of one vCPU: answers go out without waiting, memory accesses in their order."""

import socket
from collections import deque
from collections.abc import Callable
from contextlib import suppress

import anyio
from anyio.abc import SocketAttribute, UNIXSocketStream

from vmibridge.backend.qemu_plugin.protocol import MOST_BODY, FrameReader
from vmibridge.errors import BackendError, GuestMemoryError
from vmibridge.event import TrapEvent
from vmibridge.loops import while_readable
from vmibridge.outcome import GONE
from vmibridge.qemu.ram import SharedRam

_PIECE, _LARGE_PIECE = 4096, 1 << 18
"""Bytes that are received at a time, at most; the larger one where memory was asked for."""


class Vcpu:
    """One connection: what is sent on it, and the replies that it waits for."""

    def __init__(
        self, stream: UNIXSocketStream, frames: FrameReader, lane: int, ram: SharedRam | None
    ) -> None:
        self.lane = lane
        self.ram = ram
        self.frames = frames
        frames.most = MOST_BODY
        self.pending: TrapEvent | None = None
        self.gone = False
        self.is_let_go = False
        self._socket: socket.socket = stream.extra(  # noqa: S610
            SocketAttribute.raw_socket
        )
        self._reads: deque[_Reply] = deque()
        self._unsent = bytearray()
        self._sending = anyio.Lock()

    async def receive(self, take: Callable[[int, bytes], bool]) -> None:
        """Give `take` the type and body of each frame, until it returns `False` or raises.

        Frames that have come after that one are kept. Raises `anyio.EndOfStream` at the end,
        `anyio.BrokenResourceError` when the connection is broken.
        """

        def receive() -> bool:
            size = _PIECE if self.frames.most == MOST_BODY else _LARGE_PIECE
            try:
                data = self._socket.recv(size)
            except BlockingIOError:
                return True
            except OSError as error:
                raise anyio.BrokenResourceError from error
            if not data:
                raise anyio.EndOfStream
            self.frames.feed(data)
            return take_all()

        def take_all() -> bool:
            while (frame := self.frames.next()) is not None:
                if not take(*frame):
                    return False
            return True

        if take_all():
            await while_readable(self._socket, receive)

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

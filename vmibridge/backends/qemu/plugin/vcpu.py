"""The connection of one vCPU: answers go out without waiting, memory accesses in their order."""

import socket
from collections import deque
from collections.abc import Callable, Sequence

import anyio

from vmibridge.aio.duplex import Duplex
from vmibridge.backends.qemu.plugin.protocol import MAX_BODY, FrameReader
from vmibridge.backends.qemu.ram import SharedRam
from vmibridge.bridge.outcome import GONE
from vmibridge.errors import BackendError, GuestMemoryError
from vmibridge.vm.memory import MAX_ACCESS
from vmibridge.vm.trap import TrapEvent

_PIECE, _LARGE_PIECE = 4096, 1 << 18
"""Bytes that are received at a time, at most; the larger one where memory was asked for."""
_MAX_UNSENT = 16 * MAX_ACCESS
"""Bytes that are kept for a plugin that does not read, beyond which it loses its connection."""


class Vcpu:
    """One connection: what is sent on it, and the replies that it waits for."""

    def __init__(
        self, connected: socket.socket, frames: FrameReader, lane: int, ram: SharedRam | None
    ) -> None:
        self.lane = lane
        self.ram = ram
        self.frames = frames
        frames.most = MAX_BODY
        self.pending: TrapEvent | None = None
        self.gone: bool = False
        self.is_let_go: bool = False
        # As much as the system allows: each time that it is full costs a turn of the loop.
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MAX_ACCESS)
        self._duplex = Duplex(connected, _MAX_UNSENT)
        self.receive_at_once: Callable[[], None] = self._duplex.take_at_once
        """Take what has come already: the next trap often comes while its answer is being sent."""
        self.look: Callable[[], None] = self._duplex.look
        """The same, and wait a moment for it."""
        self._reads: deque[_Reply] = deque()
        self._take: Callable[[int, bytes], None] = lambda _kind, _body: None

    async def receive(self, take: Callable[[int, bytes], None]) -> None:
        """Give `take` the type and body of each frame, until it raises or this is cancelled.

        Raises `anyio.EndOfStream` at the end, `OSError` when the connection is broken.
        """
        self._take = take
        self._take_frames()
        await self._duplex.receive_each(self._receive)

    def _receive(self) -> bool:
        while True:
            size = _PIECE if self.frames.most == MAX_BODY else _LARGE_PIECE
            data = self._duplex.receive_now(size)
            if data is None:
                return True
            self.frames.feed(data)
            self._take_frames()
            if len(data) < size:
                return True

    def _take_frames(self) -> None:
        while (frame := self.frames.next()) is not None:
            self._take(*frame)

    async def send(self, data: bytes) -> None:
        """Raises `BackendError` when the connection is gone.

        Cancelled, what is left of the frame goes out before the next one.
        """
        try:
            # There is room for an answer, unless something large is on its way.
            if not self._duplex.send(data):
                await self._duplex.flush()
        except OSError as error:
            raise BackendError(f"{GONE}: {error.strerror}") from error
        except anyio.ClosedResourceError as error:
            raise BackendError(GONE) from error

    @property
    def waits(self) -> bool:
        """Whether the vCPU stands still, as far as is known."""
        return self.pending is not None or bool(self._duplex.unsent)

    async def access(self, address: int, frame: bytes, size: int) -> bytes:
        """Send a memory access; returns the body of its reply, with at most `size` bytes of memory.

        Raises `GuestMemoryError`.
        """
        (body,) = await self.access_each(address, [(frame, size)])
        return body

    async def access_each(self, address: int, frames: Sequence[tuple[bytes, int]]) -> list[bytes]:
        """The same for several frames, of which the plugin replies to each in its turn.

        Raises `GuestMemoryError`, with `address`.
        """
        if self.gone:
            raise GuestMemoryError(address, GONE)
        # They come in their order, so it is the last one that is waited for.
        arrived = anyio.Event()
        replies = [_Reply(None) for _ in frames[1:]] + [_Reply(arrived)]
        self._reads += replies
        self.frames.most = max(self.frames.most, 4 + max(size for _, size in frames))
        try:
            await self.send(b"".join([frame for frame, _ in frames]))
        except BackendError as error:
            raise GuestMemoryError(address, str(error)) from error
        await arrived.wait()
        bodies = [reply.body for reply in replies if reply.body is not None]
        if len(bodies) < len(replies):
            raise GuestMemoryError(address, GONE)
        return bodies

    def take_reply(self, body: bytes) -> None:
        """The reply to the oldest access has come. Raises `ValueError` when there is none."""
        if not self._reads:
            raise ValueError("an unsolicited MEMORY")
        reply = self._reads.popleft()
        if not self._reads:
            self.frames.most = MAX_BODY
        reply.body = body
        if reply.arrived is not None:
            reply.arrived.set()

    def let_go(self) -> None:
        """Hang up, of our own will."""
        self.is_let_go = True
        self.hang_up()

    def hang_up(self) -> None:
        """End the connection; the task that receives notices."""
        self._duplex.hang_up()

    def lose(self) -> None:
        """The connection is gone."""
        self.gone = True
        self._duplex.end()
        for reply in self._reads:
            if reply.arrived is not None:
                reply.arrived.set()
        self._reads.clear()


class _Reply:
    __slots__ = ("arrived", "body")

    def __init__(self, arrived: anyio.Event | None) -> None:
        self.arrived = arrived
        self.body: bytes | None = None

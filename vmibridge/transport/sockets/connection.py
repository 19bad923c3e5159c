"""Frames over one connection, with TLS or without.

- `post` never waits. What the socket does not take at once is kept, up to a bound, and sent by
  `write`, a task of the connection.
- Frames are coalesced: between `cork` and `uncork`, and with `later`, they go out together.
- TLS is a code between bytes and bytes, in memory: the socket below it is the same, and what is
  sent without waiting in the clear is sent without waiting in TLS.
- That a connection is lost is raised in the task that receives (or shakes hands), and in no other;
  what is posted then goes nowhere.
"""

import socket
import ssl
from contextlib import suppress
from typing import Generic

import anyio
import msgspec

from vmibridge.aio.duplex import Duplex
from vmibridge.aio.loops import parking
from vmibridge.errors import ConnectionLostError
from vmibridge.transport.sockets.tls import TlsCode, ssl_reason
from vmibridge.transport.wire import HELLO_LIMIT, F, Frame, FrameReader, encode_into

_CHUNK = 256 << 10
"""Bytes that are received at a time."""
_MAX_UNSENT = 64 << 20
"""Bytes that are kept for a peer that does not read; beyond it the connection is lost."""
_MAX_CORKED = 1 << 20
"""Bytes that are kept for `uncork`; beyond it they go out before, or count as unsent."""
_STEPS = 3
"""How often `keep_alive` looks within the time that a peer may be silent."""


class Connection(Generic[F]):
    """See the module. Close it in any case."""

    def __init__(
        self, connected: socket.socket, decoder: "msgspec.msgpack.Decoder[F]", *, unsent: int = 0
    ) -> None:
        self.peer = ""
        """Who is at the other end, as far as it was proved."""
        self.received: int = 0
        """Counts the chunks that came."""
        self.closed: bool = False
        self.away: str = ""
        """As of an `AgentLink`: with its server it is closed."""
        self.reader: FrameReader[F] = FrameReader(decoder, HELLO_LIMIT)
        self._socket = connected
        self._duplex = Duplex(connected, unsent or _MAX_UNSENT)
        self._unsent = self._duplex.unsent
        self._plain = bytearray()
        """Frames that were posted, and that the socket was not given yet."""
        self._tls: TlsCode | None = None
        self._corked = False
        self._waking = False
        self._more = parking()
        self._given_back: list[F] = []
        self._behind_handshake = False

    async def start_tls(self, context: ssl.SSLContext, name: str | None) -> ssl.SSLObject:
        """The handshake of TLS, as the client of server `name`, or as a server.

        Raises `ConnectionLostError` when it fails.
        """
        tls = TlsCode(context, name)
        self._tls = tls
        try:
            while not tls.shake_hands():
                await self._flush_all()
                tls.feed(await self._receive())
            await self._flush_all()
            self._behind_handshake = True
        except ssl.SSLError as error:
            # The other end wants to know why.
            with suppress(OSError):
                self._send()
            raise ConnectionLostError(f"TLS: {ssl_reason(error)}") from error
        except (OSError, anyio.ClosedResourceError) as error:
            raise ConnectionLostError(str(error) or "closed by the peer") from error
        return tls.ssl

    async def receive(self) -> list[F]:
        """Wait for frames: one at least. Raises `ConnectionLostError` and `WireError`."""
        if self._given_back:
            frames, self._given_back = self._given_back, []
            return frames
        while True:
            if self._behind_handshake:
                # What came with the last of the handshake is here already.
                self._behind_handshake = False
                data = b""
            else:
                data = await self._receive()
            if self._tls is not None:
                try:
                    data = self._tls.decrypt(data)
                except ssl.SSLError as error:
                    raise ConnectionLostError(f"TLS: {ssl_reason(error)}") from error
            frames = self.reader.feed(data)
            if frames:
                return frames
            # The reader has a copy: kept until more comes, it would take as much again.
            del data

    def give_back(self, frames: list[F]) -> None:
        """Frames that were received too soon: they come again."""
        self._given_back = frames

    async def _receive(self) -> bytes:
        try:
            data = await self._duplex.receive(_CHUNK)
        except anyio.EndOfStream:
            raise ConnectionLostError("closed by the peer") from None
        except anyio.ClosedResourceError:
            raise ConnectionLostError("closed by the peer") from None
        except OSError as error:
            raise ConnectionLostError(error.strerror or str(error)) from error
        self.received += 1
        return data

    def post(self, frame: Frame, *, later: bool = False) -> None:
        """Send a frame; with `later`, together with what comes until the loop turns."""
        if self.closed:
            return
        encode_into(self._plain, frame)
        if self._corked and len(self._plain) < _MAX_CORKED:
            return
        if self._unsent:
            self._keep()
        elif not later:
            self.flush()
        elif not self._waking:
            self._keep()

    def allow(self, size: int) -> None:
        """A frame of so many bytes may come, from here on."""
        self.reader.limit = max(self.reader.limit, size)

    def cork(self) -> None:
        """Keep what is posted until `uncork`."""
        self._corked = True

    def uncork(self) -> None:
        """Send what was posted since `cork`."""
        if self._corked:
            self._corked = False
            if self._plain:
                self.flush()

    def flush(self) -> None:
        """Send what the socket takes."""
        # Else it takes nothing: what was posted stays with what was posted before, for `write`.
        if not self._unsent:
            try:
                self._send()
            except OSError:
                # The task that receives learns of it.
                self._unsent.clear()
        if self._unsent and not self._waking:
            self._keep()

    def _keep(self) -> None:
        """Have `write` send it: that is woken once for all that comes until then."""
        self._waking = True
        self._more.wake()
        if not self._duplex.has_room(len(self._plain)):
            self.close()

    def _send(self) -> None:
        """Send what was posted, or keep it behind what is kept. Raises `OSError`."""
        data = self._plain
        if self._tls is not None:
            if data:
                self._tls.encrypt(data)
            data = self._tls.outgoing
        if data:
            try:
                self._duplex.send(data)
            finally:
                data.clear()

    async def _flush_all(self) -> None:
        while not self.closed:
            if not self._unsent:
                self._send()
            if not self._unsent:
                return
            await self._duplex.flush()
        raise anyio.ClosedResourceError

    async def write(self) -> None:
        """Send what was kept, until the connection is closed or this is cancelled."""
        while not self.closed:
            if not self._waking:
                await self._more.wait()
            self._waking = False
            try:
                await self._flush_all()
            except (OSError, anyio.ClosedResourceError):
                self._unsent.clear()

    async def drain(self, seconds: float) -> None:
        """Wait for a while until all is sent that was posted."""
        with anyio.move_on_after(seconds), suppress(OSError, anyio.ClosedResourceError):
            await self._flush_all()

    def close(self) -> None:
        """Hang up. Nothing is sent any more; the task that receives ends."""
        if self.closed:
            return
        self.closed = True
        with suppress(OSError, ssl.SSLError):
            if self._unsent:
                self._duplex.send_unsent()
            self._send()
            if self._tls is not None:
                self._tls.end()
                self._send()
        self._duplex.end()
        self._socket.close()
        self._more.wake()


async def keep_alive(connection: Connection[F], ping: "Frame | None", silence: float) -> None:
    """Hang up when nothing came for `silence` seconds; `ping` asks for something now and then.

    Time in which the loop stood still does not count.
    """
    heard, silent_steps = connection.received, 0
    while not connection.closed:
        # A step, however late its end comes: what has come by then may not be received yet.
        await anyio.sleep(silence / _STEPS)
        if connection.received != heard:
            heard, silent_steps = connection.received, 0
        elif silent_steps == _STEPS - 1:
            connection.close()
        else:
            silent_steps += 1
            if ping is not None:
                connection.post(ping)

"""A gdbstub on a socket: commands go out, replies come back in their order.

- One task reads for all of the client's life (`read`), and hands each reply to the command
  that waits longest. Stop replies are not asked for: they go to `on_stop`.
- Nothing is acknowledged once the stub has agreed, or is QEMU's: a byte that arrives while
  the VM runs stops it.
- Another client may let the VM go on by QMP at any moment, and then the stub drops the first
  command that comes (`commands.is_probed`). Where that would matter a probe goes ahead.
- A stub that owes a reply for `patience` seconds is lost, as one that says what it must not.
"""

import socket
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from os import sched_yield

import anyio

from vmibridge.aio import sockets
from vmibridge.aio.duplex import Duplex
from vmibridge.aio.listening import wait_listening
from vmibridge.backends.qemu.gdb import commands
from vmibridge.backends.qemu.gdb.commands import Exit, ReplyError, Stop, StubError
from vmibridge.backends.qemu.gdb.packets import (
    Mark,
    Notification,
    PacketError,
    PacketReader,
    encode,
)
from vmibridge.backends.qemu.gdb.registers import (
    QEMU_X86_64,
    RegisterLayout,
)
from vmibridge.backends.qemu.gdb.target_description import read_layout
from vmibridge.errors import BackendError

CLOSED = "it closed the connection"
"""Why a stub was lost that ended its connection between two packets, as one that exits does."""
PATIENCE = 10.0
"""Seconds that a stub may owe a reply."""
_IN_FLIGHT = 32
"""Commands that are sent ahead of their replies."""
_MAX_TEXT = 1 << 20
_MAX_STOPS = 256
_MAX_UNSENT = 64 << 20
"""Bytes that are kept for a stub that does not read; beyond it the connection is lost."""
_TRIES = 4
_MAX_PIECES = 100
_PROBE = encode(commands.PROBE)

OnReply = Callable[[bytes], None]


def _on_probed(_reply: bytes) -> None:
    """Stands for a probe among the replies that are due."""


class ClientLostError(BackendError):
    """The connection is gone, or cannot be used any more."""


class _Replies:
    """Waits for the replies to some commands."""

    __slots__ = ("arrived", "data", "due")

    def __init__(self, due: int) -> None:
        self.arrived = anyio.Event()
        self.data: list[bytes] = []
        self.due = due

    def take(self, reply: bytes) -> None:
        self.data.append(reply)
        if len(self.data) == self.due:
            self.arrived.set()


async def connect(where: str) -> socket.socket:
    """A connection to `unix:PATH` or `tcp:HOST:PORT`. Raises `OSError`."""
    kind, _, place = where.partition(":")
    if kind == "unix":
        return await sockets.connect(socket.AF_UNIX, place)
    host, _, port = place.rpartition(":")
    return await sockets.connect_tcp(host.strip("[]"), int(port))


class GdbClient:
    """The host's end of one connection. For one event loop."""

    patience = PATIENCE

    def __init__(self, connection: socket.socket) -> None:
        self.on_stop: Callable[[Stop | Exit], None] = lambda _stop: None
        """Told that the VM stands still, or has ended; in the task that reads."""
        self.layout: RegisterLayout = QEMU_X86_64
        self.features: dict[str, str] = {}
        self.chunk: int = 128
        """Bytes of memory that one command may read or write."""
        self.why_lost: str | None = None
        self.lost: anyio.Event = anyio.Event()
        self.exited: bool = False
        self.interfered: int = 0
        """How often a probe was dropped: the VM ran, and the probe has paused it."""
        self._socket = connection
        self._duplex = Duplex(connection, _MAX_UNSENT)
        self.receive_at_once: Callable[[], None] = self._duplex.take_at_once
        """Take what comes right now: a stop often follows at once when the VM goes on."""
        self._packets = PacketReader()
        self._due: deque[OnReply] = deque()
        self._replies = 0
        self._runs = False
        self._stops: dict[bytes, Stop | Exit] = {}
        self._acknowledges = True
        self._asked_why = False

    def close(self) -> None:
        """Close the connection. No task may read or wait any more."""
        self.lose("this client closed the connection")
        self._socket.close()

    def _check_lost(self) -> None:
        if self.why_lost is not None:
            raise ClientLostError(self.why_lost)

    def lose(self, why: str) -> None:
        """Give the connection up; wakes every pending caller with `ClientLostError`."""
        if self.why_lost is not None:
            return
        self.why_lost = why
        self._duplex.unsent.clear()
        self._duplex.end()
        self.lost.set()
        # An empty reply would be "unknown": those who wait look at `why_lost` first.
        while self._due:
            self._due.popleft()(b"")

    # --- what comes ----------------------------------------------------------------

    async def read(self) -> None:
        """Take what the stub sends until it is lost. Never raises, unless cancelled."""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._receive_all)
            await self.lost.wait()
            tasks.cancel_scope.cancel()

    async def _receive_all(self) -> None:
        with suppress(OSError, anyio.ClosedResourceError):
            await self._duplex.receive_each(self._receive)
        self.lose(CLOSED)

    def _receive(self) -> bool:
        # Raises nothing: why the stub is lost has to be known before the next command is sent.
        try:
            self._receive_pieces()
        except anyio.EndOfStream:
            within = self._packets.is_within_a_packet
            self.lose("it closed the connection in the middle of a packet" if within else CLOSED)
        except (OSError, anyio.ClosedResourceError):
            self.lose(CLOSED)
        except ClientLostError as error:
            self.lose(str(error))
        except PacketError as error:
            self.lose(f"it broke the protocol: {error}")
        return self.why_lost is None

    def _receive_pieces(self) -> None:
        # QEMU writes a reply in two pieces, and the next one often follows at once: to look
        # again is cheaper than to wait. It looks only so often, for others to have their turn.
        tries = _TRIES
        for _ in range(_MAX_PIECES):
            data = self._duplex.receive_now(1 << 16)
            if data is None:
                if not tries or not (self._due or self._runs):
                    break
                tries -= 1
                sched_yield()
                continue
            self._packets.feed(data)
            self._take_packets()

    def _take_packets(self) -> None:
        while (packet := self._packets.next()) is not None:
            if isinstance(packet, bytes):
                if not isinstance(packet, Notification):
                    self._take(packet)
            elif packet is Mark.NACK:
                raise PacketError("it asks for a packet again")

    def _take(self, packet: bytes) -> None:
        if self._acknowledges:
            self.send(b"+")
        # The reply to `?` looks like a stop, and is none.
        if commands.is_stop(packet) and not (self._asked_why and self._due):
            self._runs = False
            stop = self._stops.get(packet) or self._parse_stop(packet)
            self.exited = self.exited or isinstance(stop, Exit)
            self.on_stop(stop)
            return
        if self._due and self._due[0] is _on_probed:
            self._due.popleft()
            if commands.is_probed(packet):
                self._replies += 1
                return
            # The stub has dropped the probe: this is the reply to the command behind it.
            self.interfered += 1
        if not self._due:
            raise PacketError(f"an unsolicited reply: {packet[:40]!r}")
        self._replies += 1
        self._due.popleft()(packet)

    def _parse_stop(self, packet: bytes) -> Stop | Exit:
        stop = commands.parse_stop(packet)
        if len(self._stops) < _MAX_STOPS:
            self._stops[packet] = stop
        return stop

    async def watch(self) -> None:
        """Lose a stub that has gone silent. Until it is lost, or cancelled."""
        while self.why_lost is None:
            owes, before = len(self._due), self._replies
            await wait_listening(self.lost, self.patience)
            if owes and self._replies == before:
                self.lose(f"it has not replied for {self.patience:g} s")

    @property
    def owes(self) -> int:
        """Replies that have not come yet."""
        return len(self._due)

    def drop(self, count: int) -> None:
        """The next replies do not come: the stub has dropped their commands."""
        for _ in range(min(count, len(self._due))):
            self._due.popleft()

    # --- what goes -----------------------------------------------------------------

    def send(self, data: bytes) -> None:
        """Send bytes at once, or as soon as there is room. Raises `ClientLostError`."""
        self._check_lost()
        try:
            self._duplex.send(data)
        except OSError as error:
            raise self._broken(error) from error

    async def flush(self) -> None:
        """Wait until all has been sent. Raises `ClientLostError`."""
        if not self._duplex.unsent:
            return
        try:
            await self._duplex.flush()
        except anyio.ClosedResourceError:
            self._check_lost()
        except OSError as error:
            raise self._broken(error) from error

    def _broken(self, error: OSError) -> ClientLostError:
        # What it said before is still to be read.
        self._duplex.unsent.clear()
        return ClientLostError(error.strerror or CLOSED)

    def post(
        self,
        packets: bytes,
        due: int,
        on_reply: OnReply,
        *,
        runs: bool = False,
        probe: bool = False,
    ) -> None:
        """Send encoded packets in one write, `due` of which have a reply.

        `on_reply` gets each of them in the task that reads, or an empty one when the connection
        is lost. `runs` says that the last packet lets the VM go on; `probe` is that of `ask_all`.
        Raises `ClientLostError`.
        """
        self._check_lost()
        if probe:
            self._due.append(_on_probed)
            packets = _PROBE + packets
        for _ in range(due):
            self._due.append(on_reply)
        self._runs = runs
        self.send(packets)

    async def ask(self, command: bytes) -> bytes:
        """The reply to one command. Raises `ClientLostError`."""
        return (await self.ask_all((command,)))[0]

    async def ask_all(
        self, packets: Sequence[bytes], head: bytes = b"", *, probe: bool = False, tail: bytes = b""
    ) -> list[bytes]:
        """The replies to some commands, which go out in one write between `head` and `tail`.

        With `probe` they are done even if another client has let the VM go on: it is paused then,
        and `interfered` counts it. If cancelled, replies are dropped as they come. Raises
        `ClientLostError`.
        """
        self._check_lost()
        replies = _Replies(len(packets))
        if probe:
            self._due.append(_on_probed)
            head += _PROBE
        self._due.extend([replies.take] * len(packets))
        self._runs = bool(tail)
        self.send(head + b"".join(map(encode, packets)) + tail)
        await self.flush()
        await replies.arrived.wait()
        if b"" in replies.data:
            # "Unknown", or what `lose` has put there.
            self._check_lost()
        return replies.data

    async def read_registers(self) -> bytes:
        """Those of the vCPU that was stopped, behind a probe. Raises `ClientLostError`.

        A stub that has none of them, or too few, is lost.
        """
        (reply,) = await self.ask_all((commands.READ_REGISTERS,), probe=True)
        try:
            data = commands.parse_hex(commands.check(reply))
            self.layout.read(data)
        except (StubError, ReplyError) as error:
            self.lose(f"it broke the protocol: no registers: {error}")
            raise ClientLostError(self.why_lost) from error
        return data

    # --- what a stub can do --------------------------------------------------------

    async def shake_hands(self) -> None:
        """Agree on what both can do, and learn where the registers are.

        QEMU's stub takes its breakpoints away. Raises `ClientLostError`, and `BackendError`
        for a stub that cannot be served.
        """
        try:
            self.features = commands.parse_features(await self.ask(commands.SUPPORTED))
            if self.features.get("QStartNoAckMode") == "+":
                commands.check_ok(await self.ask(commands.NO_ACKS))
            self._acknowledges = False
            self.chunk = (commands.packet_size(self.features) - 32) // 2
            # GDB's own stub describes the registers of the thread that is selected.
            await self.ask(commands.select("p0.0"))
            if self.features.get("qXfer:features:read") == "+":
                self.layout = await read_layout(self.ask, self.chunk)
            self._asked_why = True
            commands.parse_stop(await self.ask(commands.WHY_STOPPED))
            self._asked_why = False
        except (StubError, ReplyError) as error:
            raise BackendError(f"the stub: {error}") from error

    async def threads(self) -> list[str]:
        """The threads; of QEMU, its vCPUs. Raises `ClientLostError`, `ReplyError`, `StubError`."""
        found = part = commands.parse_threads(await self.ask(commands.FIRST_THREADS))
        while part and len(found) <= 4096:
            part = commands.parse_threads(await self.ask(commands.MORE_THREADS))
            found = found + part
        return found

    async def monitor(self, command: str, last: bytes = b"") -> str:
        """What QEMU's monitor says to a command; `last` goes out in one write behind it.

        Raises as `threads` does.
        """
        text: list[str] = []
        done = anyio.Event()
        errors: list[StubError | ReplyError] = []

        def take(reply: bytes) -> None:
            try:
                part = commands.parse_output(reply)
            except (StubError, ReplyError) as error:
                errors.append(error)
                done.set()
                return
            if part is None or sum(map(len, text)) > _MAX_TEXT:
                done.set()
            else:
                text.append(part)
                # One command, any number of replies: the next one is due before all others.
                self._due.appendleft(take)

        self._check_lost()
        self._due += (_on_probed, take)
        packets = _PROBE + encode(commands.monitor(command))
        if last:
            self._due.append(lambda _reply: None)
            packets += encode(last)
        self.send(packets)
        await done.wait()
        self._check_lost()
        if errors:
            raise errors[0]
        return "".join(text)

    async def read_memory(self, address: int, size: int, first: Sequence[bytes] = ()) -> bytes:
        """`size` bytes, in pipelined pieces; the commands `first` go ahead of them.

        Raises as `threads` does; `StubError` where there is no memory.
        """
        chunk = self.chunk
        pieces = [(at, min(chunk, size - at)) for at in range(0, size, chunk)]
        packets = [commands.read_memory(address + at, count) for at, count in pieces]
        replies = await self._pipeline(packets, first)
        parts = zip(replies, pieces, strict=True)
        return b"".join(commands.parse_memory(reply, count) for reply, (_, count) in parts)

    async def write_memory(self, address: int, data: bytes, first: Sequence[bytes] = ()) -> None:
        """The same, the other way."""
        chunk = self.chunk
        packets = [
            commands.write_memory(address + at, data[at : at + chunk])
            for at in range(0, len(data), chunk)
        ]
        for reply in await self._pipeline(packets, first):
            commands.check_ok(reply)

    async def _pipeline(self, packets: list[bytes], first: Sequence[bytes]) -> list[bytes]:
        replies: list[bytes] = []
        for at in range(0, len(packets), _IN_FLIGHT):
            ahead = first if at == 0 else ()
            found = await self.ask_all([*ahead, *packets[at : at + _IN_FLIGHT]], probe=True)
            for reply in found[: len(ahead)]:
                commands.check_ok(reply)
            replies += found[len(ahead) :]
        return replies


@asynccontextmanager
async def reading(client: GdbClient) -> AsyncIterator[None]:
    """The client's tasks run in the block. What it raises is raised as it was."""
    failed: Exception | None = None
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(client.read)
        tasks.start_soon(client.watch)
        try:
            yield
        except Exception as error:
            failed = error
        tasks.cancel_scope.cancel()
    if failed is not None:
        raise failed

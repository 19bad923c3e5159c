"""QMP, QEMU's monitor protocol: JSON lines, a greeting first (QEMU, docs/interop/qmp-spec).

`QmpLines` is the protocol over bytes; `Qmp` is a connection, on either loop.

    async with Qmp(await sockets.connect(socket.AF_UNIX, path)) as qmp:
        await qmp.execute("stop")
        status = await qmp.execute("query-status", kind=Status)

- A command is answered in its turn, and QEMU says who it answers: `id`.
- Events come at any time. Who wants them says so before; others are dropped.
- What QEMU sends is checked: a line has a limit, and an error is a `QmpError`.
"""

import itertools
import logging
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Self, TypeVar, overload

import anyio
import msgspec
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from vmibridge.aio import sockets
from vmibridge.aio.cancellation import UnwrappedExit
from vmibridge.aio.listening import fail_after_listening
from vmibridge.errors import QmpError
from vmibridge.text import fault_of

log: logging.Logger = logging.getLogger(__name__)

T = TypeVar("T")
Json = bool | int | float | str | list["Json"] | dict[str, "Json"] | None

_MAX_LINE = 8 << 20
"""Bytes. The largest replies, such as `query-qmp-schema`, have a few hundred KiB."""
_PIECE = 1 << 16
_EVENTS = 256
_TIMEOUT = 10.0


class QmpEvent(msgspec.Struct, frozen=True):
    """Something that happened: its name, such as `SHUTDOWN`, and what belongs to it."""

    event: str
    data: msgspec.Raw = msgspec.Raw(b"{}")
    """JSON, as it came."""


class QmpReply(msgspec.Struct, frozen=True):
    """What a command gave: one of the two."""

    id: int
    result: msgspec.Raw | None = None
    error: str | None = None


class _Failure(msgspec.Struct):
    desc: str


class _Version(msgspec.Struct):
    major: int
    minor: int
    micro: int


class _Package(msgspec.Struct):
    qemu: _Version


class _Greeting(msgspec.Struct):
    version: _Package


class _Line(msgspec.Struct):
    QMP: _Greeting | None = None
    event: str | None = None
    data: msgspec.Raw = msgspec.Raw(b"{}")
    id: int | None = None
    result: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw, name="return")
    error: _Failure | None = None


class QmpLines:
    """Both directions over bytes; no I/O. Raises `QmpError` for what is no QMP."""

    def __init__(self) -> None:
        self.version: tuple[int, int, int] | None = None
        """Of QEMU, once it has greeted."""
        self._buffer = bytearray()
        self._searched = 0
        self._decode = msgspec.json.Decoder(_Line).decode

    def feed(self, data: bytes) -> list[QmpEvent | QmpReply]:
        """What `data` completes."""
        self._buffer += data
        complete = []
        while (end := self._buffer.find(b"\n", self._searched)) >= 0:
            line = bytes(self._buffer[:end])
            del self._buffer[: end + 1]
            self._searched = 0
            if (message := self._message(line)) is not None:
                complete.append(message)
        self._searched = len(self._buffer)
        if self._searched > _MAX_LINE:
            raise QmpError(f"QEMU sent a line of more than {_MAX_LINE} bytes")
        return complete

    def _message(self, text: bytes) -> QmpEvent | QmpReply | None:
        try:
            line = self._decode(text)
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
            raise QmpError(f"QEMU sent invalid QMP: {fault_of(error)}") from None
        if line.event is not None:
            return QmpEvent(line.event, line.data.copy())
        if line.QMP is not None:
            version = line.QMP.version.qemu
            self.version = (version.major, version.minor, version.micro)
            return None
        if line.error is not None:
            # Without an id it is about a line that QEMU could not read.
            return QmpReply(-1 if line.id is None else line.id, error=line.error.desc)
        if line.id is None or not bytes(line.result):
            raise QmpError("QEMU sent neither a reply, nor an event, nor a greeting")
        return QmpReply(line.id, line.result.copy())

    @staticmethod
    def command(number: int, name: str, arguments: Mapping[str, Json]) -> bytes:
        """A command, as a line."""
        message = {"execute": name, "arguments": arguments, "id": number}
        return msgspec.json.encode(message) + b"\n"


class Qmp(UnwrappedExit):
    """One connection to a monitor, used in `async with`, which also does the greeting.

    Entering raises `QmpError` when there is no QMP at the other end, or nothing for 10 seconds.
    """

    def __init__(self, connected: socket.socket) -> None:
        """A socket that does not block; it is closed at the end."""
        self._socket = connected
        self._lines = QmpLines()
        self._numbers = itertools.count(1)
        self._waiting: dict[int, MemoryObjectSendStream[QmpReply]] = {}
        self._given_up: set[int] = set()
        """Commands whose caller was cancelled or timed out: their replies are dropped."""
        self._listeners: list[tuple[tuple[str, ...], MemoryObjectSendStream[QmpEvent]]] = []
        self._sending = anyio.Lock()
        self._reading = anyio.CancelScope(shield=True)
        self._why = ""
        self.gone: anyio.Event = anyio.Event()
        """Set when QEMU has closed the connection."""
        self._stack = AsyncExitStack()

    @property
    def version(self) -> tuple[int, int, int]:
        """Of QEMU: major, minor, micro."""
        assert self._lines.version is not None
        return self._lines.version

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            stack.callback(sockets.close, self._socket)
            await self._negotiate()
            tasks = await stack.enter_async_context(anyio.create_task_group())
            stack.callback(self._reading.cancel)
            tasks.start_soon(self._receive)
            self._stack = stack.pop_all()
        return self

    async def _negotiate(self) -> None:
        try:
            with fail_after_listening(_TIMEOUT):
                while self._lines.version is None:
                    self._lines.feed(await self._receive_some())
                await self._send(QmpLines.command(0, "qmp_capabilities", {}))
                while not await self._agreed():
                    pass
        except TimeoutError:
            raise QmpError(f"no QMP monitor: nothing within {_TIMEOUT:.0f} seconds") from None
        except (anyio.EndOfStream, OSError):
            raise QmpError("QEMU closed its monitor at once") from None

    async def _receive_some(self) -> bytes:
        return await sockets.receive(self._socket, _PIECE)

    async def _send(self, line: bytes) -> None:
        await sockets.send(self._socket, line)

    async def _agreed(self) -> bool:
        for message in self._lines.feed(await self._receive_some()):
            if isinstance(message, QmpReply):
                if message.error is not None:
                    raise QmpError(f"qmp_capabilities: {message.error}")
                return True
        return False

    async def _receive(self) -> None:
        try:
            # Who is cancelled may still want to say `quit`.
            with self._reading:
                while True:
                    for message in self._lines.feed(await self._receive_some()):
                        self._take(message)
        except (anyio.EndOfStream, OSError):
            self._why = "QEMU has closed its monitor"
        except QmpError as error:
            self._why = str(error)
        finally:
            self.gone.set()
            for waiting in self._waiting.values():
                waiting.close()
            for _, listener in self._listeners:
                listener.close()

    def _take(self, message: QmpEvent | QmpReply) -> None:
        if isinstance(message, QmpReply):
            self._take_reply(message)
            return
        for names, listener in self._listeners:
            if not names or message.event in names:
                try:
                    listener.send_nowait(message)
                except anyio.WouldBlock:
                    log.warning("QMP event %s is dropped: there is no consumer", message.event)
                except anyio.BrokenResourceError:
                    pass

    def _take_reply(self, reply: QmpReply) -> None:
        """Raises `QmpError` for a second one: each command has one."""
        waiting = self._waiting.pop(reply.id, None)
        if waiting is not None:
            with suppress(anyio.BrokenResourceError):  # who waited is just being cancelled
                waiting.send_nowait(reply)
        elif reply.id in self._given_up:
            self._given_up.remove(reply.id)
        elif reply.id >= 0:
            raise QmpError("QEMU sent a reply twice, or to no command")

    @overload
    async def execute(
        self, command: str, /, *, timeout: float = ..., **arguments: Json
    ) -> None: ...

    @overload
    async def execute(
        self, command: str, kind: type[T], /, *, timeout: float = ..., **arguments: Json
    ) -> T: ...

    async def execute(
        self,
        command: str,
        kind: type[T] | None = None,
        /,
        *,
        timeout: float = _TIMEOUT,
        **arguments: Json,
    ) -> T | None:
        """Run a command, and return its result as a `kind`, or nothing.

        `_` in the name of an argument stands for `-`. Raises `QmpError` with what QEMU says,
        when it does not answer for `timeout` seconds, or has closed the connection. If
        cancelled, the command was sent, and is done or not.
        """
        number = next(self._numbers)
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        send, receive = anyio.create_memory_object_stream[QmpReply](1)
        with send, receive:
            if self.gone.is_set():
                raise QmpError(f"{command}: {self._why}")
            self._waiting[number] = send
            try:
                with fail_after_listening(timeout):
                    async with self._sending:
                        await self._send(QmpLines.command(number, command, named))
                    reply = await receive.receive()
            except TimeoutError:
                raise QmpError(f"{command}: QEMU did not answer for {timeout:g} seconds") from None
            except (anyio.EndOfStream, OSError, anyio.ClosedResourceError):
                raise QmpError(f"{command}: {self._why or 'QEMU has closed its monitor'}") from None
            finally:
                if self._waiting.pop(number, None) is not None:
                    self._given_up.add(number)
        if reply.error is not None:
            raise QmpError(f"{command}: {reply.error}")
        if kind is None or reply.result is None:
            return None
        try:
            return msgspec.json.decode(reply.result, type=kind)
        except msgspec.MsgspecError as error:
            raise QmpError(f"{command}: QEMU sent another result than expected: {error}") from None

    @asynccontextmanager
    async def events(self, *names: str) -> AsyncIterator[MemoryObjectReceiveStream[QmpEvent]]:
        """The events of these names, or all, from here on. They end when QEMU hangs up.

        256 of them wait; further ones are dropped, with a warning in the log.
        """
        send, receive = anyio.create_memory_object_stream[QmpEvent](_EVENTS)
        entry = (names, send)
        self._listeners.append(entry)
        if self.gone.is_set():
            send.close()
        try:
            with receive:
                yield receive
        finally:
            send.close()
            self._listeners.remove(entry)

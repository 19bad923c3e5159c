"""The host's end of the QEMU plugin: a unix socket, and a connection for each vCPU.

    qemu-plugin:unix:/run/vmibridge.sock?mode=0o600

- It listens. Each vCPU of each QEMU that connects is a lane; the first QEMU's vCPUs have
  their own numbers, those of the next begin at 1024, and so on.
- A connection is read by one task for all of its life, so the end of a QEMU is seen while a
  handler is at its trap. Answers are sent without waiting.
- The run ends when the last vCPU has hung up: its QEMU has ended. It goes on for ever while
  none has come.
- A peer that sends what it must not loses its connection. Its vCPU goes on as it was told
  to without a host.
"""

import itertools
import logging
import socket
from collections import deque
from contextlib import suppress
from pathlib import Path

import anyio
import msgspec
from anyio.abc import ByteStream, SocketAttribute, UNIXSocketStream

from vmibridge.backend.qemu_plugin.protocol import (
    FrameReader,
    FrameType,
    Hello,
    answer,
    check_hello,
    parse_hello,
    parse_memory,
    parse_trap,
    read_memory,
    refused,
    welcome,
    write_memory,
)
from vmibridge.errors import (
    BackendError,
    BackendSpecError,
    GuestMemoryError,
    TrapQueueClosedError,
)
from vmibridge.event import RegisterWrites, TrapEvent, TrapFilter
from vmibridge.vmi import Backend, GuestEnd, TrapSink, VcpuEnd

log = logging.getLogger(__name__)

_HANDSHAKE = 5.0
"""Seconds."""
_MOST_CONNECTIONS = 4096
_VCPUS_OF_ONE = 1024
_GONE = "the VM is gone"


class QemuPluginOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The options of a `qemu-plugin:` spec."""

    mode: int = 0o600
    """Who may connect: the mode of the socket's file."""


class _Vcpu:
    """One connection."""

    def __init__(self, stream: UNIXSocketStream, lane: int) -> None:
        self.lane = lane
        self.pending: TrapEvent | None = None
        self.gone = False
        self._socket: socket.socket = stream.extra(  # noqa: S610
            SocketAttribute.raw_socket
        )
        self._reads: deque[_Reply] = deque()
        self._unsent = bytearray()
        self._sending = anyio.Lock()

    async def send(self, data: bytes) -> None:
        """Raises `BackendError` when the connection is gone.

        Cancelled, what is left of the frame goes out before the next one.
        """
        others = bool(self._unsent)
        self._unsent += data
        try:
            # There is room for an answer, unless something large is on its way.
            if not others:
                self._flush()
            if self._unsent:
                async with self._sending:
                    await self._flush_all()
        except OSError as error:
            raise BackendError(f"{_GONE}: {error.strerror}") from error
        except anyio.ClosedResourceError as error:
            raise BackendError(_GONE) from error

    async def _flush_all(self) -> None:
        while self._unsent:
            if self.gone:
                raise anyio.ClosedResourceError
            await anyio.wait_writable(self._socket)
            self._flush()

    def _flush(self) -> None:
        with suppress(BlockingIOError):
            del self._unsent[: self._socket.send(self._unsent)]

    @property
    def waits(self) -> bool:
        """Whether the vCPU stands still, as far as is known."""
        return self.pending is not None or bool(self._unsent)

    async def access(self, address: int, frame: bytes) -> bytes:
        """Send a memory access; returns the body of its reply. Raises `GuestMemoryError`."""
        if self.gone:
            raise GuestMemoryError(address, _GONE)
        reply = _Reply()
        self._reads.append(reply)
        try:
            await self.send(frame)
        except BackendError as error:
            raise GuestMemoryError(address, str(error)) from error
        await reply.arrived.wait()
        if reply.body is None:
            raise GuestMemoryError(address, _GONE)
        return reply.body

    def take_reply(self, body: bytes) -> None:
        """The reply to the oldest access has come. Raises `ValueError` when there is none."""
        if not self._reads:
            raise ValueError("a MEMORY that nobody asked for")
        reply = self._reads.popleft()
        reply.body = body
        reply.arrived.set()

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


class QemuPluginBackend(Backend):
    """QEMUs with the plugin. Raises `BackendSpecError` for options that make no sense."""

    def __init__(
        self, path: Path, options: QemuPluginOptions | None = None, vm: str = "vm"
    ) -> None:
        super().__init__(vm)
        self.path = path
        self.options = options or QemuPluginOptions()
        if not 0 <= self.options.mode <= 0o777:
            raise BackendSpecError(f"qemu-plugin:unix:{path}: mode={self.options.mode:#o}")
        self._listener: anyio.abc.SocketListener
        self._seq = itertools.count(1)
        self._pending: dict[int, _Vcpu] = {}
        self._processes: dict[int, int] = {}
        self._connected = 0
        self._ends: dict[int, VcpuEnd] = {}
        self._over = anyio.Event()
        self._stopped = False

    async def open(self) -> None:
        """Listen. Raises `BackendError` when another one does, or the path cannot be had."""
        await self._remove_stale()
        try:
            self._listener = await anyio.create_unix_listener(self.path, mode=self.options.mode)
        except OSError as error:
            raise BackendError(f"qemu-plugin:unix:{self.path}: {error.strerror}") from error

    async def close(self) -> None:
        await self._listener.aclose()
        await anyio.Path(self.path).unlink(missing_ok=True)

    async def _remove_stale(self) -> None:
        """A socket that a host left behind, which nobody listens at any more."""
        path = anyio.Path(self.path)
        if not await path.is_socket():
            if await path.exists():
                raise BackendError(f"qemu-plugin:unix:{self.path}: is there, and is no socket")
            return
        try:
            stream = await anyio.connect_unix(self.path)
        except OSError:
            await path.unlink(missing_ok=True)
            return
        await stream.aclose()
        raise BackendError(f"qemu-plugin:unix:{self.path}: another host listens there")

    async def run(self, traps: TrapFilter, sink: TrapSink) -> GuestEnd:
        """Serve whoever connects, until the last vCPU has hung up."""
        try:
            hello = welcome(traps)
        except ValueError as error:
            raise BackendError(f"qemu-plugin: {error}") from error

        async def serve(stream: ByteStream) -> None:
            async with stream:
                await self._serve(stream, hello, sink)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._listener.serve, serve)
            await self._over.wait()
            tasks.cancel_scope.cancel()
        return GuestEnd(tuple(self._ends[lane] for lane in sorted(self._ends)))

    def stop(self) -> None:
        """Hang up: the plugins run everything natively from here on, or wait, as told."""
        self._stopped = True
        self._over.set()

    async def _serve(self, stream: ByteStream, hello: bytes, sink: TrapSink) -> None:
        assert isinstance(stream, UNIXSocketStream)
        frames = FrameReader()
        vcpu: _Vcpu | None = None
        why = "QEMU has ended"
        self._connected += 1
        try:
            with anyio.fail_after(_HANDSHAKE):
                told = await self._shake_hands(stream, frames)
            if told is None:
                return
            vcpu = _Vcpu(stream, self._lane_of(told))
            self._ends.pop(vcpu.lane, None)
            await vcpu.send(hello)
            await self._take_frames(vcpu, stream, frames, sink)
        except (anyio.EndOfStream, anyio.BrokenResourceError, BackendError):
            pass
        except TimeoutError:
            log.warning("vm %s: a peer did not say who it is", self.vm)
        except ValueError as error:
            why = f"it sent what it must not: {error}"
            log.warning("vm %s: a plugin sent what it must not: %s", self.vm, error)
        finally:
            self._connected -= 1
            if vcpu is not None:
                self._lose(vcpu, why)
            # A peer that never was a vCPU may be the last to leave.
            if self._ends and not self._connected:
                self._over.set()

    async def _shake_hands(self, stream: UNIXSocketStream, frames: FrameReader) -> Hello | None:
        while (frame := frames.next()) is None:
            frames.feed(await stream.receive())
        kind, body = frame
        if kind != FrameType.HELLO:
            raise ValueError(f"frame {kind} instead of HELLO")
        told = parse_hello(body)
        why = check_hello(told)
        if self._connected > _MOST_CONNECTIONS:
            why = "too many vCPUs"
        if why is not None:
            log.warning("vm %s: %s", self.vm, why)
            await stream.send(refused(why))
            return None
        return told

    def _lane_of(self, told: Hello) -> int:
        place = self._processes.setdefault(told.process, len(self._processes))
        return place * _VCPUS_OF_ONE + told.vcpu % _VCPUS_OF_ONE

    async def _take_frames(
        self, vcpu: _Vcpu, stream: UNIXSocketStream, frames: FrameReader, sink: TrapSink
    ) -> None:
        while True:
            frame = frames.next()
            if frame is None:
                frames.feed(await stream.receive())
                continue
            kind, body = frame
            if kind == FrameType.TRAP:
                if vcpu.pending is not None:
                    raise ValueError("a TRAP before the answer to the one before")
                await self._take_trap(vcpu, body, sink)
            elif kind == FrameType.MEMORY:
                vcpu.take_reply(body)
            else:
                raise ValueError(f"frame {kind}")

    async def _take_trap(self, vcpu: _Vcpu, body: bytes, sink: TrapSink) -> None:
        event = parse_trap(body, next(self._seq), self.vm, vcpu.lane)
        vcpu.pending = event
        self._pending[event.seq] = vcpu
        try:
            try:
                sink.put_nowait(event)
            except anyio.WouldBlock:
                await sink.put(event)
        except TrapQueueClosedError:
            await self.resume(event, None)

    def _lose(self, vcpu: _Vcpu, why: str) -> None:
        vcpu.lose()
        reason = "stopped" if self._stopped else "halted"
        if vcpu.waits and not self._stopped:
            reason, why = "lost", f"{why}, with a trap that was not answered"
        self._ends[vcpu.lane] = VcpuEnd(vcpu.lane, reason, why)

    async def resume(self, event: TrapEvent, writes: RegisterWrites | None) -> None:
        """Send the answer. Raises `BackendError` when the VM is gone."""
        vcpu = self._pending.pop(event.seq)
        vcpu.pending = None
        if vcpu.gone:
            raise BackendError(_GONE)
        await vcpu.send(answer(writes))

    async def read_physical(self, event: TrapEvent, address: int, size: int) -> bytes:
        """Asks the plugin. Cancelled, its reply is dropped when it comes."""
        try:
            body = await self._vcpu_of(event, address).access(address, read_memory(address, size))
            data = parse_memory(body, size)
        except ValueError as error:
            raise GuestMemoryError(address, str(error)) from error
        if data is None:
            raise GuestMemoryError(address, "the VM has no memory there")
        return data

    async def write_physical(self, event: TrapEvent, address: int, data: bytes) -> None:
        """Asks the plugin. Cancelled, it is written none the less, or not at all."""
        try:
            body = await self._vcpu_of(event, address).access(address, write_memory(address, data))
            done = parse_memory(body, 0)
        except ValueError as error:
            raise GuestMemoryError(address, str(error)) from error
        if done is None:
            raise GuestMemoryError(address, "the VM has no memory there")

    def _vcpu_of(self, event: TrapEvent, address: int) -> _Vcpu:
        vcpu = self._pending.get(event.seq)
        if vcpu is None:
            raise GuestMemoryError(address, _GONE)
        return vcpu

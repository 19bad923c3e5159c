"""The host's end of the QEMU plugin: a unix socket, and a connection for each vCPU.

    qemu-plugin:unix:/run/vmibridge.sock?mode=0o600&stay=false

- It listens. Each vCPU of each QEMU that connects is a lane; the first QEMU's vCPUs have
  their own numbers, those of the next begin at 1024, and so on. The lanes of a QEMU that
  has gone are given to another.
- A connection is read by one task for all of its life, so the end of a QEMU is seen while a
  handler is at its trap. Answers are sent without waiting.
- The run ends when the last vCPU has closed its connection: its QEMU has ended. It goes on
  for ever while none has come; with `stay`, until it is stopped.
- Where a QEMU shares its memory, reads that the file can answer do not go through the plugin.
- A peer that sends what it must not loses its connection. Its vCPU goes on as it was configured
  to without a host.
"""

import itertools
import logging
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path

import anyio
import msgspec

from vmibridge.aio import sockets
from vmibridge.aio.listening import fail_after_listening
from vmibridge.backends.qemu.plugin.protocol import (
    MAX_HELLO,
    MAX_VCPUS,
    PROTOCOLS,
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
from vmibridge.backends.qemu.plugin.vcpu import Vcpu
from vmibridge.backends.qemu.ram import SharedRam
from vmibridge.bridge.outcome import GONE
from vmibridge.errors import (
    BackendError,
    BackendSpecError,
    GuestMemoryError,
)
from vmibridge.files import reason
from vmibridge.vm.backend import Backend, GuestEnd, TrapSink, VcpuEnd, feed, feed_held
from vmibridge.vm.read_now import read_virtual
from vmibridge.vm.trap import RegisterWrites, TrapEvent, TrapFilter

log: logging.Logger = logging.getLogger(__name__)

# Asking an Enum for a member takes as long as a call before Python 3.12, and to compare with one
# is slower than with an int.
_TRAP, _MEMORY = int(FrameType.TRAP), int(FrameType.MEMORY)
_HANDSHAKE = 5.0
"""Seconds."""
_MAX_CONNECTIONS = 4096


class QemuPluginOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The options of a `qemu-plugin:` spec."""

    mode: int = 0o600
    """Who may connect: the mode of the socket's file."""
    stay: bool = False
    """Whether the run goes on when the last QEMU has gone."""


class _Qemu:
    """One QEMU: its vCPUs' lanes begin at 1024 times its place."""

    def __init__(self, place: int) -> None:
        self.place = place
        self.connections = 0


class _RefusedError(Exception):
    """A plugin was refused, with the reason."""


class QemuPluginBackend(Backend):
    """QEMUs with the plugin. Raises `BackendSpecError` if an option is out of range."""

    def __init__(
        self, path: Path, options: QemuPluginOptions | None = None, vm: str = "vm"
    ) -> None:
        super().__init__(vm)
        self.path = path
        self.options: QemuPluginOptions = options or QemuPluginOptions()
        if not 0 <= self.options.mode <= 0o777:
            raise BackendSpecError(
                f"qemu-plugin:unix:{path}: mode={self.options.mode:#o} is not the mode of a file"
            )
        self._listener: sockets.UnixListener
        self._seq = itertools.count(1)
        self._pending: dict[int, Vcpu] = {}
        self._qemus: dict[int, _Qemu] = {}
        self._connected = 0
        self._ends: dict[int, VcpuEnd] = {}
        self._over = anyio.Event()
        self._stopped = False

    async def open(self) -> None:
        """Listen. Raises `BackendError` when another one does, or the path cannot be had."""
        try:
            self._listener = await sockets.listen_unix(self.path, self.options.mode)
        except (OSError, BackendError) as error:
            why = reason(error, self.path) if isinstance(error, OSError) else error
            raise BackendError(f"qemu-plugin:unix:{self.path}: {why}") from error
        log.info("vm %s: listening at unix:%s", self.vm, self.path)

    async def close(self) -> None:
        self._listener.close()

    async def run(self, traps: TrapFilter, sink: TrapSink) -> GuestEnd:
        """Serve each plugin that connects, until the last vCPU has closed its connection."""
        try:
            greetings = {each: welcome(traps, each) for each in PROTOCOLS}
        except ValueError as error:
            raise BackendError(f"qemu-plugin: {error}") from error

        async with anyio.create_task_group() as tasks:

            def take(connected: socket.socket) -> None:
                tasks.start_soon(self._serve, connected, greetings, sink)

            tasks.start_soon(sockets.accept, self._listener.socket, take)
            await self._over.wait()
            tasks.cancel_scope.cancel()
        return GuestEnd(tuple(self._ends[lane] for lane in sorted(self._ends)))

    def stop(self) -> None:
        """Hang up: the plugins run everything natively from here on, or wait, as configured."""
        self._stopped = True
        self._over.set()

    async def _serve(
        self, connected: socket.socket, greetings: Mapping[int, bytes], sink: TrapSink
    ) -> None:
        frames = FrameReader()
        vcpu: Vcpu | None = None
        why = "QEMU has ended"
        self._connected += 1
        try:
            with fail_after_listening(_HANDSHAKE):
                hello, ram = await self._shake_hands(connected, frames)
            with ram or nullcontext(), self._place_of(hello) as place:
                vcpu = Vcpu(connected, frames, place * MAX_VCPUS + hello.vcpu, ram)
                self._ends.pop(vcpu.lane, None)
                await vcpu.send(greetings[hello.protocol])
                await self._take_frames(vcpu, sink)
        except TimeoutError:
            log.warning("vm %s: a peer sent no HELLO in time", self.vm)
        except (anyio.EndOfStream, OSError, BackendError):
            pass
        except _RefusedError as error:
            log.warning("vm %s: %s", self.vm, error)
        except ValueError as error:
            why = f"it broke the protocol: {error}"
            log.warning("vm %s: a plugin broke the protocol: %s", self.vm, error)
        finally:
            self._connected -= 1
            if vcpu is not None:
                self._lose(vcpu, why, sink)
            sockets.close(connected)
            # A peer that never was a vCPU may be the last to leave.
            if self._ends and not self._connected and not self.options.stay:
                self._over.set()

    async def _shake_hands(
        self, connected: socket.socket, frames: FrameReader
    ) -> tuple[Hello, SharedRam | None]:
        with ExitStack() as stack:
            # Only with its first bytes: a file descriptor that comes later is dropped.
            data, passed = await sockets.receive_fds(connected, MAX_HELLO, 1)
            ram = None
            if passed:
                ram = stack.enter_context(SharedRam(passed[0]))
            frames.feed(data)
            while (frame := frames.next()) is None:
                frames.feed(await sockets.receive(connected, MAX_HELLO))
            kind, body = frame
            if kind != FrameType.HELLO:
                raise ValueError(f"frame {kind} instead of HELLO")
            hello = parse_hello(body)
            why = check_hello(hello)
            if self._connected > _MAX_CONNECTIONS:
                why = "too many vCPUs"
            if why is not None:
                connected.send(refused(why))
                raise _RefusedError(why)
            stack.pop_all()
            return hello, ram

    @contextmanager
    def _place_of(self, hello: Hello) -> Iterator[int]:
        """The number of a QEMU, which is its own while it has a connection."""
        qemu = self._qemus.get(hello.process)
        if qemu is None:
            taken = {other.place for other in self._qemus.values()}
            qemu = _Qemu(next(place for place in itertools.count() if place not in taken))
            self._qemus[hello.process] = qemu
        qemu.connections += 1
        try:
            yield qemu.place
        finally:
            qemu.connections -= 1
            if not qemu.connections:
                del self._qemus[hello.process]

    async def _take_frames(self, vcpu: Vcpu, sink: TrapSink) -> None:
        """Take what one vCPU sends, until it hangs up."""

        def take(kind: int, body: bytes) -> None:
            if kind == _MEMORY:
                vcpu.take_reply(body)
                return
            if kind != _TRAP:
                raise ValueError(f"frame {kind}")
            if vcpu.pending is not None:
                raise ValueError("a TRAP before the answer to the one before")
            event = parse_trap(body, next(self._seq), self.vm, vcpu.lane)
            vcpu.pending, self._pending[event.seq] = event, vcpu
            feed(sink, event, hold, self.give_back)

        def hold(event: TrapEvent) -> None:
            self.tasks.start_soon(feed_held, sink, event, self._give_back_if_pending)

        await vcpu.receive(take)

    def _give_back_if_pending(self, event: TrapEvent) -> None:
        # Its vCPU may have closed its connection while the trap was held.
        if event.seq in self._pending:
            self.give_back(event)

    def _lose(self, vcpu: Vcpu, why: str, sink: TrapSink) -> None:
        vcpu.lose()
        reason = "stopped" if self._stopped or vcpu.is_let_go else "halted"
        if vcpu.waits and not self._stopped:
            reason, why = "lost", f"{why}, with a trap that was not answered"
        if vcpu.pending is not None:
            sink.abandon(vcpu.pending)
        self._ends[vcpu.lane] = VcpuEnd(vcpu.lane, reason, why)

    def give_back(self, event: TrapEvent) -> bool:
        """Hang up: the plugin does without a host, if so configured, or waits for the next one."""
        vcpu = self._pending.pop(event.seq)
        vcpu.pending = None
        vcpu.let_go()
        return True

    async def resume(self, event: TrapEvent, writes: RegisterWrites | None) -> None:
        """Send the answer. Raises `BackendError` when the VM is gone."""
        vcpu = self._pending.pop(event.seq)
        vcpu.pending = None
        if vcpu.gone:
            raise BackendError(GONE)
        await vcpu.send(answer(writes))
        if self._pending:
            vcpu.receive_at_once()
        else:
            # No other vCPU waits for the loop.
            vcpu.look()

    async def read_physical(self, event: TrapEvent, address: int, size: int) -> bytes:
        """Asks the plugin, or the file. If cancelled, the plugin's reply is dropped later."""
        vcpu = self._vcpu_of(event, address)
        if vcpu.ram is not None and (known := vcpu.ram.read(address, size)) is not None:
            return known
        body = await vcpu.access(address, read_memory(address, size), size)
        return _known(address, size, body)

    def read_now(self, event: TrapEvent, address: int, size: int) -> bytes | None:
        """From the file, page tables and all."""
        vcpu = self._pending.get(event.seq)
        if vcpu is None or vcpu.ram is None:
            return None
        return read_virtual(vcpu.ram.read, event, address, size)

    async def read_each(
        self, event: TrapEvent, places: Sequence[tuple[int, int]]
    ) -> Sequence[bytes]:
        """Asks the plugin for all that the file does not have, and waits once."""
        if not places:
            return []
        vcpu = self._vcpu_of(event, places[0][0])
        found: list[bytes | None] = [None] * len(places)
        if vcpu.ram is not None:
            found = [vcpu.ram.read(address, size) for address, size in places]
        missing = [place for place, data in zip(places, found, strict=True) if data is None]
        if missing:
            frames = [(read_memory(address, size), size) for address, size in missing]
            bodies = iter(await vcpu.access_each(missing[0][0], frames))
            asked = iter(missing)
            found = [_known(*next(asked), next(bodies)) if d is None else d for d in found]
        return [data for data in found if data is not None]

    async def write_each(self, event: TrapEvent, parts: Sequence[tuple[int, bytes]]) -> None:
        """Sends all to the plugin, and waits once. If cancelled, as much is written as was sent."""
        if not parts:
            return
        vcpu = self._vcpu_of(event, parts[0][0])
        frames = [(write_memory(address, data), 0) for address, data in parts]
        bodies = await vcpu.access_each(parts[0][0], frames)
        for (address, _), body in zip(parts, bodies, strict=True):
            _known(address, 0, body)

    async def write_physical(self, event: TrapEvent, address: int, data: bytes) -> None:
        """Asks the plugin. If cancelled, it is written none the less, or not at all."""
        vcpu = self._vcpu_of(event, address)
        _known(address, 0, await vcpu.access(address, write_memory(address, data), 0))

    def _vcpu_of(self, event: TrapEvent, address: int) -> Vcpu:
        vcpu = self._pending.get(event.seq)
        if vcpu is None:
            raise GuestMemoryError(address, GONE)
        return vcpu


def _known(address: int, size: int, body: bytes) -> bytes:
    """What the plugin's reply to an access says. Raises `GuestMemoryError`."""
    try:
        data = parse_memory(body, size)
    except ValueError as error:
        raise GuestMemoryError(address, str(error)) from error
    if data is None:
        raise GuestMemoryError(address, "the VM has no memory there")
    return data

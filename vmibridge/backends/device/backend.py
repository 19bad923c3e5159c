"""Guests of QEMU that call through a PCI device: `-device vfio-user-pci`, whose other end is here.

    vfio-user:unix:/run/vmibridge.sock?slots=64&kernel=0&hold=2ms&timeout=5s&mode=0o600&stay=false

- It listens; QEMU connects once, at its start or at `device_add`. One QEMU at a time.
- A slot is a lane. A call is a `TrapEvent` of `TrapReason.DEVICE`, whose fields are in the
  registers of a 64-bit VMCALL. There is no instruction, so `ip` and `length` are 0.
- What a slot says is the guest's word. Of the first `kernel` slots it is that of its kernel: ring
  0, and the address space that the slot names. The others are ring 3; they have the space that the
  kernel has entered for them in page 1, or else none but their slot's payload. With `kernel=0`,
  the default, no space is believed.
- The run ends when QEMU hangs up: it has ended, or the device was unplugged. It goes on while none
  has come; with `stay`, until it is stopped.

When a call's access is answered: see `connection`.
"""

import itertools
import logging
import socket
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Final, Self

import anyio
import msgspec
from anyio.abc import TaskGroup

from vmibridge.aio import sockets
from vmibridge.backends.device.connection import Connection
from vmibridge.backends.device.memory import Piece, read_piece, write_piece
from vmibridge.backends.device.next_qemu import NextQemu
from vmibridge.backends.device.pending import Pending
from vmibridge.backends.device.registers import registers_of
from vmibridge.backends.device.slots import MAX_SLOTS, SPACE_SLOT, Call, Limits
from vmibridge.backends.device.turned_away import TurnedAway
from vmibridge.bridge.outcome import GONE
from vmibridge.errors import BackendError, BackendSpecError, GuestMemoryError
from vmibridge.files import reason
from vmibridge.vm.backend import Backend, GuestEnd, TrapSink, VcpuEnd, feed, feed_held
from vmibridge.vm.read_now import read_virtual
from vmibridge.vm.spec import parse_options
from vmibridge.vm.trap import RegisterWrites, TrapEvent, TrapFilter, TrapReason

__all__ = ["DeviceBackend", "DeviceOptions"]

log: logging.Logger = logging.getLogger(__name__)

_VECTORS: Final = 4
_DEVICE = TrapReason.DEVICE
_NO_SPACE: Final = "slot {} is not the kernel's, and has no address space"


class DeviceOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The options of a `vfio-user:` spec."""

    slots: Annotated[int, msgspec.Meta(ge=1, le=MAX_SLOTS)] = 64
    """Calls that may be open at the same time."""
    kernel: Annotated[int, msgspec.Meta(ge=0, le=MAX_SLOTS)] = 0
    """Slots, from 0, that only the guest's kernel can reach."""
    hold: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.002
    """Seconds that a doorbell waits for the answer; meanwhile QEMU holds its big lock."""
    timeout: Annotated[float, msgspec.Meta(ge=0.05, le=3600)] = 5.0
    """Seconds after which QEMU gives an access up: its `x-msg-timeout`."""
    mode: int = 0o600
    """Who may connect: the mode of the socket's file."""
    stay: bool = False
    """Whether the run goes on when QEMU has gone."""


class DeviceBackend(Backend):
    """One QEMU with the device. Raises `BackendSpecError` if an option is out of range."""

    scheme: ClassVar[str] = "vfio-user"
    """What its specs begin with, before the colon."""

    def __init__(self, path: Path, options: DeviceOptions | None = None, vm: str = "vm") -> None:
        super().__init__(vm)
        self.path = path
        self.options: DeviceOptions = options or DeviceOptions()
        given, spec = self.options, f"{self.scheme}:unix:{path}"
        if not 0 <= given.mode <= 0o777:
            raise BackendSpecError(f"{spec}: mode={given.mode:#o} is not the mode of a file")
        if given.hold > given.timeout / 4:
            raise BackendSpecError(
                f"{spec}: hold={given.hold:g}s has to be well below timeout={given.timeout:g}s:"
                " at most a quarter"
            )
        if given.kernel > given.slots:
            raise BackendSpecError(f"{spec}: kernel={given.kernel} of {given.slots} slots")
        self.before_hanging_up: Callable[[], Awaitable[None]] | None = None
        """Awaited by `run` after `stop`, while QEMU is still answered: unplugs the device."""
        self.qemu_goes_on: bool = True
        """Whether QEMU outlives the run: then `stop` logs how the device works again."""
        self._listener: sockets.UnixListener
        self._seq = itertools.count(1)
        self._pending: dict[int, tuple[Connection, Pending]] = {}
        self._connection: Connection | None = None
        self._next: NextQemu
        self._ends: dict[int, VcpuEnd] = {}
        self._over = anyio.Event()
        self._is_stopped = False
        self._full: list[TrapEvent] = []
        """Traps that found no room; their guests wait."""
        self._has_full = anyio.Event()
        self._sink: TrapSink
        self._traps: TrapFilter

    @classmethod
    def from_spec(cls, where: str, options: str, vm: str) -> Self:
        """From the parts of `vfio-user:WHERE?OPTIONS`. Raises `BackendSpecError`."""
        path = cls._path_of(where)
        numbers = {"slots": "a number of slots", "kernel": "a number of slots"}
        spec = f"{cls.scheme}:{where}"
        given = parse_options(spec, options, DeviceOptions, numbers, durations=("hold", "timeout"))
        return cls(path, given, vm)

    @classmethod
    def _path_of(cls, where: str) -> Path:
        kind, _, path = where.partition(":")
        if kind != "unix" or not path:
            raise BackendSpecError(
                f"{cls.scheme}: needs the path of a socket, as in"
                f" {cls.scheme}:unix:/run/vmibridge.sock"
            )
        return Path(path)

    async def open(self) -> None:
        """Listen. Raises `BackendError` when another one does, or the path cannot be had."""
        try:
            self._listener = await sockets.listen_unix(self.path, self.options.mode)
        except (OSError, BackendError) as error:
            why = reason(error, self.path) if isinstance(error, OSError) else error
            raise BackendError(f"{self.scheme}:unix:{self.path}: {why}") from error
        log.info("vm %s: listening at unix:%s", self.vm, self.path)

    async def close(self) -> None:
        self._listener.close()

    async def run(self, traps: TrapFilter, sink: TrapSink) -> GuestEnd:
        """Serve the QEMU that connects, until it hangs up."""
        self._sink, self._traps = sink, traps
        turned_away = TurnedAway(self.vm, self.path)
        waiting = self._next = NextQemu(turned_away, lambda: self._connection)
        try:
            async with anyio.create_task_group() as tasks:

                def take(connected: socket.socket) -> None:
                    before = self._connection
                    if before is None:
                        self._begin(connected, tasks)
                    elif self.options.stay:
                        waiting.take(connected, before, tasks)
                    else:
                        turned_away.take(connected, tasks)

                tasks.start_soon(sockets.accept, self._listener.socket, take)
                tasks.start_soon(self._feed_full)
                await self._over.wait()
                if self.before_hanging_up is not None and self._connection is not None:
                    # What still calls gets no answer: the engine takes no more.
                    await self.before_hanging_up()
                tasks.cancel_scope.cancel()
        finally:
            waiting.close()
        return GuestEnd(tuple(self._ends[lane] for lane in sorted(self._ends)))

    def stop(self) -> None:
        """Answer what is open as if nobody were there, and hang up: the device is dead then."""
        self._is_stopped = True
        if self._connection is not None and self.before_hanging_up is None:
            if self._connection.is_qemu and self.qemu_goes_on:
                log.info(
                    "vm %s: hangs up. QEMU does not connect again: unplug and plug the device, or"
                    " start QEMU again",
                    self.vm,
                )
            self._connection.end()
        self._over.set()

    def _connect(self, connected: socket.socket) -> Connection:
        given = self.options
        limits = Limits(
            hold_us=round(given.hold * 1e6),
            timeout_ms=round(given.timeout * 1e3),
            vectors=_VECTORS,
            kernel_slots=given.kernel,
        )
        return Connection(connected, given.slots, limits, self._take, self._abandon)

    def _begin(self, connected: socket.socket, tasks: TaskGroup) -> None:
        try:
            self._connection = self._connect(connected)
        except OSError as error:
            log.warning("vm %s: no memory for the slots: %s", self.vm, error.strerror)
            connected.close()
            return
        tasks.start_soon(self._serve, self._connection, tasks)

    async def _serve(self, connection: Connection, tasks: TaskGroup) -> None:
        why = "QEMU has hung up"
        try:
            await connection.serve()
        except (anyio.EndOfStream, OSError):
            pass
        except ValueError as error:
            why = f"it broke the protocol: {error}"
            log.warning("vm %s: QEMU broke the protocol: %s", self.vm, error)
        finally:
            self._connection = None
            if connection.is_qemu:
                self._lose(connection, why)
        if connection.is_qemu and not self.options.stay:
            self._over.set()
        if (connected := self._next.pop()) is not None:
            self._begin(connected, tasks)

    def _lose(self, connection: Connection, why: str) -> None:
        waiting = [
            pending.event
            for where, pending in self._pending.values()
            if where is connection and pending.event is not None
        ]
        lanes = {event.vcpu for event in waiting}
        for lane in sorted(connection.used) or [0]:
            if self._is_stopped:
                end = VcpuEnd(lane, "stopped", why)
            elif lane in lanes:
                end = VcpuEnd(lane, "lost", f"{why}, with a call that was not answered")
            else:
                end = VcpuEnd(lane, "halted", why)
            self._ends[lane] = end
        for event in waiting:
            self._give_up(event)

    def _give_up(self, event: TrapEvent) -> None:
        """Nobody waits for its answer any more."""
        for at, each in enumerate(self._full):
            if each is event:
                del self._full[at], self._pending[event.seq]
                return
        self._sink.abandon(event)

    # --- calls ------------------------------------------------------------------------

    def _take(self, connection: Connection, pending: Pending) -> None:
        """A call has come."""
        call = pending.call
        if not self._traps.wants(_DEVICE, call.magic):
            self._decline(connection, pending)
            return
        event = self._event_of(connection, call)
        pending.event = event
        self._pending[event.seq] = connection, pending
        feed(self._sink, event, self._hold, self._decline_event)

    def _event_of(self, connection: Connection, call: Call) -> TrapEvent:
        kernel = self.options.kernel
        return TrapEvent(
            next(self._seq),
            _DEVICE,
            registers_of(call, connection.slots, kernel),
            self.vm,
            call.slot,
            width=call.width,
            ring=0 if call.slot < kernel else 3,
        )

    def _hold(self, event: TrapEvent) -> None:
        self._full.append(event)
        self._has_full.set()

    async def _feed_full(self) -> None:
        """A task of its own: what the thread of a connection brings is outside of any task."""
        while True:
            while self._full:
                await feed_held(self._sink, self._full.pop(0), self._decline_event)
            self._has_full = anyio.Event()
            await self._has_full.wait()

    def _decline(self, connection: Connection, pending: Pending) -> None:
        try:
            connection.answer(pending, None)
        except BackendError as error:
            log.debug("vm %s: %s", self.vm, error)

    def _decline_event(self, event: TrapEvent) -> None:
        found = self._pending.pop(event.seq, None)
        if found is not None:
            self._decline(*found)

    def _abandon(self, call: Call) -> None:
        for _, pending in list(self._pending.values()):
            if pending.call is call and pending.event is not None:
                self._give_up(pending.event)

    async def resume(self, event: TrapEvent, writes: RegisterWrites | None) -> None:
        """Write the answer into the slot. Raises `BackendError` when QEMU is gone."""
        connection, pending = self._pending.pop(event.seq)
        connection.answer(pending, None if writes is None else writes.values)
        if not self._pending:
            # No other vCPU waits for the loop.
            connection.look()

    # --- memory -----------------------------------------------------------------------

    async def read_physical(self, event: TrapEvent, address: int, size: int) -> bytes:
        """From the slot, the memory's file, or QEMU. If cancelled, QEMU's reply is dropped."""
        connection, pending = self._of(event, address)
        if self._is_payload(event, pending.call, address):
            return self._payload(connection, event, pending.call, address, size)
        with connection.lock:
            known = None if connection.is_over else connection.ranges.read(address, size)
        return await self._read_pieces(connection, address, size) if known is None else known

    def read_now(self, event: TrapEvent, address: int, size: int) -> bytes | None:
        """From the memory's file, page tables and all: that takes no longer than to copy it."""
        found = self._pending.get(event.seq)
        if found is None:
            return None
        connection, pending = found
        if pending.call.space == SPACE_SLOT or not self._has_addresses(event, pending.call):
            return None
        with connection.lock:
            if connection.is_over:
                return None
            return read_virtual(connection.ranges.read, event, address, size)

    async def _read_pieces(self, connection: Connection, address: int, size: int) -> bytes:
        parts: list[bytes] = []
        end = address + size
        while address < end:
            # Anew each time: ranges come and go while QEMU is asked.
            with connection.lock:
                _check(connection, address)
                piece = next(connection.ranges.pieces(address, end - address))
                data = read_piece(piece) if piece.is_known else None
            if data is None:
                data = await self._ask(connection, piece)
            parts.append(data)
            address += len(data)
        return b"".join(parts)

    async def _ask(self, connection: Connection, piece: Piece) -> bytes:
        address, size = piece.address, min(piece.size, connection.max_transfer)
        data = await connection.transfer(address, size)
        if data is None:
            raise GuestMemoryError(address, "QEMU cannot read the VM's memory there")
        if piece.descriptor is not None:
            with connection.lock:
                _check(connection, address)
                now = next(connection.ranges.pieces(address, size))
                if now.size == size and connection.ranges.compare(now, data):
                    log.warning(
                        "vm %s: guest memory is not shared, so each access goes through QEMU: use"
                        " memory-backend-memfd,share=on",
                        self.vm,
                    )
        return data

    async def write_physical(self, event: TrapEvent, address: int, data: bytes) -> None:
        """Into the slot, the memory's file, or by QEMU. If cancelled, it may be written."""
        connection, pending = self._of(event, address)
        if self._is_payload(event, pending.call, address):
            with connection.lock:
                _check(connection, address)
                try:
                    connection.slots.write_payload(pending.call.slot, address, data)
                except ValueError as error:
                    raise self._outside(event, pending.call, address, error) from error
            return
        with connection.lock:
            _check(connection, address)
            # All of it can be written before a part is.
            for _ in connection.ranges.pieces(address, len(data), write=True):
                pass
        at = 0
        while at < len(data):
            at += await self._write_piece(connection, address + at, data[at:])

    async def _write_piece(self, connection: Connection, address: int, data: bytes) -> int:
        with connection.lock:
            _check(connection, address)
            piece = next(connection.ranges.pieces(address, len(data), write=True))
            part = data[: piece.size]
            if piece.is_known and write_piece(piece, part):
                return len(part)
        part = part[: connection.max_transfer]
        if await connection.transfer(address, len(part), part) is None:
            raise GuestMemoryError(address, "QEMU cannot write the VM's memory there")
        return len(part)

    async def read_each(
        self, event: TrapEvent, places: Sequence[tuple[int, int]]
    ) -> Sequence[bytes]:
        """One after the other: to read the file costs less than a turn of the loop."""
        return [await self.read_physical(event, address, size) for address, size in places]

    async def write_each(self, event: TrapEvent, parts: Sequence[tuple[int, bytes]]) -> None:
        """One after the other. If cancelled, as many are written."""
        for address, data in parts:
            await self.write_physical(event, address, data)

    def _is_payload(self, event: TrapEvent, call: Call, address: int) -> bool:
        """Whether addresses are offsets in the slot. Raises `GuestMemoryError` if they are nothing:
        an address of a caller that nobody vouches for could be that of another's memory."""
        if call.space == SPACE_SLOT:
            return True
        if not self._has_addresses(event, call):
            raise GuestMemoryError(address, _NO_SPACE.format(call.slot))
        return False

    def _has_addresses(self, event: TrapEvent, call: Call) -> bool:
        return bool(event.registers.cr0) or call.slot < self.options.kernel

    def _payload(
        self, connection: Connection, event: TrapEvent, call: Call, address: int, size: int
    ) -> bytes:
        with connection.lock:
            _check(connection, address)
            try:
                return connection.slots.read_payload(call.slot, address, size)
            except ValueError as error:
                raise self._outside(event, call, address, error) from error

    def _outside(
        self, event: TrapEvent, call: Call, address: int, error: ValueError
    ) -> GuestMemoryError:
        """For offsets that are not in the slot: most are addresses of a program without a space."""
        why = f"{error}, which is all that slot {call.slot} reaches by this call"
        if not self._has_addresses(event, call):
            why = (
                f"{error}; {_NO_SPACE.format(call.slot)}, so its caller passes offsets in the slot,"
                " and no addresses: see docs/device-guests.md"
            )
        return GuestMemoryError(address, why)

    def _of(self, event: TrapEvent, address: int) -> tuple[Connection, Pending]:
        found = self._pending.get(event.seq)
        if found is None:
            raise GuestMemoryError(address, GONE)
        return found


def _check(connection: Connection, address: int) -> None:
    if connection.is_over:
        raise GuestMemoryError(address, GONE)

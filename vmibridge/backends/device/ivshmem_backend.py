"""The host's end of QEMU's device `ivshmem-doorbell`, which every QEMU of the last years has.

    ivshmem:unix:/run/vmibridge.sock?slots=64&memory=FILE&mode=0o600&stay=false

- It listens. A QEMU whose device connects gets memory of its own with the slots in it; one QEMU at
  a time. Each slot is a lane.
- A slot has a doorbell and an interrupt, which are eventfds: no vCPU and no lock of QEMU's waits
  for anything here. A guest polls its slot, or waits for the interrupt if it asked for one.
- A guest cannot see that the host has died, only that it has stopped: every open slot is answered
  by "unmatched", and the header is wiped.
- There is no guest memory, unless QEMU's is a file (`memory-backend-file,share=on`) that `memory`
  names.
- The run ends when the QEMU has; with `stay`, when it is stopped.
"""

import itertools
import logging
import mmap
import os
import select
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Self

import anyio
import msgspec

from vmibridge.aio import sockets
from vmibridge.aio.loops import while_readable
from vmibridge.backends.device import ivshmem
from vmibridge.backends.device.mailbox import Mailbox
from vmibridge.backends.device.slots import SPACE_SLOT, Call, Limits
from vmibridge.bridge.outcome import GONE
from vmibridge.errors import BackendError, BackendSpecError, GuestMemoryError
from vmibridge.files import reason
from vmibridge.vm.backend import Backend, GuestEnd, TrapSink, VcpuEnd, feed, feed_held
from vmibridge.vm.spec import parse_options
from vmibridge.vm.trap import Registers, RegisterWrites, TrapEvent, TrapFilter, TrapReason

log: logging.Logger = logging.getLogger(__name__)


class IvshmemOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The options of an `ivshmem:` spec."""

    slots: Annotated[int, msgspec.Meta(ge=1, le=256)] = 64
    """Call slots, each with a vector: the device's option `vectors` is this number."""
    memory: str | None = None
    """The file that QEMU has the guest's memory in, shared."""
    mode: Annotated[int, msgspec.Meta(ge=0, le=0o777)] = 0o600
    """Who may connect: the mode of the socket's file."""
    stay: bool = False
    """Whether the run goes on when the QEMU has gone."""


class _Device:
    """What one QEMU was given: memory with slots in it, and eventfds."""

    def __init__(self, slots: int) -> None:
        with ExitStack() as stack:
            self.mailbox = stack.enter_context(Mailbox(slots, Limits(vectors=slots)))
            self.slots = self.mailbox.slots
            mapping = stack.enter_context(mmap.mmap(self.mailbox.descriptor, self.mailbox.size))
            self.memory = stack.enter_context(memoryview(mapping))
            self.doorbells = _eventfds(slots, stack)
            self.interrupts = _eventfds(slots, stack)
            # One descriptor to wait for, whatever the number of slots. Each ring is an event of its
            # own, so that no eventfd has to be read.
            self.rings = stack.enter_context(select.epoll())
            for doorbell in self.doorbells:
                self.rings.register(doorbell, select.EPOLLIN | select.EPOLLET)
            self._slot_of = {doorbell: slot for slot, doorbell in enumerate(self.doorbells)}
            self._stack = stack.pop_all()
        self.pending: dict[int, tuple[TrapEvent, Call]] = {}
        """Traps that are not answered, by their slot."""

    def rung(self) -> list[int]:
        """The slots that were rung for, without waiting."""
        return [self._slot_of[doorbell] for doorbell, _ in self.rings.poll(0)]

    def close(self) -> None:
        """Free it: what the VM has of it stays with the VM, but says that there is no host."""
        ivshmem.has_closed(self.memory)
        self._stack.close()


def _eventfds(count: int, stack: ExitStack) -> Sequence[int]:
    """New ones, which `stack` closes. Raises `OSError`."""

    def made() -> int:
        descriptor = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        stack.callback(os.close, descriptor)
        return descriptor

    return [made() for _ in range(count)]


class IvshmemBackend(Backend):
    """One QEMU with the device, at a time."""

    def __init__(self, path: Path, options: IvshmemOptions | None = None, vm: str = "vm") -> None:
        super().__init__(vm)
        self.path = path
        self.options: IvshmemOptions = options or IvshmemOptions()
        self._seq = itertools.count(1)
        self._device: _Device | None = None
        self._over = anyio.Event()
        self._end: VcpuEnd | None = None
        self._traps: TrapFilter
        self._sink: TrapSink

    @classmethod
    def from_spec(cls, where: str, options: str, vm: str) -> Self:
        """From the parts of `ivshmem:unix:PATH?OPTIONS`. Raises `BackendSpecError`."""
        kind, _, path = where.partition(":")
        if kind != "unix" or not path:
            raise BackendSpecError(
                "ivshmem: needs the path of a socket, as in ivshmem:unix:/run/vmibridge.sock"
            )
        given = parse_options(f"ivshmem:{where}", options, IvshmemOptions, {"slots": "a number"})
        return cls(Path(path), given, vm)

    async def open(self) -> None:
        """Listen. Raises `BackendError` when another one does, or the path cannot be had."""
        try:
            self._listener = await sockets.listen_unix(self.path, self.options.mode)
        except (OSError, BackendError) as error:
            why = reason(error, self.path) if isinstance(error, OSError) else error
            raise BackendError(f"ivshmem:unix:{self.path}: {why}") from error

    async def close(self) -> None:
        self._listener.close()

    async def run(self, traps: TrapFilter, sink: TrapSink) -> GuestEnd:
        """Serve the QEMU that connects, until it ends."""
        self._traps, self._sink = traps, sink
        async with anyio.create_task_group() as tasks:

            def take(connected: socket.socket) -> None:
                if self._device is not None:
                    log.warning("vm %s: refused a second QEMU at %s", self.vm, self.path)
                    sockets.close(connected)
                    return
                try:
                    self._device = _Device(self.options.slots)
                except OSError as error:
                    log.warning("vm %s: no device for a QEMU: %s", self.vm, error.strerror)
                    sockets.close(connected)
                    return
                tasks.start_soon(self._serve, connected, self._device)

            tasks.start_soon(sockets.accept, self._listener.socket, take)
            await self._over.wait()
            tasks.cancel_scope.cancel()
        return GuestEnd(() if self._end is None else (self._end,))

    def stop(self) -> None:
        """Answer every open slot by "unmatched", wipe the header and hang up."""
        if self._device is not None:
            self._end = VcpuEnd(0, "stopped")
        self._over.set()

    async def _serve(self, connected: socket.socket, device: _Device) -> None:
        try:
            for message in ivshmem.greeting(
                device.mailbox.descriptor, device.doorbells, device.interrupts
            ):
                await _send(connected, message)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(while_readable, device.rings, self._take_rings)
                while True:
                    # It has nothing to say.
                    await sockets.receive(connected, 4096)
        except* (anyio.EndOfStream, anyio.ClosedResourceError, OSError):
            pass
        finally:
            self._device = None
            lost = [event for event, _ in device.pending.values()]
            for call in device.slots.open_calls:
                device.slots.decline(call)
            device.close()
            sockets.close(connected)
            for event in lost:
                self._sink.abandon(event)
            if not self.options.stay and not self._over.is_set():
                why = "QEMU has ended"
                if lost:
                    why += ", with a call that was not answered"
                self._end = VcpuEnd(0, "lost" if lost else "halted", why)
                self._over.set()

    def _take_rings(self) -> bool:
        device = self._device
        if device is None:
            return False
        for slot in device.rung():
            self._take_ring(device, slot)
        return True

    def _take_ring(self, device: _Device, slot: int) -> None:
        pending = device.pending.get(slot)
        if pending is not None:
            event, call = pending
            if ivshmem.cancelled_number(device.memory, slot) == call.number:
                self._sink.abandon(event)
            return
        taken = device.slots.take(slot)
        if taken is None:
            return
        is_cancelled = ivshmem.cancelled_number(device.memory, slot) == taken.number
        if is_cancelled or not self._traps.wants(TrapReason.VMCALL, taken.magic):
            device.slots.decline(taken)
            return
        event = event_of(taken, next(self._seq), self.vm)
        device.pending[slot] = event, taken
        device.slots.hold(taken)
        feed(self._sink, event, self._hold, self.give_back)

    def _hold(self, event: TrapEvent) -> None:
        self.tasks.start_soon(feed_held, self._sink, event, self._give_back_if_pending)

    def _give_back_if_pending(self, event: TrapEvent) -> None:
        # Its QEMU may have ended while the trap was held.
        if self._pending(event) is not None:
            self.give_back(event)

    def _pending(self, event: TrapEvent) -> tuple[_Device, Call] | None:
        device = self._device
        found = None if device is None else device.pending.get(event.vcpu)
        if device is None or found is None or found[0] is not event:
            return None
        return device, found[1]

    def give_back(self, event: TrapEvent) -> bool:
        """Nobody answers it: the next host has memory of its own."""
        self._answer(event, None)
        return True

    async def resume(self, event: TrapEvent, writes: RegisterWrites | None) -> None:
        """Write the answer. Raises `BackendError` when the VM is gone."""
        if not self._answer(event, writes):
            raise BackendError(GONE)

    def _answer(self, event: TrapEvent, writes: RegisterWrites | None) -> bool:
        found = self._pending(event)
        if found is None:
            return False
        device, call = found
        del device.pending[event.vcpu]
        if writes is None:
            device.slots.decline(call)
        else:
            device.slots.answer(call, writes.values)
        if call.wants_interrupt:
            os.eventfd_write(device.interrupts[call.slot], 1)
        return True

    async def read_physical(self, event: TrapEvent, address: int, size: int) -> bytes:
        """Of a call whose space is its slot, from there."""
        found = self._pending(event)
        if found is None:
            raise GuestMemoryError(address, GONE)
        device, call = found
        if call.space != SPACE_SLOT:
            raise GuestMemoryError(address, "no memory is shared")
        try:
            return device.slots.read_payload(call.slot, address, size)
        except ValueError as error:
            raise GuestMemoryError(address, str(error)) from error

    async def write_physical(self, event: TrapEvent, address: int, data: bytes) -> None:
        """The same."""
        found = self._pending(event)
        if found is None:
            raise GuestMemoryError(address, GONE)
        device, call = found
        if call.space != SPACE_SLOT:
            raise GuestMemoryError(address, "no memory is shared")
        try:
            device.slots.write_payload(call.slot, address, data)
        except ValueError as error:
            raise GuestMemoryError(address, str(error)) from error


async def _send(connected: socket.socket, message: ivshmem.Message) -> None:
    fds = [] if message.descriptor is None else [message.descriptor]
    while True:
        try:
            socket.send_fds(connected, [message.data], fds)
        except BlockingIOError:
            await anyio.wait_writable(connected)
        else:
            return


def event_of(call: Call, seq: int, vm: str) -> TrapEvent:
    value1, value2, value3, value4 = call.values
    return TrapEvent(
        seq,
        TrapReason.VMCALL,
        Registers(
            rcx=call.magic,
            rdx=call.request | call.method << 16,
            r8=value1,
            r9=value2,
            r10=value3,
            r11=value4,
        ),
        vm,
        call.slot,
        ring=3,
    )

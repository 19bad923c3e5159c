"""Test handlers without a guest, and servers without a VM.

`drive` runs one handler on one packet. `FakeBackend` feeds trap events from a list
and keeps the register writes. `FakeGuest` is a guest as a coroutine, which calls, looks
at its answer, and calls again. All run on either event loop.
"""

import itertools
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import AsyncExitStack
from typing import Any

import anyio

from vmibridge.bridge.context import BridgeContext, Source
from vmibridge.bridge.dispatch import Bridge, Target
from vmibridge.bridge.outcome import Outcome
from vmibridge.bridge.outside import Fetch, check_key, encoded, fetched
from vmibridge.bridge.packet import BridgePacket
from vmibridge.bridge.parameters import Room
from vmibridge.errors import (
    BackendError,
    GuestMemoryError,
    OutsideRefusedError,
    TrapQueueClosedError,
)
from vmibridge.vm.backend import (
    Backend,
    GuestEnd,
    SessionEvent,
    SessionEventKind,
    TrapSink,
    VcpuEnd,
)
from vmibridge.vm.memory import GuestMemory
from vmibridge.vm.trap import Registers, RegisterWrites, TrapEvent, TrapFilter, TrapReason

__all__ = ["FakeBackend", "FakeGuest", "FakeMemory", "FakeRoom", "drive"]

_PAGE = 4096


class FakeMemory:
    """Guest memory for tests: regions of bytes by address.

    As memory comes in pages, what stands beside a region in its pages of 4 KiB reads as
    zeros. It cannot be written: a handler that writes past its buffer is found out.
    """

    def __init__(self, regions: Mapping[int, bytes] | None = None) -> None:
        self.regions: dict[int, bytearray] = {
            address: bytearray(data) for address, data in (regions or {}).items()
        }

    def __getitem__(self, address: int) -> bytes:
        """The region that starts at `address`, as it is now. Raises `KeyError`."""
        return bytes(self.regions[address])

    def read(self, address: int, size: int) -> bytes:
        """`size` bytes. Raises `GuestMemoryError` where no page of a region is."""
        found = bytearray(size)
        mapped: set[int] = set()
        for start, data in self.regions.items():
            first, last = max(start, address), min(start + len(data), address + size)
            if first < last:
                found[first - address : last - address] = data[first - start : last - start]
            mapped |= _pages(start, len(data)) & _pages(address, size)
        missing = _pages(address, size) - mapped
        if missing:
            raise GuestMemoryError(max(address, min(missing) * _PAGE), "not mapped")
        return bytes(found)

    def write(self, address: int, data: bytes) -> None:
        """Put `data` into one region. Raises `GuestMemoryError` beyond it."""
        for start, region in self.regions.items():
            if start <= address and address + len(data) <= start + len(region):
                region[address - start : address - start + len(data)] = data
                return
        raise GuestMemoryError(address, "not mapped")


def _pages(address: int, size: int) -> set[int]:
    return set(range(address // _PAGE, -(-(address + size) // _PAGE)))


class FakeRoom(Room):
    """A buffer for a typed method that a test calls itself; `data` is what it has put there."""

    def __init__(self, capacity: int) -> None:
        """So many bytes, all of them zeros."""
        memory = FakeBackend(memory={0: bytes(capacity)})
        event = TrapEvent(1, TrapReason.VMCALL, Registers())
        super().__init__(GuestMemory(memory, event), 0, capacity)
        self._backend = memory

    @property
    def data(self) -> bytes:
        """All of it, as it is now."""
        return self._backend.memory[0]


class FakeBackend(Backend):
    """A VM that consists of a list of traps.

    Traps are fed in order, as fast as the queue takes them. The run ends when each
    one is answered; the answers are in `writes`. An answer that comes twice raises.
    """

    def __init__(
        self,
        events: Iterable[TrapEvent] = (),
        *,
        memory: Mapping[int, bytes] | None = None,
        vm: str = "fake",
    ) -> None:
        super().__init__(vm)
        self.events: list[TrapEvent] = list(events)
        self.memory: FakeMemory = FakeMemory(memory)
        self.writes: dict[int, RegisterWrites | None] = {}
        """The answer by sequence number; `None` for a trap that ran natively."""
        self._open: set[int] = set()
        self._answered = anyio.Event()

    async def run(self, traps: TrapFilter, sink: TrapSink) -> GuestEnd:
        """Feed the traps, then wait for the last answer."""
        for event in self.events:
            self._open.add(event.seq)
            try:
                await sink.put(event)
            except TrapQueueClosedError:
                self._open.discard(event.seq)
                break
        while self._open:
            self._answered = anyio.Event()
            await self._answered.wait()
        return GuestEnd(
            tuple(VcpuEnd(vcpu, "halted") for vcpu in sorted({e.vcpu for e in self.events}))
        )

    def stop(self) -> None:
        """Nothing to do: the run ends when each trap that was fed is answered."""

    async def resume(self, event: TrapEvent, writes: RegisterWrites | None) -> None:
        """Keep the answer. Raises `BackendError` for a trap that waits for none."""
        if event.seq not in self._open:
            raise BackendError(f"trap {event.seq} was answered before, or never fed")
        self._open.remove(event.seq)
        self.writes[event.seq] = writes
        if not self._open:
            self._answered.set()

    def change_session(self, kind: SessionEventKind, reason: str | None = None) -> None:
        """Tell taps of a change of the session, as a remote VM does: for tests of `session_event`.

        Not called before the run and after it, nor where no tap has that hook.
        """
        if self.on_session_event is not None:
            self.on_session_event(SessionEvent(self.vm, kind, "00" * 16, "test", reason))

    async def read_physical(self, event: TrapEvent, address: int, size: int) -> bytes:
        return self.memory.read(address, size)

    async def write_physical(self, event: TrapEvent, address: int, data: bytes) -> None:
        self.memory.write(address, data)


class FakeGuest(FakeBackend):
    """A VM whose guest is a coroutine function: it is given this backend, to `call` by.

        async def guest(vm):
            while (await vm.call(packet)).rax == Gate.WAIT:
                await anyio.sleep(0.01)

    The run ends when it returns; what it raises is raised by the run. A stop cancels it.
    For several vCPUs it starts tasks of its own.
    """

    def __init__(
        self,
        guest: Callable[["FakeGuest"], Awaitable[object]],
        *,
        memory: Mapping[int, bytes] | None = None,
        vm: str = "fake",
    ) -> None:
        super().__init__(memory=memory, vm=vm)
        self._guest = guest
        self._sink: TrapSink | None = None
        self._waiting: dict[int, anyio.Event] = {}
        self._running = anyio.CancelScope()
        self._seq = itertools.count(1)

    async def run(self, traps: TrapFilter, sink: TrapSink) -> GuestEnd:
        """Run the guest to its end."""
        self._sink = sink
        with self._running:
            await self._guest(self)
        reason = "stopped" if self._running.cancel_called else "halted"
        vcpus = {event.vcpu for event in self.events}
        return GuestEnd(tuple(VcpuEnd(vcpu, reason) for vcpu in sorted(vcpus)))

    def stop(self) -> None:
        """Cancel the guest."""
        self._running.cancel()

    async def call(
        self,
        packet: BridgePacket,
        *,
        vcpu: int = 0,
        address_space: int = 0,
        ring: int = 0,
        ip: int = 0x1000,
    ) -> RegisterWrites | None:
        """Send a packet by VMCALL, as 64-bit code without paging; returns the answer.

        `None` stands for a trap that ran natively. A vCPU has one trap at a time. When the
        server takes no more, the vCPU stands still until the guest is let go.
        """
        assert self._sink is not None, "the guest runs in a server"
        registers = Registers(
            rcx=packet.magic,
            rdx=packet.request | packet.method << 16,
            r8=packet.value1,
            r9=packet.value2,
            r10=packet.value3,
            r11=packet.value4,
            cr3=address_space,
        )
        seq = next(self._seq)
        event = TrapEvent(
            seq, TrapReason.VMCALL, registers, self.vm, vcpu, ip=ip, length=3, ring=ring
        )
        self.events.append(event)
        answered = self._waiting[seq] = anyio.Event()
        self._open.add(seq)
        try:
            await self._sink.put(event)
        except TrapQueueClosedError:
            self._open.discard(seq)
            self.events.remove(event)
            await anyio.sleep_forever()
        await answered.wait()
        return self.writes[seq]

    async def resume(self, event: TrapEvent, writes: RegisterWrites | None) -> None:
        """Give the guest its answer. Raises `BackendError` for a trap that waits for none."""
        await super().resume(event, writes)
        self._waiting.pop(event.seq).set()


async def drive(
    handler: Target,
    packet: BridgePacket,
    memory: Mapping[int, bytes] | FakeMemory | None = None,
    *,
    event: TrapEvent | None = None,
    outside: Mapping[str, object] | None = None,
) -> Outcome[Any]:
    """Run one handler on one packet, as a VMCALL of a 64-bit guest without paging.

    `memory` maps addresses to the bytes there; pass a `FakeMemory` to see what the
    handler wrote. `event` stands for the trap where the handler looks at it. There is
    no deadline. A handler that raises gives a *failed* outcome; the handler is entered
    before and left after.

    `outside` maps keys to what `vmi.outside` gives for them, each time, and no function is
    called; for an exception it raises the `OutsideError` of a function that raised it. Without
    `outside` functions are called. Raises `LookupError` for keys that the handler asked for and
    that are not given, whatever it made of the `OutsideRefusedError` that it got; `TypeError`
    and `ValueError` for what is no key.
    """
    given = None if outside is None else _GivenOutside(outside)
    backend = FakeBackend()
    backend.memory = memory if isinstance(memory, FakeMemory) else FakeMemory(memory)
    event = event or TrapEvent(1, TrapReason.VMCALL, Registers(), length=3)
    context = BridgeContext(event, backend, None if given is None else Source(0, 0, None, given))
    bridge = Bridge(handler)
    async with AsyncExitStack() as handlers:
        for each in dict.fromkeys(bridge.handlers):
            await handlers.enter_async_context(each)
        outcome = await bridge.dispatch(context, packet)
    if given is not None:
        given.check()
    return outcome


class _GivenOutside:
    """What `vmi.outside` gives in a test."""

    def __init__(self, values: Mapping[str, object]) -> None:
        for key in values:
            check_key(key)
        self._values = dict(values)
        self._missing: dict[str, None] = {}

    async def __call__(self, context: BridgeContext, key: str, fetch: Fetch) -> bytes:
        """The value of a key, encoded as a recording has it. Raises `OutsideError`."""
        if key not in self._values:
            self._missing[key] = None
            raise OutsideRefusedError(key)
        value = self._values[key]

        async def give() -> object:
            if isinstance(value, Exception) or (
                isinstance(value, type) and issubclass(value, Exception)
            ):
                raise value
            return value

        return encoded(key, await fetched(key, give))

    def check(self) -> None:
        """Raise `LookupError` for what was asked for and is not given."""
        if self._missing:
            asked, there = (", ".join(map(ascii, keys)) for keys in (self._missing, self._values))
            raise LookupError(
                f"drive: the handler asked vmi.outside for {asked}, and outside= gives"
                f" {there or 'nothing'}"
            )

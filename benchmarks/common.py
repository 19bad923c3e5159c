"""What the benchmarks have in common: loops, traps, a handler, and vCPUs in a closed loop."""

import os
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TypeAlias, TypeVar

import anyio

from vmibridge import (
    Bridge,
    BridgeContext,
    BridgeHandler,
    BridgePacket,
    BridgeResponse,
    Registers,
    TrapEvent,
    TrapReason,
)
from vmibridge.bridge.contract import STANDARD_MAGIC, STANDARD_VERIFY_VALUE3, STANDARD_VERIFY_VALUE4
from vmibridge.vm.backend import Backend, GuestEnd, TrapSink
from vmibridge.vm.trap import RegisterWrites, TrapFilter

Loop: TypeAlias = tuple[str, dict[str, object]]
R = TypeVar("R")

LOOPS: dict[str, Loop] = {
    "asyncio": ("asyncio", {}),
    "uvloop": ("asyncio", {"use_uvloop": True}),
    "trio": ("trio", {}),
}
REQUEST = 0x0100
ADDRESS_SPACE = 0x7000
IP = 0x1000
QUEUE = 256


class Add(BridgeHandler[int]):
    """Adds one, without waiting for anything."""

    MAGIC = STANDARD_MAGIC
    REQUEST = REQUEST
    VERIFY_VALUE3 = STANDARD_VERIFY_VALUE3
    VERIFY_VALUE4 = STANDARD_VERIFY_VALUE4
    may_wait = True

    async def handle(self, vmi: BridgeContext, packet: BridgePacket) -> BridgeResponse[int]:
        return BridgeResponse(value1=packet.value1 + 1)


class Sleep(Add):
    """Adds one after a while."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    async def handle(self, vmi: BridgeContext, packet: BridgePacket) -> BridgeResponse[int]:
        await anyio.sleep(self.seconds)
        return BridgeResponse(value1=packet.value1 + 1)


def make_bridge(handlers: int) -> Bridge:
    """A bridge of so many handlers that add one, with consecutive requests."""
    return Bridge(*[type("Add", (Add,), {"REQUEST": REQUEST + n})() for n in range(handlers)])


def make_events(count: int, vcpus: int, request: int = REQUEST) -> list[TrapEvent]:
    """Traps numbered from 1, of the vCPUs in turn."""
    return [
        TrapEvent(
            seq,
            TrapReason.VMCALL,
            Registers(rcx=STANDARD_MAGIC, rdx=request, r8=seq, cr3=ADDRESS_SPACE),
            vcpu=(seq - 1) % vcpus,
            ip=IP,
            length=3,
        )
        for seq in range(1, count + 1)
    ]


class ClosedLoop(Backend):
    """vCPUs that each send their next trap as soon as the one before is answered.

    There is no task per vCPU: the next trap comes from the call that answers. Those that
    find the queue full wait in line, in a task of this backend.
    """

    def __init__(self, events: list[TrapEvent], vcpus: int) -> None:
        super().__init__("closed-loop")
        self.events = events
        self.vcpus = vcpus
        self.answered = 0
        self.times: dict[int, tuple[float, float]] = {}
        """Filled in for these numbers of answers: the time then, and the processor's."""
        self._sink: TrapSink | None = None
        self._in_line: deque[TrapEvent] = deque()
        self._arrived = anyio.Event()

    async def run(self, traps: TrapFilter, sink: TrapSink) -> GuestEnd:
        self._sink = sink
        self._in_line += self.events[: self.vcpus]
        while self.answered < len(self.events):
            while self._in_line:
                # It keeps its place until it is taken: no other process passes it by.
                await sink.put(self._in_line[0])
                self._in_line.popleft()
            self._arrived = anyio.Event()
            await self._arrived.wait()
        return GuestEnd()

    def stop(self) -> None:
        pass

    async def resume(self, event: TrapEvent, writes: RegisterWrites | None) -> None:
        self.answered += 1
        if self.answered in self.times:
            self.times[self.answered] = time.perf_counter(), time.process_time()
        following = event.seq - 1 + self.vcpus
        if following < len(self.events):
            self._send(self.events[following])
        elif self.answered == len(self.events):
            self._arrived.set()

    def _send(self, event: TrapEvent) -> None:
        try:
            if not self._in_line:
                self._sink.put_nowait(event)
                return
        except anyio.WouldBlock:
            pass
        self._in_line.append(event)
        self._arrived.set()

    async def read_physical(self, event: TrapEvent, address: int, size: int) -> bytes:
        raise NotImplementedError

    async def write_physical(self, event: TrapEvent, address: int, data: bytes) -> None:
        raise NotImplementedError


def pin() -> None:
    """Keep this process on one core."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def run(loop: Loop, side: Callable[..., Awaitable[R]], *arguments: object) -> R:
    """Run one side on one loop."""
    return anyio.run(side, *arguments, backend=loop[0], backend_options=loop[1])


def seconds(loop: Loop, side: Callable[..., Awaitable[object]], *arguments: object) -> float:
    """How long that takes, without the start of the loop."""

    async def timed() -> float:
        start = time.perf_counter()
        await side(*arguments)
        return time.perf_counter() - start

    return run(loop, timed)


def cpu_seconds(loop: Loop, side: Callable[..., Awaitable[object]], *arguments: object) -> float:
    """What that takes of the processor, in all threads, without the start of the loop."""

    async def timed() -> float:
        start = time.process_time()
        await side(*arguments)
        return time.process_time() - start

    return run(loop, timed)

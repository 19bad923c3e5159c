"""What the benchmarks have in common: loops, traps, handlers, and vCPUs in a closed loop; options,
images and figures of guests in QEMU."""

import argparse
import json
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import NamedTuple, TypeAlias, TypeVar

import anyio

from vmibridge import (
    Bridge,
    BridgeContext,
    BridgeHandler,
    BridgePacket,
    BridgeResponse,
    BridgeServer,
    OutcomeKind,
    Registers,
    TrapEvent,
    TrapReason,
    open_backend,
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

ROOT = Path(__file__).parents[1]
GUESTS = ROOT / "tests/integration/guests"
ALL_RIGHT = 33
"""QEMU's exit status when a guest has found every answer right."""
MASK64 = (1 << 64) - 1


class Add(BridgeHandler[int]):
    """Adds one, without waiting for anything."""

    MAGIC = STANDARD_MAGIC
    REQUEST = REQUEST
    VERIFY_VALUE3 = STANDARD_VERIFY_VALUE3
    VERIFY_VALUE4 = STANDARD_VERIFY_VALUE4
    may_wait = True

    async def handle(self, vmi: BridgeContext, packet: BridgePacket) -> BridgeResponse[int]:
        return BridgeResponse(value1=packet.value1 + 1)


class Invert(BridgeHandler[None]):
    """What the guests in QEMU expect: the complement of value1."""

    MAGIC = STANDARD_MAGIC
    REQUEST = REQUEST
    VERIFY_VALUE3 = STANDARD_VERIFY_VALUE3
    VERIFY_VALUE4 = STANDARD_VERIFY_VALUE4

    async def handle(self, vmi: BridgeContext, packet: BridgePacket) -> BridgeResponse[None]:
        return BridgeResponse(~packet.value1 & MASK64)


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


# --- guests in QEMU -----------------------------------------------------------------


def options_of(about: str | None, *, events: int, rounds: int) -> argparse.ArgumentParser:
    """The options that they all have, with these defaults; `about`: the docstring."""
    parser = argparse.ArgumentParser(description=(about or "").partition("\n")[0])
    parser.add_argument("--events", type=int, default=events)
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--loop", choices=LOOPS, action="append", help="by default, all three")
    parser.add_argument("--json", action="store_true")
    return parser


def report(options: argparse.Namespace, line: dict[str, object], text: str) -> None:
    """One line of figures, as JSON if that was asked for."""
    print(json.dumps(line) if options.json else text)
    sys.stdout.flush()


def assemble(folder: Path, name: str, **defines: int) -> Path:
    """The image of a guest."""
    image = folder / "-".join([name, *(f"{key}{value}" for key, value in defines.items())])
    if not image.exists():
        given = [f"-D{key}={value}" for key, value in defines.items()]
        source = GUESTS / f"{name}.asm"
        command = ["nasm", "-f", "bin", f"-I{GUESTS}/", *given, source, "-o", image]
        subprocess.run(command, check=True)
    return image


def qemu_command(qemu: str, image: Path, accel: str = "tcg", memory: int = 32 << 20) -> list[str]:
    """QEMU with a guest that ends by itself."""
    options = f"-accel {accel} -m {memory >> 20} -nodefaults -display none -no-reboot"
    exit_by_guest = ["-device", "isa-debug-exit,iobase=0xf4,iosize=4"]
    return [qemu, *options.split(), "-kernel", str(image), *exit_by_guest]


class Figures(NamedTuple):
    """What so many calls took."""

    calls: int
    seconds: float
    cpu: float
    """Seconds of the processor, of this process and of QEMU."""

    @property
    def rate(self) -> float:
        """Calls a second."""
        return self.calls / self.seconds

    @property
    def cpu_us(self) -> float:
        """Microseconds of the processor for a call."""
        return self.cpu / self.calls * 1e6


class Stopwatch:
    """From the first of so many calls to the last."""

    def __init__(self, calls: int, pid: int) -> None:
        self.seen = 0
        self._calls, self._pid = calls, pid
        self._marks: list[tuple[float, float]] = []

    def see(self) -> None:
        """One more is answered."""
        self.seen += 1
        if self.seen in (1, self._calls):
            cpu = time.process_time() + used_by(self._pid)
            self._marks.append((time.perf_counter(), cpu))

    @property
    def figures(self) -> Figures:
        """When all were seen."""
        (begin, cpu_before), (end, cpu_after) = self._marks
        return Figures(self._calls - 1, end - begin, cpu_after - cpu_before)


def used_by(pid: int) -> float:
    """What a process has used of the processor: it is there until its parent waits for it."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def measured(server: BridgeServer, calls: int, pid: int) -> Figures:
    """Serve a guest to its end."""
    watch = Stopwatch(calls, pid)
    async for _ in server.run():
        watch.see()
    assert server.summary.outcomes[OutcomeKind.HANDLED] == calls
    return watch.figures


async def served(
    spec: str, handler: BridgeHandler[None], command: list[str], calls: int
) -> Figures:
    """Serve a guest whose QEMU connects, and that has to end well."""
    async with open_backend(spec) as backend:
        server = BridgeServer(backend, Bridge(handler), timeout=60.0)
        # Not by the event loop, which would wait for it before its times are read.
        with subprocess.Popen(command) as qemu:  # noqa: ASYNC220
            try:
                figures = await measured(server, calls, qemu.pid)
            except BaseException:  # a cancellation, too: nobody else would end it
                qemu.kill()
                raise
            assert await anyio.to_thread.run_sync(qemu.wait) == ALL_RIGHT
    return figures

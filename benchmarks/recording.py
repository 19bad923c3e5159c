"""What recording adds to a trap, and how fast a recording is replayed.

    python benchmarks/recording.py [--events N] [--rounds N] [--json]

- *engine*: traps with the registers of a kernel, through `BridgeServer` over `FakeBackend`,
  to a handler that does not wait.
- *recorded*: the same with a `Recorder`, from its opening to the closed file; the file is
  read back, and has to hold every trap and every reply.
- *with memory*: both again, with a handler that reads 64 bytes of guest memory.
- *replay*: what was recorded, through real dispatch, compared.

Microseconds are those of the processor, of all threads of the process: so what the writing thread
takes is counted, and what other processes do is not, as far as they leave it the caches. Rounds
alternate between the sides; a difference is that of the medians, and a ratio is to the engine.
"""

import argparse
import gc
import json
import statistics
import sys
import tempfile
from pathlib import Path

import msgspec
from common import LOOPS, REQUEST, Add, cpu_seconds, make_events, pin

from vmibridge import (
    Bridge,
    BridgeContext,
    BridgePacket,
    BridgeResponse,
    BridgeServer,
    Registers,
    TrapEvent,
)
from vmibridge.recording.file.reader import RecordingReader
from vmibridge.recording.messages import REPLY, TRAP
from vmibridge.recording.recorder import Recorder
from vmibridge.recording.replay.backend import ReplayBackend
from vmibridge.testing import FakeBackend

VCPUS = 4
MEMORY = {0x10_0000: bytes(range(64))}
_KERNEL = Registers(
    rax=0xFFFF_8881_0432_1000,
    rbx=0x7FFF_1234_5678,
    rsi=0xFFFF_FFFF_8223_0010,
    rdi=0x1000,
    rbp=0xFFFF_C900_0123_BEEF,
    rsp=0xFFFF_C900_0123_BE00,
    r12=0x11,
    r13=0xFFFF_FFFF_8100_0000,
    r14=0x7F,
    rip=0xFFFF_FFFF_8100_1000,
    rflags=0x246,
)


class AddFromMemory(Add):
    """Adds what it reads."""

    async def handle(self, vmi: BridgeContext, packet: BridgePacket) -> BridgeResponse[int]:
        data = await vmi.memory.read(0x10_0000, 64)
        return BridgeResponse(value1=packet.value1 + data[1])


def kernel_events(count: int) -> list[TrapEvent]:
    """The traps of the other benchmarks, with registers as a kernel has them."""
    return [
        msgspec.structs.replace(
            event,
            registers=msgspec.structs.replace(
                _KERNEL,
                rcx=event.registers.rcx,
                rdx=event.registers.rdx,
                r8=event.registers.r8,
                rsp=_KERNEL.rsp - event.seq % 512 * 8,
            ),
        )
        for event in make_events(count, VCPUS, REQUEST)
    ]


async def engine(events: list[TrapEvent], handler: Add) -> None:
    async with FakeBackend(events, memory=MEMORY, vm="vm") as backend:
        async for _ in BridgeServer(backend, Bridge(handler)).run():
            pass


async def recorded(events: list[TrapEvent], handler: Add, path: Path) -> None:
    async with (
        Recorder(path, overwrite=True) as recorder,
        FakeBackend(events, memory=MEMORY, vm="vm") as backend,
    ):
        async for _ in BridgeServer(backend, Bridge(handler), taps=[recorder]).run():
            pass


async def replayed(events: list[TrapEvent], handler: Add, path: Path) -> None:
    async with ReplayBackend(path) as backend:
        async for _ in BridgeServer(backend, Bridge(handler)).run():
            pass
    result = backend.result
    assert (result.compared, result.different) == (len(events), 0), result


def check(path: Path, count: int) -> None:
    """Nothing was lost."""
    with RecordingReader(path) as reader:
        for channel in (TRAP, REPLY):
            assert sum(1 for _ in reader.messages(channel)) == count
        assert reader.complete


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--events", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    pin()
    # As the commands do.
    gc.set_threshold(10_000, *gc.get_threshold()[1:])
    events = kernel_events(options.events)
    if not options.json:
        print(f"{options.events} traps, median of {options.rounds} rounds")
        print(
            "loop     handler      engine us  recorded us  added us  ratio  bytes a trap"
            " | replay us  ratio"
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.mcap"
        for name, loop in LOOPS.items():
            for label, handler in (("plain", Add()), ("with memory", AddFromMemory())):
                taken: list[list[float]] = [[], [], []]
                for _ in range(options.rounds):
                    taken[0].append(cpu_seconds(loop, engine, events, handler))
                    taken[1].append(cpu_seconds(loop, recorded, events, handler, path))
                    check(path, len(events))
                    taken[2].append(cpu_seconds(loop, replayed, events, handler, path))
                us = [statistics.median(each) / len(events) * 1e6 for each in taken]
                line = {
                    "loop": name,
                    "handler": label,
                    "engine_us": us[0],
                    "recorded_us": us[1],
                    "added_us": us[1] - us[0],
                    "added_ratio": us[1] / us[0] - 1,
                    "bytes": path.stat().st_size / len(events),
                    "replay_us": us[2],
                    "replay_ratio": us[2] / us[0],
                }
                if options.json:
                    print(json.dumps(line))
                else:
                    print(
                        f"{name:8} {label:11} {us[0]:10.2f} {us[1]:12.2f} {us[1] - us[0]:9.2f}"
                        f" {us[1] / us[0] - 1:6.2f} {line['bytes']:13.1f}"
                        f" | {us[2]:9.2f} {us[2] / us[0]:6.2f}"
                    )
                sys.stdout.flush()


if __name__ == "__main__":
    main()

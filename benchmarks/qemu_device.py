"""What a call costs through the QEMU device, against the plugin, and how fast guest memory is read.

    python benchmarks/qemu_device.py [--qemu PATH] [--events N] [--rounds N] [--accel tcg] [--json]

Both sides have the same engine with an async handler, and the same QEMU; the guests make calls one
after the other and check every answer, on one vCPU:

- *device*: the backend `vfio-user`; a call is a slot in shared memory, and a write to its doorbell.
- *plugin*: the backend `qemu-plugin`; a call is a VMCALL. Only under TCG.

The figure is CPU time, of this process and of QEMU together, from the first call to the last: the
rate depends much on what else the machine does. The process pins itself, and so QEMU, to one core.
Rounds alternate between the sides, and of each the least is shown.

Then one call reads 64 MiB of guest memory in pieces of 64 KiB, by virtual address.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import anyio
from common import LOOPS, REQUEST, pin, run

from vmibridge import (
    Bridge,
    BridgeContext,
    BridgeHandler,
    BridgePacket,
    BridgeResponse,
    BridgeServer,
    OutcomeKind,
    open_backend,
)
from vmibridge.backends.device.arguments import device_arguments
from vmibridge.backends.qemu.find import PLUGIN_NEEDS, find_qemu
from vmibridge.backends.qemu.plugin.build import build_plugin
from vmibridge.bridge.contract import STANDARD_MAGIC, STANDARD_VERIFY_VALUE3, STANDARD_VERIFY_VALUE4

ROOT = Path(__file__).parents[1]
GUESTS = ROOT / "tests/integration/guests"
MASK64 = (1 << 64) - 1
ALL_RIGHT = 33
MEMORY, START, SIZE, PIECE = 128 << 20, 16 << 20, 64 << 20, 64 << 10


class Invert(BridgeHandler[None]):
    """What the guests expect: the complement of value1. Reads memory in the second call."""

    MAGIC = STANDARD_MAGIC
    REQUEST = REQUEST
    VERIFY_VALUE3 = STANDARD_VERIFY_VALUE3
    VERIFY_VALUE4 = STANDARD_VERIFY_VALUE4

    def __init__(self, *, reads: bool) -> None:
        self._reads = reads
        self.seconds = 0.0

    async def handle(self, vmi: BridgeContext, packet: BridgePacket) -> BridgeResponse[None]:
        if self._reads and packet.value1 == 1:
            before = time.perf_counter()
            for address in range(START, START + SIZE, PIECE):
                assert len(await vmi.memory.read(address, PIECE)) == PIECE
            self.seconds = time.perf_counter() - before
        return BridgeResponse(~packet.value1 & MASK64)


class Stage:
    """The guests, and the QEMU that both sides use, in a folder of their own."""

    def __init__(self, folder: Path, qemu: str, accel: str) -> None:
        self.folder, self.qemu, self.accel = folder, qemu, accel
        self.socket = folder / "s"
        self.plugin = build_plugin(folder / "plugin.so") if accel == "tcg" else None

    def image(self, name: str, calls: int) -> Path:
        """The guest that makes so many calls."""
        image = self.folder / f"{name}{calls}.bin"
        if not image.exists():
            define, source = f"-DCOUNT={calls}", GUESTS / f"{name}.asm"
            command = ["nasm", "-f", "bin", f"-I{GUESTS}/", define, source, "-o", image]
            subprocess.run(command, check=True)
        return image

    def command(self, side: str, calls: int) -> list[str]:
        """QEMU with one of the guests."""
        options = (
            f"-accel {self.accel} -M q35 -m {MEMORY >> 20} -nodefaults -display none -no-reboot"
        )
        command = [self.qemu, *options.split(), "-device", "isa-debug-exit,iobase=0xf4,iosize=4"]
        if side == "device":
            return [
                *(*command, "-kernel", str(self.image("device", calls))),
                *device_arguments(self.socket, 5.0, MEMORY),
            ]
        return [
            *(*command, "-kernel", str(self.image("micro", calls))),
            *("-plugin", f"file={self.plugin},socket={self.socket}"),
        ]


async def one(stage: Stage, side: str, calls: int, *, reads: bool) -> tuple[float, float, float]:
    """CPU seconds and seconds of all calls but the first, and seconds of the reads."""
    spec = f"vfio-user:unix:{stage.socket}?kernel=1"
    if side == "plugin":
        spec = f"qemu-plugin:unix:{stage.socket}"
    marks: list[tuple[float, float]] = []
    handler = Invert(reads=reads)
    async with open_backend(spec) as backend:
        server = BridgeServer(backend, Bridge(handler), timeout=60.0)
        # Not by the event loop, which would wait for it before its times are read.
        with subprocess.Popen(stage.command(side, calls)) as qemu:  # noqa: ASYNC220
            try:
                seen = 0
                async for _ in server.run():
                    seen += 1
                    if seen in (1, calls):
                        cpu = time.process_time() + cpu_seconds(qemu.pid)
                        marks.append((cpu, time.perf_counter()))
            except BaseException:  # a cancellation, too: nobody else would end it
                qemu.kill()
                raise
            assert await anyio.to_thread.run_sync(qemu.wait) == ALL_RIGHT
    assert server.summary.outcomes[OutcomeKind.HANDLED] == calls
    (cpu, began), (cpu_then, ended) = marks
    return cpu_then - cpu, ended - began, handler.seconds


def cpu_seconds(pid: int) -> float:
    """What a process has used. One that has ended is there until its parent waits for it."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--qemu", help="11.1 or later; by default as `vmibridge qemu run` finds it")
    parser.add_argument("--events", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--accel", choices=("tcg", "kvm"), default="tcg")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    qemu = find_qemu(options.qemu, PLUGIN_NEEDS).path
    sides = ("device", "plugin") if options.accel == "tcg" else ("device",)
    pin()
    with tempfile.TemporaryDirectory() as folder:
        stage = Stage(Path(folder), qemu, options.accel)
        if not options.json:
            print(f"{options.events} calls, least of {options.rounds} rounds, {options.accel}")
            print("loop     side    CPU us a call  calls a second  64 MiB, MiB/s")
        for name, loop in LOOPS.items():
            calls: dict[str, list[tuple[float, float, float]]] = {side: [] for side in sides}
            reads: dict[str, list[float]] = {side: [] for side in sides}
            for _ in range(options.rounds):
                for side in sides:
                    calls[side].append(
                        run(loop, partial(one, reads=False), stage, side, options.events)
                    )
                    reads[side].append(run(loop, partial(one, reads=True), stage, side, 3)[2])
            for side in sides:
                least_cpu = min(cpu for cpu, _, _ in calls[side]) / (options.events - 1)
                least = min(seconds for _, seconds, _ in calls[side]) / (options.events - 1)
                speed = (SIZE >> 20) / min(reads[side])
                show(options, name, side, least_cpu * 1e6, 1 / least, speed)


def show(
    options: argparse.Namespace, loop: str, side: str, cpu: float, rate: float, speed: float
) -> None:
    if options.json:
        line = {"loop": loop, "side": side, "cpu_us": cpu, "rate": rate, "read_mib_s": speed}
        print(json.dumps(line))
    else:
        print(f"{loop:8} {side:7} {cpu:13.1f} {rate:15.0f} {speed:14.0f}")
    sys.stdout.flush()


if __name__ == "__main__":
    main()

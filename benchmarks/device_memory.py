"""How fast a handler reads guest memory through the QEMU device, against the copy alone.

    python benchmarks/device_memory.py [--qemu PATH] [--rounds N] [--accel tcg] [--piece BYTES]

One call of the guest reads 64 MiB in pieces, one a read, in three ways:

- *physical*: `vmi.memory.read_physical`.
- *2 MiB*: `vmi.memory.read`, in pages of that size, as the guest has them.
- *4 KiB*: the same in small pages, whose tables the handler makes first.

*Copy* is `os.pread` alone, of a file like that of the guest's memory; neither has holes. It is all
CPU time of this process, the least of the rounds: reading waits for nothing.
"""

import os
import struct
import tempfile
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import anyio.lowlevel
from common import LOOPS, MASK64, Invert, assemble, options_of, pin, report, run, served
from qemu_device import device_command

from vmibridge import BridgeContext, BridgePacket, BridgeResponse
from vmibridge.backends.qemu.find import PLUGIN_NEEDS, find_qemu

START, SIZE = 16 << 20, 64 << 20
WAYS = ("physical", "2 MiB", "4 KiB")
DIRECTORY, TABLES = 0x7_2000, 100 << 20
"""The guest's page directory of the first GiB, and where it has nothing."""
LARGE, PAGE = 2 << 20, 4 << 10
FILL = 1 << 20
RIGHTS = 0x67
"""Present, writable, user, accessed, dirty."""


class Read(Invert):
    """Reads memory in the last call."""

    def __init__(self, piece: int) -> None:
        self._piece = piece
        self.seconds: dict[str, float] = {}

    async def handle(self, vmi: BridgeContext, packet: BridgePacket) -> BridgeResponse[None]:
        if packet.value1 == 1:
            memory = vmi.memory
            # Page tables are read for it. They are not zeros, so from here on it is known that the
            # file is the guest's memory: what is zero does not show that.
            await memory.read(START, 1)
            for address in range(START, START + SIZE, FILL):
                await memory.write_physical(address, b"\1" * FILL)
            self.seconds["physical"] = await self._time(memory.read_physical)
            self.seconds["2 MiB"] = await self._time(memory.read)
            await make_small_pages(vmi)
            self.seconds["4 KiB"] = await self._time(memory.read)
        return BridgeResponse(~packet.value1 & MASK64)

    async def _time(self, read: Callable[[int, int], Awaitable[bytes]]) -> float:
        await anyio.lowlevel.checkpoint()
        before, piece = time.process_time(), self._piece
        for address in range(START, START + SIZE, piece):
            assert len(await read(address, piece)) == piece
        return time.process_time() - before


async def make_small_pages(vmi: BridgeContext) -> None:
    """Map what is read in pages of 4 KiB, each to where it was."""
    for number in range(START // LARGE, (START + SIZE) // LARGE):
        table, first = TABLES + number * PAGE, number * LARGE
        entries = [page | RIGHTS for page in range(first, first + LARGE, PAGE)]
        await vmi.memory.write_physical(table, struct.pack("<512Q", *entries))
        entry = struct.pack("<Q", table | RIGHTS)
        await vmi.memory.write_physical(DIRECTORY + 8 * number, entry)


def copy(piece: int) -> float:
    """Seconds for the same pieces of a file alone."""
    descriptor = os.memfd_create("memory")
    try:
        os.pwrite(descriptor, b"\1" * (START + SIZE), 0)
        before = time.process_time()
        for address in range(START, START + SIZE, piece):
            os.pread(descriptor, piece, address)
        return time.process_time() - before
    finally:
        os.close(descriptor)


def main() -> None:
    parser = options_of(__doc__, events=2, rounds=5)
    parser.add_argument("--qemu", help="11.1 or later; by default as `vmibridge qemu run` finds it")
    parser.add_argument("--accel", choices=("tcg", "kvm"), default="tcg")
    parser.add_argument("--piece", type=int, default=64 << 10, help="bytes of one read")
    options = parser.parse_args()
    qemu = find_qemu(options.qemu, PLUGIN_NEEDS).path
    pin()
    if not options.json:
        print(f"64 MiB in pieces of {options.piece} bytes, least of {options.rounds} rounds, GiB/s")
        print(f"loop         copy {' '.join(f'{way:>8} ratio' for way in WAYS)}")
    with tempfile.TemporaryDirectory() as folder:
        image, socket = assemble(Path(folder), "device", COUNT=2), Path(folder) / "s"
        command = device_command(qemu, image, socket, options.accel)
        for name in options.loop or LOOPS:
            least = dict.fromkeys(("copy", *WAYS), float("inf"))
            for _ in range(options.rounds):
                handler = Read(options.piece)
                side = partial(served, f"vfio-user:unix:{socket}?kernel=1", handler)
                run(LOOPS[name], side, command, 2)
                for way, seconds in [("copy", copy(options.piece)), *handler.seconds.items()]:
                    least[way] = min(least[way], seconds)
            speed = {way: SIZE / (1 << 30) / seconds for way, seconds in least.items()}
            ratios = {way: speed[way] / speed["copy"] for way in WAYS}
            figures = " ".join(f"{speed[way]:8.2f} {ratios[way]:5.2f}" for way in WAYS)
            report(options, {"loop": name, **speed}, f"{name:8} {speed['copy']:8.2f} {figures}")


if __name__ == "__main__":
    main()

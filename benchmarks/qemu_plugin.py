"""Traps a second through the QEMU plugin, against a bare peer, and against gdb's Python.

    python benchmarks/qemu_plugin.py [--qemu PATH] [--events N] [--rounds N] [--json]

All sides answer the same guest, which makes VMCALLs one after the other and checks every
answer, in the same QEMU (TCG, one vCPU):

- *engine*: `BridgeServer` with the backend `qemu-plugin`: deadlines, lanes, outcomes, and an
  async handler.
- *bare*: a loop over an anyio stream that unpacks a trap, and packs and sends the answer.
- *gdb*: a breakpoint, and gdb's Python that reads and writes registers.

The process pins itself, and so QEMU and gdb, to one core. Rounds alternate between the sides;
the time is that from the first trap to the last answer.
"""

import argparse
import json
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import anyio
from common import LOOPS, REQUEST, Loop, pin, run
from qemu_gdb import by_hand, guest

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
from vmibridge.backends.qemu.find import PLUGIN_NEEDS, find_qemu
from vmibridge.backends.qemu.plugin.build import build_plugin
from vmibridge.backends.qemu.plugin.protocol import PROTOCOL
from vmibridge.bridge.contract import STANDARD_MAGIC, STANDARD_VERIFY_VALUE3, STANDARD_VERIFY_VALUE4

ROOT = Path(__file__).parents[1]
MASK64 = (1 << 64) - 1
ALL_RIGHT = 33
TRAP, WELCOME, ANSWER = 2, 16, 18
_FRAME = struct.Struct("<II")
_TRAP = struct.Struct("<QBBBBI22Q")
_ANSWER = struct.Struct("<IIQII4Q")


class Invert(BridgeHandler[None]):
    """What the guest expects: the complement of value1."""

    MAGIC = STANDARD_MAGIC
    REQUEST = REQUEST
    VERIFY_VALUE3 = STANDARD_VERIFY_VALUE3
    VERIFY_VALUE4 = STANDARD_VERIFY_VALUE4

    async def handle(self, vmi: BridgeContext, packet: BridgePacket) -> BridgeResponse[None]:
        return BridgeResponse(~packet.value1 & MASK64)


class Stage:
    """The guest and the QEMU that all sides use, in a folder of their own."""

    def __init__(self, folder: Path, qemu: str, events: int) -> None:
        self.folder, self.qemu, self.events = folder, qemu, events
        self.plugin = build_plugin(folder / "plugin.so")
        self.socket = folder / "s"

    def image(self, events: int) -> Path:
        """The guest that makes so many calls."""
        image = self.folder / f"guest{events}.bin"
        if not image.exists():
            source = ROOT / "tests/integration/guests/micro.asm"
            subprocess.run(
                ["nasm", "-f", "bin", f"-DCOUNT={events}", source, "-o", image], check=True
            )
        return image

    async def boot(self) -> None:
        """The guest with the plugin, to its end."""
        options = "-accel tcg -m 32 -nodefaults -display none -no-reboot"
        command = [
            *(self.qemu, *options.split(), "-kernel", str(self.image(self.events))),
            *("-device", "isa-debug-exit,iobase=0xf4,iosize=4"),
            *("-plugin", f"file={self.plugin},socket={self.socket}"),
        ]
        done = await anyio.run_process(command, check=False)
        assert done.returncode == ALL_RIGHT, done


async def engine(stage: Stage) -> float:
    times = []
    async with open_backend(f"qemu-plugin:unix:{stage.socket}") as backend:
        server = BridgeServer(backend, Bridge(Invert()), timeout=5.0)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(stage.boot)
            async for _ in server.run():
                if not times:
                    times.append(time.perf_counter())
            times.append(time.perf_counter())
    assert server.summary.outcomes[OutcomeKind.HANDLED] == stage.events
    return stage.events / (times[1] - times[0])


async def bare(stage: Stage) -> float:
    times = []

    async def serve(stream: anyio.abc.SocketStream) -> None:
        await stream.receive()
        body = struct.pack("<IIIII", PROTOCOL, 14, 0, 1, STANDARD_MAGIC)
        await stream.send(_FRAME.pack(WELCOME, len(body)) + body)
        buffer = b""
        while True:
            try:
                buffer += await stream.receive(4096)
            except (anyio.EndOfStream, anyio.BrokenResourceError):
                break
            if not times:
                times.append(time.perf_counter())
            while len(buffer) >= 8 + _TRAP.size:
                trap = _TRAP.unpack_from(buffer, 8)
                buffer = buffer[8 + _TRAP.size :]
                answer = _ANSWER.pack(
                    *(ANSWER, _ANSWER.size - 8, trap[0] + trap[2], 0b1101, 0, ~trap[14] & MASK64),
                    *(0, STANDARD_VERIFY_VALUE3, STANDARD_VERIFY_VALUE4),
                )
                await stream.send(answer)
        times.append(time.perf_counter())

    listener = await anyio.create_unix_listener(stage.socket)
    async with listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, serve)
        await stage.boot()
        tasks.cancel_scope.cancel()
    stage.socket.unlink()
    return stage.events / (times[-1] - times[0])


def gdb(stage: Stage, events: int) -> float:
    stub = stage.folder / "stub"
    image = stage.image(events)
    site = 0x100000 + image.read_bytes().index(b"\x0f\x01\xc1")
    with guest(stage.qemu, image, stub):
        return by_hand(stub, site, events, stage.folder / "loop.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--qemu", help="11.1 or later; by default as `vmibridge qemu run` finds it")
    parser.add_argument("--events", type=int, default=50_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    qemu = find_qemu(options.qemu, PLUGIN_NEEDS).path
    pin()
    if not options.json:
        print(f"{options.events} traps, median of {options.rounds} rounds, traps a second")
        print("loop        bare   engine  ratio     gdb  ratio")
    with tempfile.TemporaryDirectory() as folder:
        stage = Stage(Path(folder), qemu, options.events)
        for name, loop in LOOPS.items():
            show(name, options, *compare(stage, loop, options.rounds))


def compare(stage: Stage, loop: Loop, rounds: int) -> tuple[float, float, float]:
    rates = [
        (run(loop, bare, stage), run(loop, engine, stage), gdb(stage, stage.events // 50))
        for _ in range(rounds)
    ]
    by_bare, by_engine, by_gdb = (statistics.median(each) for each in zip(*rates, strict=True))
    return by_bare, by_engine, by_gdb


def show(
    name: str, options: argparse.Namespace, by_bare: float, by_engine: float, by_gdb: float
) -> None:
    line = {
        "loop": name,
        "bare": by_bare,
        "engine": by_engine,
        "to_bare": by_engine / by_bare,
        "gdb": by_gdb,
        "to_gdb": by_engine / by_gdb,
    }
    if options.json:
        print(json.dumps(line))
    else:
        print(
            f"{name:8} {by_bare:8.0f} {by_engine:8.0f} {line['to_bare']:6.2f}"
            f" {by_gdb:7.0f} {line['to_gdb']:6.1f}"
        )
    sys.stdout.flush()


if __name__ == "__main__":
    main()

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
import statistics
import struct
import tempfile
import time
from pathlib import Path

import anyio
from common import (
    ALL_RIGHT,
    LOOPS,
    MASK64,
    Invert,
    Loop,
    assemble,
    options_of,
    pin,
    qemu_command,
    report,
    run,
    served,
)
from qemu_gdb import by_hand, guest, site_of

from vmibridge.backends.qemu.find import PLUGIN_NEEDS, find_qemu
from vmibridge.backends.qemu.plugin.build import build_plugin
from vmibridge.backends.qemu.plugin.protocol import PROTOCOL
from vmibridge.bridge.contract import STANDARD_MAGIC, STANDARD_VERIFY_VALUE3, STANDARD_VERIFY_VALUE4

TRAP, WELCOME, ANSWER = 2, 16, 18
_FRAME = struct.Struct("<II")
_TRAP = struct.Struct("<QBBBBI22Q")
_ANSWER = struct.Struct("<IIQII4Q")


class Stage:
    """The guest and the QEMU that all sides use, in a folder of their own."""

    def __init__(self, folder: Path, qemu: str, events: int) -> None:
        self.folder, self.qemu, self.events = folder, qemu, events
        self.plugin = build_plugin(folder / "plugin.so")
        self.socket = folder / "s"

    @property
    def command(self) -> list[str]:
        """The guest with the plugin."""
        image = assemble(self.folder, "micro", COUNT=self.events)
        plugin = f"file={self.plugin},socket={self.socket}"
        return [*qemu_command(self.qemu, image), "-plugin", plugin]

    async def boot(self) -> None:
        """The guest, to its end."""
        done = await anyio.run_process(self.command, check=False)
        assert done.returncode == ALL_RIGHT, done


async def engine(stage: Stage) -> float:
    spec = f"qemu-plugin:unix:{stage.socket}"
    return (await served(spec, Invert(), stage.command, stage.events)).rate


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
    image = assemble(stage.folder, "micro", COUNT=events)
    with guest(stage.qemu, image, stub):
        return by_hand(stub, site_of(image), events, stage.folder / "loop.py")


def main() -> None:
    parser = options_of(__doc__, events=50_000, rounds=5)
    parser.add_argument("--qemu", help="11.1 or later; by default as `vmibridge qemu run` finds it")
    options = parser.parse_args()
    qemu = find_qemu(options.qemu, PLUGIN_NEEDS).path
    pin()
    if not options.json:
        print(f"{options.events} traps, median of {options.rounds} rounds, traps a second")
        print("loop        bare   engine  ratio     gdb  ratio")
    with tempfile.TemporaryDirectory() as folder:
        stage = Stage(Path(folder), qemu, options.events)
        for name in options.loop or LOOPS:
            show(name, options, *compare(stage, LOOPS[name], options.rounds))


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
    line: dict[str, object] = {
        "loop": name,
        "bare": by_bare,
        "engine": by_engine,
        "to_bare": by_engine / by_bare,
        "gdb": by_gdb,
        "to_gdb": by_engine / by_gdb,
    }
    text = (
        f"{name:8} {by_bare:8.0f} {by_engine:8.0f} {by_engine / by_bare:6.2f}"
        f" {by_gdb:7.0f} {by_engine / by_gdb:6.1f}"
    )
    report(options, line, text)


if __name__ == "__main__":
    main()

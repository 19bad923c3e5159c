"""Bytes a second of files between a guest and the host, through the QEMU plugin.

    python benchmarks/file_transfer.py [--qemu PATH] [--size MIB] [--rounds N] [--json]

A guest in QEMU (TCG, one vCPU) puts a file by the ready-made handler `files`, in pieces of 1 MiB,
and gets it again:

- *put*, *get*: `BridgeServer` with the backend `qemu-plugin` and the handler, from the answer to
  BEGIN to that of END.
- *copy*: as many bytes from file to file by `pread` and `pwrite` alone, in pieces of 1 MiB.

QEMU shares its memory (*shared*), or each access goes through the plugin (*plugin*); memory of the
guest is in pages of 2 MiB, or of 4 KiB that do not follow each other. All files are in `--folder`,
by default in /dev/shm, so that no disk is measured; END waits for none.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import anyio
from common import LOOPS, Loop, run

from vmibridge import Bridge, BridgeServer, Outcome, OutcomeKind, open_backend
from vmibridge.backends.qemu.find import PLUGIN_NEEDS, find_qemu
from vmibridge.backends.qemu.plugin.build import build_plugin
from vmibridge.handlers.files import MAX_PIECE, Files

ROOT = Path(__file__).parents[1]
ALL_RIGHT = 33
BEGIN, PUT, GET, END = 1, 2, 3, 4


class Stage:
    """The guest and the QEMU of all sides, in a folder of their own."""

    def __init__(self, folder: Path, qemu: str, size: int) -> None:
        self.folder, self.qemu, self.size = folder, qemu, size
        self.plugin = build_plugin(folder / "plugin.so")
        self.socket = folder / "s"
        self.ram = folder / "ram"
        self.files = folder / "files"
        self.files.mkdir()

    def image(self, small: bool) -> Path:
        """The guest with such pages."""
        image = self.folder / f"guest{small:d}.bin"
        if not image.exists():
            guests = ROOT / "tests/integration/guests"
            options = [f"-DSIZE={self.size}", f"-DPIECE={MAX_PIECE}", f"-DSMALL={small:d}"]
            include = [f"-I{ROOT / 'guest/include'}/", f"-I{guests}/"]
            command = ["nasm", "-f", "bin", *options, *include, guests / "files.asm", "-o", image]
            subprocess.run(command, check=True)
        return image

    async def boot(self, small: bool, shared: bool) -> None:
        """The guest with the plugin, to its end."""
        memory = (self.size >> 20) + 64
        options = "-accel tcg -nodefaults -display none -no-reboot -serial stdio"
        plugin = f"file={self.plugin},socket={self.socket},patience=600"
        command = [self.qemu, *options.split(), "-m", str(memory)]
        if shared:
            ram = f"memory-backend-file,id=ram,size={memory}M,mem-path={self.ram},share=on"
            command += ["-object", ram, "-machine", "memory-backend=ram"]
            plugin += f",ram={self.ram}"
        command += ["-device", "isa-debug-exit,iobase=0xf4,iosize=4"]
        command += ["-kernel", str(self.image(small)), "-plugin", plugin]
        done = await anyio.run_process(command, check=False)
        assert done.returncode == ALL_RIGHT, done


class Clock:
    """When a direction began and ended."""

    def __init__(self) -> None:
        self.begun: float | None = None
        self.seconds: list[float] = []

    def take(self, outcome: Outcome) -> None:
        assert outcome.kind is OutcomeKind.HANDLED, outcome
        assert outcome.response.value1 >> 8 & 0xFF == 0, hex(outcome.response.value1)
        if outcome.packet.method == BEGIN:
            self.begun = time.perf_counter()
        elif outcome.packet.method == END:
            self.seconds.append(time.perf_counter() - self.begun)


async def transfer(stage: Stage, small: bool, shared: bool) -> tuple[float, float]:
    """Seconds for a put and for a get."""
    settings = Files.Settings(folder=str(stage.files), replace=True, sync=False)
    clock = Clock()
    async with open_backend(f"qemu-plugin:unix:{stage.socket}") as backend:
        server = BridgeServer(backend, Bridge(Files(settings)), timeout=60.0)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(stage.boot, small, shared)
            async for outcome in server.run():
                clock.take(outcome)
    put, get = clock.seconds
    return put, get


def copy(stage: Stage) -> float:
    """Seconds to copy as much by pread and pwrite alone."""
    source, target = stage.folder / "source", stage.folder / "target"
    if not source.exists():
        source.write_bytes(os.urandom(MAX_PIECE) * (stage.size // MAX_PIECE))
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    taken, put = os.open(source, os.O_RDONLY), os.open(target, flags)
    begun = time.perf_counter()
    for at in range(0, stage.size, MAX_PIECE):
        os.pwrite(put, os.pread(taken, MAX_PIECE, at), at)
    took = time.perf_counter() - begun
    os.close(taken)
    os.close(put)
    target.unlink()
    return took


SIDES = [("shared", "2 MiB"), ("shared", "4 KiB"), ("plugin", "2 MiB"), ("plugin", "4 KiB")]


def compare(stage: Stage, loop: Loop, rounds: int, memory: str, pages: str) -> dict[str, float]:
    """MB a second of each direction, and of the copy."""
    times: list[tuple[float, float, float]] = []
    for _ in range(rounds):
        put, get = run(loop, transfer, stage, pages == "4 KiB", memory == "shared")
        times.append((copy(stage), put, get))
    copied, put, get = (
        stage.size / 1e6 / statistics.median(each) for each in zip(*times, strict=True)
    )
    return {"copy": copied, "put": put, "get": get}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--qemu", help="11.1 or later; by default as `vmibridge qemu run` finds it")
    parser.add_argument("--size", type=int, default=128, help="MiB of the file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default="/dev/shm", help="where all files are")
    parser.add_argument("--loops", nargs="+", default=list(LOOPS), choices=list(LOOPS))
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    qemu = find_qemu(options.qemu, PLUGIN_NEEDS).path
    if not options.json:
        print(f"a file of {options.size} MiB, median of {options.rounds} rounds, MB/s")
        print("loop     memory   pages     copy     put  ratio     get  ratio")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        stage = Stage(Path(folder), qemu, options.size << 20)
        for name in options.loops:
            for memory, pages in SIDES:
                found = compare(stage, LOOPS[name], options.rounds, memory, pages)
                show(name, memory, pages, found, options.json)


def show(name: str, memory: str, pages: str, found: dict[str, float], as_json: bool) -> None:
    if as_json:
        print(json.dumps({"loop": name, "memory": memory, "pages": pages, **found}))
    else:
        copied, put, get = found["copy"], found["put"], found["get"]
        print(
            f"{name:8} {memory:8} {pages:6} {copied:8.0f} {put:7.0f} {put / copied:6.2f}"
            f" {get:7.0f} {get / copied:6.2f}"
        )
    sys.stdout.flush()


if __name__ == "__main__":
    main()

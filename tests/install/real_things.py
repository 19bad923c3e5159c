"""What an installation can do: run by the Python of an environment that has vmibridge in it.

    python real_things.py EXTRA...

Imports every module, of which those may fail that need an extra that is not named, and does one
real thing with the core and with each EXTRA. Prints a line for each; a failure is a traceback.
The environment variable NATS_SERVER names the program of a NATS server, ELF a program with a
CPUID at `site`, which is 0x400000.
"""

import importlib
import os
import pkgutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import distribution
from pathlib import Path

import anyio

import vmibridge
from vmibridge import Bridge, BridgeHandler, BridgePacket, BridgeResponse, BridgeServer, Outcome
from vmibridge.errors import MissingExtraError
from vmibridge.testing import FakeGuest, drive

MAGIC = 0x42494D56
NEEDS = {
    "vmibridge.cli": "cli",
    "vmibridge.aio.checkpoints_trio": "trio",
    "vmibridge.aio.clock_trio": "trio",
    "vmibridge.aio.handler_scope_trio": "trio",
    "vmibridge.aio.parking_trio": "trio",
    "vmibridge.aio.start_trio": "trio",
    "vmibridge.pytest_plugin": "test",  # by pytest, which has itself
    "vmibridge.recording": "recording",
    "vmibridge.recording.export.parquet": "parquet",
    "vmibridge.recording.export.perfetto": "perfetto",
    "vmibridge.transport.nats.patched": "nats",
    "vmibridge.backends.unicorn.backend": "unicorn",
    "vmibridge.backends.unicorn.vcpu": "unicorn",
    "vmibridge.backends.unicorn.code": "unicorn",
    "vmibridge.backends.unicorn.registers": "unicorn",
}
"""What a module, with all below it, needs to be imported, where it does not say so itself."""


class Double(BridgeHandler[int]):
    """The handler of all that is tried here."""

    MAGIC = MAGIC
    REQUEST = 1

    async def handle(self, vmi: object, packet: BridgePacket) -> BridgeResponse[int]:
        return BridgeResponse(2 * packet.value1).with_output(2 * packet.value1)


ASKED = BridgePacket(MAGIC, 1, 1, 21)


async def guest(vm: FakeGuest) -> None:
    writes = await vm.call(ASKED)
    assert writes is not None
    assert writes.rax == 42


async def serve(backend: object, **options: object) -> list[Outcome[int]]:
    async with backend as entered:
        server = BridgeServer(entered, Bridge(Double()), **options)
        return [outcome async for outcome in server.run()]


def served(loop: str, **options: object) -> None:
    (outcome,) = anyio.run(lambda: serve(FakeGuest(guest)), backend=loop, backend_options=options)
    assert outcome.output == 42


def modules(extras: set[str]) -> str:
    """Every module, and of what is missing only what may be."""
    count, missing = 0, set()
    for found in pkgutil.walk_packages(vmibridge.__path__, "vmibridge.", onerror=lambda _: None):
        if found.name.endswith("__main__"):
            continue
        try:
            importlib.import_module(found.name)
            count += 1
        except ImportError as error:
            needed = {
                extra
                for module, extra in NEEDS.items()
                if f"{found.name}.".startswith(f"{module}.")
            }
            if isinstance(error, MissingExtraError):
                needed.add(error.extra)
            lacking = needed - extras
            if not lacking:
                raise AssertionError(f"{found.name} cannot be imported") from error
            missing |= lacking
    return f"{count} modules, without {', '.join(sorted(missing)) or 'nothing'}"


def command(*arguments: str) -> str:
    """What the command prints; it has to succeed."""
    program = Path(sys.executable).with_name("vmibridge")
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
    return done.stdout


def core() -> None:
    outcome = anyio.run(drive, Double(), ASKED)
    assert outcome.output == 42
    served("asyncio")
    # Without the extra cli there is the command all the same: it tells what is missing.
    assert distribution("vmibridge").version == vmibridge.__version__


def cli() -> None:
    assert vmibridge.__version__ in command("--version")
    assert "Usage" in command("--help")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "double.py")
        file.write_text(
            "from vmibridge import BridgeHandler\n"
            "class Twice(BridgeHandler[int]):\n"
            "    REQUEST = 7\n"
            "    async def handle(self, vmi, packet): return None\n"
        )
        assert "twice" in command("handlers", "list", str(file))


def trio() -> None:
    served("trio")


def uvloop() -> None:
    served("asyncio", use_uvloop=True)


def unicorn() -> None:
    # mov ecx, MAGIC; mov edx, 0x10001; mov r8d, 21; vmcall; hlt
    code = bytes.fromhex("b9564d4942 ba01000100 41b815000000 0f01c1 f4")
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder, "guest.bin")
        image.write_bytes(code)
        opened = vmibridge.open_backend(f"unicorn:{image}")
        (outcome,) = anyio.run(serve, opened)
        assert outcome.output == 42


def gdb() -> None:
    from vmibridge.backends.qemu.gdb.sites import sites_of

    assert sites_of("qemu-gdb:unix:s", [], Path(os.environ["ELF"]), ["site"]) == [0x40_0000]


class OneFile(BaseHTTPRequestHandler):
    """Serves three bytes."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "3")
        self.end_headers()
        self.wfile.write(b"abc")

    def log_message(self, *_: object) -> None:
        """Quiet."""


def fetch() -> None:
    from vmibridge.config import Config, load_handlers

    with ThreadingHTTPServer(("127.0.0.1", 0), OneFile) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/a"
        config = Config("", f'[handlers.fetch]\nallow = ["{url}"]\n')
        (handler,) = load_handlers(["vmibridge.handlers.fetch"], config)
        asked = BridgePacket(MAGIC, handler.REQUEST, 1, 0x1000)
        outcome = anyio.run(drive, handler, asked, {0x1000: url.encode() + b"\0"})
        server.shutdown()
    assert outcome.response is not None
    assert outcome.response.value2 == 1


class Yes(BaseHTTPRequestHandler):
    """Lets all commands run."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"verdict": "continue"}')

    def log_message(self, *_: object) -> None:
        """Quiet."""


def exec_gate() -> None:
    from vmibridge.config import Config, load_handlers

    with ThreadingHTTPServer(("127.0.0.1", 0), Yes) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/"
        config = Config("", f'[handlers.exec_gate]\nwebhook = "{url}"\n')
        (handler,) = load_handlers(["vmibridge.handlers.exec_gate"], config)
        asked = BridgePacket(MAGIC, handler.REQUEST, 1, 0x1000)
        outcome = anyio.run(drive, handler, asked, {0x1000: b"ls\0"})
        server.shutdown()
    assert outcome.response is not None
    assert outcome.response.value1 == 0


def kv() -> None:
    from vmibridge.config import load_handlers

    (handler,) = load_handlers(["vmibridge.handlers.kv"])
    asked = BridgePacket(MAGIC, handler.REQUEST, 2, 0x1000, 0x1000, 4)
    outcome = anyio.run(drive, handler, asked, {0x1000: b"name\0"})
    assert outcome.output == 1


async def record(file: Path) -> None:
    from vmibridge.recording import Recorder

    async with Recorder(file) as recorder:
        await serve(FakeGuest(guest), taps=[recorder])


def recorded(folder: str) -> Path:
    file = Path(folder, "run.mcap")
    anyio.run(record, file)
    return file


def recording() -> None:
    from vmibridge.recording import RecordingReader, Replay, recorded_traps

    with tempfile.TemporaryDirectory() as folder:
        file = recorded(folder)
        with RecordingReader(file) as reader:
            (trap,) = recorded_traps(reader.messages())
        assert trap.reply is not None
        replay = Replay(file, Double)
        replay.begin()
        assert (replay.play().compared, replay.difference) == (1, None)
        replay.end()


def exported(name: str) -> None:
    from vmibridge.recording import RecordingReader
    from vmibridge.recording.export import Export
    from vmibridge.recording.selection import Selection

    with tempfile.TemporaryDirectory() as folder:
        file = recorded(folder)
        with RecordingReader(file) as reader:
            export = Export(reader, name, file.with_suffix(f".{name}"), Selection())
            assert len(list(export.write())) == 1
        assert all(target.stat().st_size for target in export.targets)


async def over_nats(url: str) -> None:
    from vmibridge.transport import Agent, AgentServer

    async with anyio.create_task_group() as tasks:
        server = AgentServer([url], lambda _: Bridge(Double()))
        tasks.start_soon(server.run)
        async with FakeGuest(guest) as backend:
            await Agent(backend, url).run()
        server.stop()


def nats() -> None:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        port = made.getsockname()[1]
    program = [os.environ["NATS_SERVER"], "-a", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(program, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert any("Server is ready" in line for line in server.stderr)
            anyio.run(over_nats, f"nats://127.0.0.1:{port}")
        finally:
            server.kill()


THINGS: dict[str, Callable[[], None]] = {
    "cli": cli,
    "trio": trio,
    "uvloop": uvloop,
    "unicorn": unicorn,
    "gdb": gdb,
    "exec_gate": exec_gate,
    "fetch": fetch,
    "kv": kv,
    "recording": recording,
    "parquet": lambda: exported("parquet"),
    "perfetto": lambda: exported("perfetto"),
    "nats": nats,
}


def main() -> None:
    asked = sys.argv[1:]
    extras = set(asked) | ({"recording"} if {"parquet", "perfetto"} & set(asked) else set())
    print(modules(extras))
    core()
    print("core: done")
    for extra in asked:
        THINGS[extra]()
        print(f"{extra}: done")


if __name__ == "__main__":
    main()

"""What the tests on NATS have in common: a NATS server on loopback, guests, handlers."""

import os
import socket
import subprocess
import sys
import time
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import anyio
import pytest
from children import Child
from patience import HUNG
from remote_parts import AT, Adds, carry

from vmibridge import BridgePacket, BridgeResponse, method
from vmibridge.bridge.contract import STANDARD_MAGIC
from vmibridge.errors import BackendError
from vmibridge.testing import FakeGuest
from vmibridge.transport import AgentServer

BINARY = Path(sys.executable).with_name("nats-server")

# nats-py is for asyncio; that trio says so is in test_nats_urls.
ON_ASYNCIO = [
    pytest.mark.anyio,
    pytest.mark.parametrize(
        "anyio_backend",
        [
            pytest.param(("asyncio", {"use_uvloop": False}), id="asyncio"),
            pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
        ],
    ),
]


PASSWORDS = """
    authorization { users = [
        { user: web, password: "s3cret-w" }
        { user: host, password: "s3cret-h" }
    ] }
"""


class NatsServer:
    """A process of its own; `config` is more of its configuration file."""

    def __init__(self, folder, config=""):
        with socket.socket() as made:
            made.bind(("127.0.0.1", 0))
            self.port = made.getsockname()[1]
        self.url = f"nats://127.0.0.1:{self.port}"
        self._file = folder / f"nats-{self.port}.conf"
        self._process = None
        self.configure(config)

    def configure(self, config):
        """From the next start on."""
        self._file.write_text(f'listen: "127.0.0.1:{self.port}"\n{config}\n')

    def start(self):
        self._process = Child([BINARY, "-c", self._file], seconds=300, stdout=subprocess.DEVNULL)
        for line in self._process.stderr:
            if "Server is ready" in line:
                # What it prints from here on fits into the pipe.
                return
        raise AssertionError(self._process.told())

    def stop(self):
        if self._process is not None:
            self._process.end()
            self._process = None


@contextmanager
def nats_server(folder, config=""):
    server = NatsServer(folder, config)
    try:
        server.start()
        yield server
    finally:
        server.stop()


@asynccontextmanager
async def plain_client(url, **options):
    """Somebody else on this NATS."""
    import nats

    client = await nats.connect(url, **options)
    try:
        yield client
    finally:
        await client.close()


async def settle(client):
    """Wait until NATS has taken what a plain client said."""
    # The ping of a flush overtakes what nats-py has not written yet: so twice.
    for _ in range(2):
        await client.flush()


async def fail(url):
    """Why an agent and a server do not come up; each in one error, at once."""
    said = []
    with anyio.fail_after(HUNG):
        for attempt in (carry(Guest(1, 1), url), AgentServer([url], lambda _: Work()).run()):
            with pytest.raises(BackendError) as raised:
                await attempt
            said.append(str(raised.value))
            assert "s3cret" not in f"{raised.value!r} {raised.value.__cause__!r}"
    assert all("\n" not in each for each in said)
    return said


class Work(Adds):
    """And waits, or does not come to an end, for as long as a test wants."""

    def __init__(self):
        super().__init__()
        self.cancelled = 0
        self.go_on = anyio.Event()

    @method(4)
    async def invert(self, vmi, packet):
        data = await vmi.memory.read(packet.value1, packet.value2)
        await vmi.memory.write(packet.value1, data.translate(bytes(range(255, -1, -1))))
        return BridgeResponse(value1=1)

    @method(5)
    async def hold(self, vmi, packet):
        self.asked.append(vmi.event.seq)
        try:
            await self.go_on.wait()
        except BaseException:
            self.cancelled += 1
            raise
        return BridgeResponse(value1=packet.value1 + 1)


def ask(code, value=0, value2=0):
    return BridgePacket(STANDARD_MAGIC, 0x0100, code, value, value2)


class Guest(FakeGuest):
    """Each vCPU asks `each` times by the methods `codes`, and checks the answer."""

    def __init__(self, vcpus, each, codes=(1, 1, 2, 1, 3), vm="web"):
        super().__init__(self._run, memory={AT: bytes(8 * vcpus)}, vm=vm)
        self._vcpus, self._each, self._codes = vcpus, each, codes
        self.resumed = []
        self.wrong = []

    async def resume(self, event, writes):
        self.resumed.append(event.seq)
        await super().resume(event, writes)

    async def _run(self, _):
        async with anyio.create_task_group() as vcpus:
            for number in range(self._vcpus):
                vcpus.start_soon(self._vcpu, number)

    async def _vcpu(self, number):
        for value in range(self._each):
            code = self._codes[value % len(self._codes)]
            answer = await self.call(ask(code, value), vcpu=number)
            if answer.rax != value + 1:
                self.wrong.append((number, value, answer))

    def counted(self, vcpu):
        """How often `add_in_memory` has counted, and how often it was asked to."""
        asked = sum(self._codes[value % len(self._codes)] == 3 for value in range(self._each))
        return int.from_bytes(self.memory.read(AT + 8 * vcpu, 8), "little"), asked


# For processes of their own: each run of the handler is a line in a file.
HANDLER = """
import os
from vmibridge import BridgeHandler, BridgeResponse, method

class Adds(BridgeHandler[None]):
    '''Adds one.'''
    MAGIC = 0x42494D56
    REQUEST = 0x0100

    async def __aenter__(self):
        self.file = os.open(os.environ["RUNS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        return self

    async def __aexit__(self, *_):
        os.close(self.file)

    @method(1)
    async def add(self, vmi, packet):
        '''Adds one.'''
        os.write(self.file, f"{os.getpid()} {vmi.event.seq}\\n".encode())
        return BridgeResponse(value1=packet.value1 + 1)

    @method(2)
    async def add_later(self, vmi, packet):
        '''Adds one.'''
        import anyio
        os.write(self.file, f"{os.getpid()} {vmi.event.seq}\\n".encode())
        await anyio.sleep(0.001)
        return BridgeResponse(value1=packet.value1 + 1)
"""


def _unmeasured():
    """Coverage in a server whose handlers wait makes its loop fail (Python 3.11)."""
    return {name: value for name, value in os.environ.items() if "COVERAGE_" not in name}


class ServeProcess:
    """`vmibridge serve`, of which the test knows what its handlers have run."""

    def __init__(self, folder, url, *options):
        self.runs = folder / "runs"
        handlers = folder / "adds.py"
        if not handlers.exists():
            handlers.write_text(HANDLER)
        command = ("-m", "vmibridge", "serve", "--listen", url, "--handlers", handlers, "--json")
        number = len(list(folder.iterdir()))
        self._told = folder / f"told-{number}"
        # Files: nobody reads a pipe while the guest runs.
        with self._told.open("wb") as told, (folder / f"outcomes-{number}").open("wb") as outcomes:
            self.process = Child(
                [sys.executable, *command, *options],
                seconds=300,
                cwd=folder,
                stdout=outcomes,
                stderr=told,
                env={**_unmeasured(), "RUNS": str(self.runs)},
            )

    def wait_until_it_listens(self):
        while "listening at" not in self._told.read_text():
            assert self.process.poll() is None, self._told.read_text()
            time.sleep(0.01)

    def ran(self):
        """The traps that its handlers were asked for."""
        lines = self.runs.read_text().splitlines() if self.runs.exists() else []
        pairs = [line.split() for line in lines]
        return [int(seq) for pid, seq in pairs if int(pid) == self.process.pid]


@contextmanager
def serve_processes(folder, url, count, *options):
    processes = []
    try:
        processes += [ServeProcess(folder, url, *options) for _ in range(count)]
        for each in processes:
            each.wait_until_it_listens()
        yield processes
    finally:
        for each in processes:
            each.process.end()

"""What the tests of the remote transport have in common: servers, agents, and a proxy."""

import socket
from contextlib import asynccontextmanager, suppress
from typing import NamedTuple

import anyio
from base_handlers import EchoHandler
from patience import HUNG

from vmibridge import BridgeHandler, BridgeResponse, method
from vmibridge.bridge.contract import STANDARD_MAGIC
from vmibridge.errors import ConnectionLostError
from vmibridge.transport import Agent, AgentServer
from vmibridge.transport.handshake import VERSION, WORD
from vmibridge.transport.sockets.connection import Connection
from vmibridge.transport.sockets.endpoints import connect, listen
from vmibridge.transport.urls import parse_url
from vmibridge.transport.wire import FROM_SERVER, MEMORY_LIMIT, Hello, Welcome, trap_frame
from vmibridge.vm.trap import Registers, TrapEvent, TrapReason

REQUEST = 0x0100


class Echo(EchoHandler):
    """What the guests of `calls.asm` expect; counts what it was asked."""

    def __init__(self):
        self.asked = []

    @method(1)
    async def invert(self, vmi, packet):
        self.asked.append(packet.value1)
        return await super().invert(vmi, packet)


class Steps(BridgeHandler[str]):
    """Waits for what a test does; says where it is."""

    MAGIC = STANDARD_MAGIC
    REQUEST = 0x0100

    def __init__(self):
        self.began = anyio.Event()
        self.go_on = anyio.Event()
        self.cancelled = anyio.Event()
        self.runs = 0

    @method(1)
    async def linger(self, vmi, packet):
        self.runs += 1
        self.began.set()
        try:
            await self.go_on.wait()
        except anyio.get_cancelled_exc_class():
            self.cancelled.set()
            raise
        return BridgeResponse(value1=7)

    @method(2)
    async def read(self, vmi, packet):
        self.began.set()
        return BridgeResponse(value1=len(await vmi.memory.read(packet.value1, 4)))

    @method(3)
    async def write(self, vmi, packet):
        await vmi.memory.write(packet.value1, b"abcd")
        return BridgeResponse(value1=len(await vmi.memory.read(packet.value1, 4)))

    @method(4)
    async def read_much(self, vmi, packet):
        data = await vmi.memory.read(packet.value1, 2 << 20)
        return BridgeResponse(value1=len(data))


class Versioned(Steps):
    """Tells which it is, too."""

    may_wait = True

    def __init__(self, value):
        super().__init__()
        self.value = value

    @method(5)
    async def tell(self, vmi, packet):
        return BridgeResponse(value1=self.value)


def trap(seq, vcpu=0, value=0, code=1, magic=STANDARD_MAGIC, **fields):
    registers = Registers(rcx=magic, rdx=REQUEST | code << 16, r8=value)
    return TrapEvent(seq, TrapReason.VMCALL, registers, "vm", vcpu, ip=0x1000, length=3, **fields)


def frame_of(event, left=5000, **options):
    return trap_frame(event, left, **options)


@asynccontextmanager
async def serving(server):
    """`server` runs for the time of the block; then it is stopped, and has ended."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(server.run)
        await server.listening.wait()
        yield server
        server.stop(now=True)


@asynccontextmanager
async def served(url, *handlers, **options):
    """An `AgentServer` with these handlers for whoever comes."""
    from vmibridge import Bridge

    async with serving(AgentServer([url], lambda _: Bridge(*handlers), **options)) as server:
        yield server


async def carry(backend, url, **options):
    """Run the guest of a backend by an agent; the agent, and how the guest ended."""
    async with backend:
        agent = Agent(backend, url, **options)
        return agent, await agent.run()


class FakeAgent:
    """The end of an agent, which sends what it is told to."""

    def __init__(self, connection):
        self.connection = connection
        self.post = connection.post
        self.frames = []

    @classmethod
    @asynccontextmanager
    async def connected(cls, url):
        connection = Connection(await connect(parse_url(url)), FROM_SERVER)
        try:
            yield cls(connection)
        finally:
            connection.close()

    async def next(self):
        with anyio.fail_after(HUNG):
            if not self.frames:
                self.frames += await self.connection.receive()
        return self.frames.pop(0)

    async def hello(self, session=b"s" * 16, vm="vm", **fields):
        self.post(Hello(**{
            "word": WORD, "version": VERSION, "oldest": VERSION, "session": session, "vm": vm,
            **fields,
        }))  # fmt: skip
        welcome = await self.next()
        self.connection.reader.limit = MEMORY_LIMIT
        return welcome

    async def is_hung_up_on(self):
        with anyio.fail_after(HUNG):
            try:
                while True:
                    self.frames += await self.connection.receive()
            except ConnectionLostError:
                return True


@asynccontextmanager
async def talking_to(url, *handlers, **options):
    """A server, and an agent that is played and welcome."""
    async with served(url, *handlers, **options) as server, FakeAgent.connected(url) as agent:
        agent.welcome = await agent.hello()
        assert isinstance(agent.welcome, Welcome)
        yield server, agent


class Late(NamedTuple):
    """What becomes of a piece that comes late: the connection of the agent is closed, the server
    goes on. What the agent had sent goes on when so many pieces of later ones have passed."""

    after: int


class Proxy:
    """Between agents and a server, over unix sockets: it delays, cuts, half-closes and reorders.

    `fate` is called with each piece that passes. It returns `None`: all of it goes on; seconds,
    a float: so it does, after them; a number of bytes: those go on, and the connection is cut;
    or `Late`.
    """

    def __init__(self, path, target, fate=lambda _: None):
        self.path, self.target, self.fate = path, target, fate
        self.connections = 0
        self.cuts = 0
        self.reordered = 0
        """Connections of which the server saw the end when a later one was there."""
        self._late = []

    @asynccontextmanager
    async def running(self):
        listening = await listen(parse_url(f"unix:{self.path}"))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(listening.accept, lambda near: tasks.start_soon(self._serve, near))
            yield self
            tasks.cancel_scope.cancel()
        listening.close()
        for _, far, _ in self._late:
            far.close()

    async def _serve(self, near):
        self.connections += 1
        with near:
            try:
                far = await connect(parse_url(f"unix:{self.target}"))
            except OSError:
                return
            ended = None
            try:
                async with anyio.create_task_group() as tasks:

                    async def pass_on(source, sink):
                        nonlocal ended
                        fate, data = await self._pass_on(source, sink)
                        if ended is None:
                            ended = fate, data if sink is far else b""
                        tasks.cancel_scope.cancel()

                    tasks.start_soon(pass_on, near, far)
                    tasks.start_soon(pass_on, far, near)
            finally:
                fate, data = ended or (None, b"")
                if isinstance(fate, Late):
                    # Only now: nothing of this task waits for it any more.
                    self._late.append([fate.after, far, data])
                else:
                    far.close()

    async def _pass_on(self, source, sink):
        """Returns the fate that ended it, and what was not passed on."""
        try:
            while True:
                await anyio.wait_readable(source)
                data = source.recv(65536)
                if not data:
                    break
                fate = self.fate(data)
                if isinstance(fate, Late):
                    return fate, data
                if isinstance(fate, float):
                    await anyio.sleep(fate)
                    fate = None
                await _send(sink, data[:fate])
                await self._send_late()
                if fate is not None:
                    self.cuts += 1
                    if fate % 2:
                        # The other direction still works, until somebody notices.
                        sink.shutdown(socket.SHUT_WR)
                        await anyio.sleep(0.002)
                    break
        except OSError:
            pass
        return None, b""

    async def _send_late(self):
        """A piece has passed: those that waited for it follow."""
        for each in self._late:
            each[0] -= 1
        due = [each for each in self._late if each[0] < 0]
        self._late = [each for each in self._late if each[0] >= 0]
        for _, far, data in due:
            self.reordered += 1
            with far, suppress(OSError):
                # The server may have closed the connection.
                await _send(far, data)


async def _send(sink, data):
    while data:
        try:
            data = data[sink.send(data) :]
        except BlockingIOError:
            await anyio.wait_writable(sink)


class Certificates:
    """Files of certificates that an authority of the tests has made."""

    def __init__(self, folder):
        import trustme

        self._folder = folder
        self.authority = trustme.CA()
        self.ca = self._write("ca", [self.authority.cert_pem])

    def _write(self, name, blobs):
        path = self._folder / f"{name}.pem"
        path.write_bytes(b"".join(blob.bytes() for blob in blobs))
        return path

    def of(self, name, **options):
        """The options of a URL for an end with a certificate for `name`."""
        made = self.authority.issue_cert(name, **options)
        cert = self._write(f"{name}-{len(list(self._folder.iterdir()))}", made.cert_chain_pems)
        key = self._write(f"{name}-key-{len(list(self._folder.iterdir()))}", [made.private_key_pem])
        return f"cert={cert}&key={key}&ca={self.ca}"


AT = 0x5000
"""Where each vCPU has a counter in guest memory, of 8 bytes."""


class Adds(BridgeHandler[None]):
    """Adds one; keeps who asked."""

    MAGIC = STANDARD_MAGIC
    REQUEST = 0x0100

    def __init__(self):
        self.asked = []

    @method(1)
    async def add(self, vmi, packet):
        self.asked.append(vmi.event.seq)
        return BridgeResponse(value1=packet.value1 + 1)

    @method(2)
    async def add_later(self, vmi, packet):
        self.asked.append(vmi.event.seq)
        await anyio.sleep(0.001)
        return BridgeResponse(value1=packet.value1 + 1)

    @method(3)
    async def add_in_memory(self, vmi, packet):
        """Each vCPU has a counter in memory, which a write that is done twice would spoil."""
        self.asked.append(vmi.event.seq)
        at = AT + 8 * vmi.vcpu
        count = int.from_bytes(await vmi.memory.read(at, 8), "little")
        await vmi.memory.write(at, (count + 1).to_bytes(8, "little"))
        return BridgeResponse(value1=packet.value1 + 1)

"""What the tests of the remote transport have in common: servers, agents, and a proxy."""

import socket
from contextlib import asynccontextmanager

import anyio

from vmibridge import BridgeHandler, BridgeResponse, method
from vmibridge.contract import STANDARD_MAGIC, STANDARD_VERIFY_VALUE3, STANDARD_VERIFY_VALUE4
from vmibridge.event import Registers, TrapEvent, TrapReason
from vmibridge.transport import Agent, AgentServer
from vmibridge.transport.connection import Connection, ConnectionLostError
from vmibridge.transport.sockets import connect, listen
from vmibridge.transport.urls import parse_url
from vmibridge.transport.wire import FROM_SERVER, MEMORY_LIMIT, VERSION, WORD, Hello, trap_frame

REQUEST = 0x0100


class Echo(BridgeHandler[int]):
    """What the guests of `calls.asm` expect; counts what it was asked."""

    MAGIC = STANDARD_MAGIC
    REQUEST = REQUEST
    VERIFY_VALUE3 = STANDARD_VERIFY_VALUE3
    VERIFY_VALUE4 = STANDARD_VERIFY_VALUE4

    def __init__(self):
        self.asked = []

    @method(1)
    async def invert(self, vmi, packet):
        self.asked.append(packet.value1)
        mask = (1 << 64) - 1
        total = packet.value2 + packet.value3 + packet.value4 & mask
        return BridgeResponse(value1=~packet.value1 & mask, value2=total)

    @method(2)
    async def reverse(self, vmi, packet):
        data = await vmi.memory.read(packet.value1, packet.value3 or 8)
        await vmi.memory.write(packet.value2, data[::-1])
        return BridgeResponse()


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
        with anyio.fail_after(10):
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
        with anyio.fail_after(10):
            try:
                while True:
                    self.frames += await self.connection.receive()
            except ConnectionLostError:
                return True


class Proxy:
    """Between agents and a server, over unix sockets: it delays, cuts and half-closes.

    `fate` is called with each piece that passes: it returns how many bytes of it go on, or
    `None` for all, after which the connection is cut if it said a number.
    """

    def __init__(self, path, target, fate=lambda _: None):
        self.path, self.target, self.fate = path, target, fate
        self.connections = 0
        self.cuts = 0

    @asynccontextmanager
    async def running(self):
        listening = await listen(parse_url(f"unix:{self.path}"))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(listening.serve, lambda near: tasks.start_soon(self._serve, near))
            yield self
            tasks.cancel_scope.cancel()
        listening.close()

    async def _serve(self, near):
        self.connections += 1
        with near:
            try:
                far = await connect(parse_url(f"unix:{self.target}"))
            except OSError:
                return
            with far:
                async with anyio.create_task_group() as tasks:
                    for source, sink in ((near, far), (far, near)):
                        tasks.start_soon(self._pass_on, source, sink, tasks.cancel_scope)

    async def _pass_on(self, source, sink, scope):
        try:
            while True:
                await anyio.wait_readable(source)
                data = source.recv(65536)
                if not data:
                    break
                fate = self.fate(data)
                if isinstance(fate, float):
                    await anyio.sleep(fate)
                    fate = None
                await _send(sink, data[:fate])
                if fate is not None:
                    self.cuts += 1
                    if fate % 2:
                        # The other direction still works, until somebody notices.
                        sink.shutdown(socket.SHUT_WR)
                        await anyio.sleep(0.002)
                    break
        except OSError:
            pass
        scope.cancel()


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

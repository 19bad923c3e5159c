"""A gdbstub that says what a test tells it, with guest and handlers for the tests of its client."""

import struct
from contextlib import asynccontextmanager, suppress

import anyio
import pytest
from patience import HUNG

from vmibridge import Bridge, BridgeHandler, BridgeResponse, BridgeServer, GuestMemoryError
from vmibridge.backends import open_backend
from vmibridge.backends.qemu.gdb.packets import PacketReader, encode
from vmibridge.errors import BackendError

MAGIC, SITE, HANDLER, STACK, DATA = 0x1234_5678, 0x40_1000, 0x50_0000, 0x60_0000, 0x7000
ADD, WAIT, COPY, FILL = 1, 2, 3, 4
VMCALL = b"\x0f\x01\xc1" + b"\x90" * 12
LONG_MODE = {"cr0": 0x8000_0011, "cr4": 0x20, "efer": 0x500}
NAMES = [
    *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp"),
    *(f"r{number}" for number in range(8, 16)),
]
HANG_UP = object()


def packet_of(registers):
    general = [registers.get(name, 0) for name in NAMES]
    head = struct.pack("<17Q", *general, registers["rip"])
    segments = struct.pack("<7I", 0x202, registers.get("cs", 8), 16, 0, 0, 0, 0)
    control = [registers.get(name, 0) for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "efer")]
    return head + segments + bytes(24) + struct.pack("<6Q", *control) + bytes(372)


class Connection:
    """A stream whose bytes go out as they are sent; one of anyio's may wake up twice on uvloop."""

    def __init__(self, stream):
        self.stream = stream
        self.socket = stream.extra(anyio.abc.SocketAttribute.raw_socket)
        self.aclose = stream.aclose

    async def receive(self):
        await anyio.wait_readable(self.socket)
        data = self.socket.recv(1 << 16)
        if not data:
            raise anyio.EndOfStream
        return data

    async def send(self, data):
        while data:
            try:
                data = data[self.socket.send(data) :]
            except BlockingIOError:
                await anyio.wait_writable(self.socket)


class FakeStub:
    """A QEMU's gdbstub with one or more vCPUs, which stops when it is told to."""

    def __init__(self, path):
        self.path = str(path)
        self.said = []
        """The commands, without the probes."""
        self.memory = {SITE: VMCALL, DATA: b"abcd"}
        self.unmapped = {0x9000}
        self.registers = packet_of({"rip": SITE, **LONG_MODE})
        self.threads = b"mp01.01,p01.02"
        self.replies = {}
        self.texts = {"info mtree -f": "", "info kvm": "kvm support: disabled\r\n"}
        self.running = anyio.Event()
        self.written = None
        self.drops = False
        self.idle_steps = 0
        """How many steps run nothing, which QEMU reports all the same."""
        self.before_reply = None
        """Awaited with each command before its reply, and with a `\\x03`, where a test sets it."""
        self.packets = PacketReader()

    async def serve(self, *, task_status):
        listener = await anyio.create_unix_listener(self.path)
        async with listener:
            task_status.started()
            async with await listener.accept() as stream:
                self.stream = Connection(stream)
                with suppress(anyio.EndOfStream, anyio.ClosedResourceError, OSError, ValueError):
                    while True:
                        await self.take(await self.stream.receive())

    async def take(self, data):
        if b"\x03" in data and self.before_reply is not None:
            await self.before_reply(b"\x03")
        self.packets.feed(data.replace(b"\x03", b""))
        while (packet := self.packets.next()) is not None:
            if self.drops:
                # As QEMU does with what comes while the VM runs.
                self.drops = False
                continue
            if packet != b"qC":
                self.said.append(packet)
            await self.stream.send(b"+")
            if self.before_reply is not None:
                await self.before_reply(packet)
            for reply in self.reply(packet):
                if reply is HANG_UP:
                    await self.stream.aclose()
                    return
                await self.stream.send(reply if reply[:1] == b"!" else encode(reply))

    def reply(self, packet):
        for begin, reply in self.replies.items():
            if packet.startswith(begin):
                return reply if isinstance(reply, list) else [reply]
        if packet == b"c":
            self.running.set()
            return []
        if packet.startswith(b"vCont;s"):
            if self.idle_steps:
                self.idle_steps -= 1
            else:
                self.run_instruction()
            return [b"T05thread:p01.01;"]
        if packet.startswith(b"G"):
            self.written = bytes.fromhex(packet[1:].decode())
        if packet.startswith(b"qRcmd,"):
            text = self.texts.get(bytes.fromhex(packet[6:].decode()).decode(), "")
            half = len(text) // 2
            parts = [part for part in (text[:half], text[half:]) if part]
            return [*(b"O" + part.encode().hex().encode() for part in parts), b"OK"]
        if packet.startswith(b"m"):
            at, size = (int(part, 16) for part in packet[1:].split(b","))
            return [self.read(at, size)]
        if packet.startswith(b"M"):
            place, _, data = packet[1:].partition(b":")
            self.write(int(place.split(b",")[0], 16), bytes.fromhex(data.decode()))
        known = {
            b"qSupported": b"PacketSize=1000;vContSupported+",
            b"?": b"T05thread:p01.01;",
            b"qC": b"QCp01.01",
            b"qfThreadInfo": self.threads,
            b"qsThreadInfo": b"l",
            b"g": self.registers.hex().encode(),
        }
        for begin, answer in known.items():
            if packet.startswith(begin):
                return [answer]
        return [b"OK"]

    def run_instruction(self):
        """As a step does: the trap that the vCPU is at lies behind it."""
        (rip,) = struct.unpack_from("<Q", self.registers, 128)
        self.registers = self.registers[:128] + struct.pack("<Q", rip + 3) + self.registers[136:]

    def write(self, at, data):
        for start, before in self.memory.items():
            if start <= at < start + len(before):
                offset = at - start
                self.memory[start] = before[:offset] + data + before[offset + len(data) :]
                return
        self.memory[at] = data

    def read(self, at, size):
        if at in self.unmapped or at >= 1 << 51:
            return b"E14"
        found = bytearray(size)
        for start, data in self.memory.items():
            for index, byte in enumerate(data, start - at):
                if 0 <= index < size:
                    found[index] = byte
        return found.hex().encode()

    async def stop(self, reply=b"T05thread:p01.01;", **registers):
        """The VM runs; it stops at the site, and so on."""
        await self.runs()
        self.running = anyio.Event()
        if registers:
            self.registers = packet_of({**LONG_MODE, "rip": SITE, **registers})
        await self.stream.send(reply if reply[:1] == b"!" else encode(reply))

    async def call(self, code, value=0, thread=1, **registers):
        what = {"rcx": MAGIC, "rdx": 1 | code << 16, "r8": value, **registers}
        await self.stop(b"T05thread:p01.%02x;" % thread, **what)

    async def runs(self):
        await self.running.wait()

    @property
    def answer(self):
        """RAX, RBX and RIP as they were written last."""
        return (
            *struct.unpack_from("<2Q", self.written),
            *struct.unpack_from("<Q", self.written, 128),
        )


class Work(BridgeHandler[None]):
    MAGIC, REQUEST = MAGIC, 1

    def __init__(self):
        self.begun, self.end = anyio.Event(), anyio.Event()
        self.where, self.errors = [], []
        self.size = 1

    async def handle(self, vmi, packet):
        self.where.append((vmi.vcpu, vmi.event.ip, vmi.event.width, vmi.event.ring))
        try:
            if packet.method == WAIT:
                self.begun.set()
                await self.end.wait()
            elif packet.method == COPY:
                data = await vmi.memory.read_physical(packet.value1, 4)
                await vmi.memory.write_physical(packet.value1 + 4, data.upper())
            elif packet.method == FILL:
                await vmi.memory.write_physical(packet.value1, bytes(self.size))
        except GuestMemoryError as error:
            self.errors.append((error.address, error.reason))
        return BridgeResponse(packet.value1 + 1, len(self.errors))


class Stage:
    """A server that runs in a block, which plays the guest."""

    def __init__(self, path):
        self.stub, self.work = FakeStub(path), Work()
        self.options = f"site={SITE:#x}"

    @asynccontextmanager
    async def playing(self):
        with anyio.fail_after(HUNG):
            async with anyio.create_task_group() as outside:
                await outside.start(self.stub.serve)
                yield self.stub
                outside.cancel_scope.cancel()

    @asynccontextmanager
    async def serving(self):
        async with self.backend() as self.opened, anyio.create_task_group() as tasks:
            self.server = BridgeServer(self.opened, Bridge(self.work), timeout=60)
            tasks.start_soon(self.consume)
            yield

    @asynccontextmanager
    async def run(self):
        async with self.playing() as stub, self.serving():
            yield stub
        self.ends = [(end.vcpu, end.reason) for end in self.server.summary.guest.vcpus]
        self.details = {end.detail for end in self.server.summary.guest.vcpus}

    async def consume(self):
        self.outcomes = [outcome.kind.value async for outcome in self.server.run()]

    async def fails_to_open(self, match):
        async with self.playing():
            with pytest.raises(BackendError, match=match):
                await self.backend().__aenter__()

    def backend(self):
        return open_backend(f"qemu-gdb:unix:{self.stub.path}?{self.options}")


HALTED = [(0, "halted"), (1, "halted")]

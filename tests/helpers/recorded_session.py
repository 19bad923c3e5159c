"""Recordings to look at: one of a server with two VMs, and files written message by message."""

from contextlib import suppress

import anyio

from vmibridge import (
    Bridge,
    BridgeHandler,
    BridgePacket,
    BridgeResponse,
    BridgeServer,
    Gate,
    method,
)
from vmibridge.bridge.outcome import OutcomeKind
from vmibridge.errors import OutsideError
from vmibridge.recording.file.chunk_builder import ChunkBuilder
from vmibridge.recording.file.writer import RecordingWriter
from vmibridge.recording.messages import (
    CHANNELS,
    RecordedHandler,
    RecordedMethod,
    Reply,
    Session,
)
from vmibridge.recording.recorder import Recorder
from vmibridge.testing import FakeGuest
from vmibridge.vm.trap import Registers, TrapEvent, TrapReason

MAGIC = 0xFEDC_BA98
MAX_U64 = (1 << 64) - 1
STEER = "\u202egnp.exe\x9b2J"
"""What a guest may put into a text: JSON leaves these characters as they are."""
MEMORY = {0x2000: b"\0\1\2\3" * 8, 0x3000: bytes(16)}
MISSING = 0xFFFF_FFFF_FFFF_F000

ADD, COPY, FAIL, MISS, SLOW, GIVE_UP, STRANGE = (
    BridgePacket(MAGIC, 1, 1, MAX_U64, 1, MAX_U64 - 1, 1 << 63),
    BridgePacket(MAGIC, 1, 2, 0x2000, 0x3000),
    BridgePacket(MAGIC, 1, 3),
    BridgePacket(MAGIC, 1, 4, MISSING),
    BridgePacket(MAGIC, 1, 5, 7),
    BridgePacket(MAGIC, 1, 6),
    BridgePacket(MAGIC, 0x7777, 1),
)


class Probe(BridgeHandler[object]):
    """Does one of each kind."""

    MAGIC = MAGIC
    REQUEST = 1

    def __init__(self, go_on):
        self.go_on = go_on

    async def look_around(self, vmi):
        """What `Outer` gets from outside."""

    @method(1)
    async def add(self, vmi, packet):
        await self.look_around(vmi)
        return BridgeResponse(packet.value1, packet.value2 + 1).with_output({"said": STEER})

    @method(2)
    async def copy(self, vmi, packet):
        for place in range(4):
            data = await vmi.memory.read_physical(packet.value1 + place * 4, 4)
        await vmi.memory.write_physical(packet.value2, data[::-1])
        return BridgeResponse()

    @method(3)
    async def fail(self, vmi, packet):
        raise RuntimeError(STEER)

    @method(4)
    async def miss(self, vmi, packet):
        await vmi.memory.read_physical(packet.value1, 8)

    @method(5, soft_timeout=0.02)
    async def slow(self, vmi, packet):
        await self.go_on.wait()
        return BridgeResponse(value1=packet.value1)

    @method(6)
    async def give_up(self, vmi, packet):
        return None


class Outer(Probe):
    """Gets things from outside: a value at once and one later, a failure, and nothing in time."""

    name = "probe"

    async def look_around(self, vmi):
        async def later():
            await anyio.sleep(0.001)
            return [STEER, MAX_U64, b"\0", {"a": None}, 0.5]

        async def fail():
            raise ConnectionResetError(STEER)

        for function in (self.number, self.number, later, fail):
            with suppress(OutsideError):
                await vmi.outside(function.__name__, function)
        with anyio.move_on_after(0.001):
            await vmi.outside("never", anyio.sleep_forever)

    async def number(self):
        return 5


async def _record(path, kind):
    releases = {"red": anyio.Event(), "blue": anyio.Event()}

    async def vcpu(vm, number, packets):
        for packet in packets:
            while (await vm.call(packet, vcpu=number, address_space=0x7000)).rax == Gate.WAIT:
                releases[vm.vm].set()

    async def red(vm):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(vcpu, vm, 0, [ADD, SLOW, COPY, FAIL])
            tasks.start_soon(vcpu, vm, 1, [COPY, ADD, STRANGE, GIVE_UP] * 3)

    async def blue(vm):
        await vcpu(vm, 0, [MISS, SLOW, ADD])

    async with (
        Recorder(path) as recorder,
        FakeGuest(red, vm="red", memory=MEMORY) as first,
        FakeGuest(blue, vm="blue", memory=MEMORY) as second,
    ):
        server = BridgeServer(
            [first, second], lambda vm: Bridge(kind(releases[vm])), taps=[recorder]
        )
        return [outcome async for outcome in server.run()]


def record(path, kind=Probe):
    """Record a server with the VMs `red`, of two vCPUs, and `blue`; returns the outcomes."""
    return anyio.run(_record, path, kind)


def write_file(path, *chunks, library="tests"):
    """A recording of these chunks, which are lists of (time, message), by that library."""
    channels = {channel.kind: channel.id for channel in CHANNELS}
    writer = RecordingWriter(path, library)
    for messages in chunks:
        chunk = ChunkBuilder()
        for time, message in messages:
            chunk.add(channels[type(message)], time, message)
        writer.add(chunk.pack())
    writer.finish()
    return path


def session(vm="vm"):
    methods = (RecordedMethod(1, "first"), RecordedMethod(2, "second"))
    return Session(vm, handlers=(RecordedHandler("probe", "x.Probe", 1, MAGIC, methods=methods),))


def trap(seq, *, vm="vm", vcpu=0, value=0, request=1, method=1):
    registers = Registers(rcx=MAGIC, rdx=request | method << 16, r8=value)
    return TrapEvent(seq, TrapReason.VMCALL, registers, vm, vcpu, ip=0x1000, length=3)


def reply(seq, kind=OutcomeKind.HANDLED, **fields):
    packet = BridgePacket(MAGIC, 1, 1)
    fields = {"vm": "vm", "handler": "probe", **fields}
    return Reply(seq=seq, vcpu=0, kind=kind, packet=packet, **fields)

"""A guest whose traps are recorded, and how its recording is read."""

from functools import partial

import anyio
import pytest

from vmibridge import (
    Bridge,
    BridgeHandler,
    BridgePacket,
    BridgeResponse,
    BridgeServer,
    GuestMemoryError,
    method,
)
from vmibridge.engine.taps import Tap
from vmibridge.recording.file.reader import RecordingReader
from vmibridge.recording.messages import MemoryAccess, Note, Reply, Session
from vmibridge.recording.recorder import Recorder
from vmibridge.testing import FakeGuest
from vmibridge.vm.trap import TrapEvent

MAGIC = 0x1234_5678
SECRET = 0x5EC2_E7A1_B2C3_D4F6
SECRET_BYTES = SECRET.to_bytes(8, "little")
MEMORY = {0x2000: SECRET_BYTES, 0x3000: bytes(64)}
UNMAPPED = 0x9000


class Probe(BridgeHandler[object]):
    MAGIC = MAGIC
    REQUEST = 2
    VERIFY_VALUE4 = 0x5747
    name = "probe"

    @method(1)
    async def mirror(self, vmi, packet):
        return BridgeResponse(*packet.values[:3]).with_output({"values": packet.values})

    @method(2)
    async def copy(self, vmi, packet):
        data = await vmi.memory.read(0x2000, 8)
        await vmi.memory.write(0x3000, data)
        return BridgeResponse(packet.value1).with_output(data.hex())

    @method(3)
    async def fail(self, vmi, packet):
        raise RuntimeError(f"cannot do {packet.values}")

    @method(4)
    async def miss(self, vmi, packet):
        for access in (vmi.memory.read(UNMAPPED, 8), vmi.memory.write(UNMAPPED, SECRET_BYTES)):
            with pytest.raises(GuestMemoryError):
                await access

    @method(5, soft_timeout=0.005)
    async def slow(self, vmi, packet):
        first = vmi.event.seq
        while vmi.event.seq == first:  # until the guest has asked again
            await anyio.sleep(0.001)
        return BridgeResponse(len(await vmi.memory.read(0x2000, 8)))


class Other(Probe):
    REQUEST = 3
    name = "other"


def ask(code, *values, request=2, **more):
    return BridgePacket(MAGIC, request, code, *values, **more)


def calls(count):
    async def guest(vm):
        for number in range(count):
            await vm.call(ask(1, number))

    return guest


def kept(event, *access):
    return (event.seq, *access)


SHAPES = {
    "begin": lambda vm, *_: (vm,),
    "trap": lambda event: (event,),
    "retried": kept,
    "read": kept,
    "wrote": lambda event, address, data, error: kept(event, address, len(data), data, error),
    "answered": lambda outcome: kept(outcome.event, outcome.kind),
    "end": lambda vm, summary: (vm,),
}


class Told(Tap):
    """A tap that keeps what it is told."""

    def __init__(self):
        self.calls = []
        for name in SHAPES:
            setattr(self, name, partial(self._keep, name))

    def _keep(self, name, *told):
        self.calls.append((name, *SHAPES[name](*told)))

    def names(self):
        return [call[0] for call in self.calls]


def as_told(message):
    """A recorded message as `Told` keeps it."""
    match message:
        case Session(vm=vm):
            return ("begin", vm)
        case TrapEvent():
            return ("trap", message)
        case MemoryAccess():
            name = "wrote" if message.write else "read"
            return (
                name,
                *kept(message, message.address, message.size, message.data, message.error),
            )
        case Reply():
            return ("answered", message.seq, message.kind)
        case Note():
            retried = ("retried", message.seq, message.retry_of)
            return retried if message.kind == "retry" else (message.kind, message.vm)


async def serve(backends, *taps, bridge=None, **options):
    """Run to the end: the outcomes, and the server."""
    server = BridgeServer(backends, bridge or Bridge(Probe(), Other()), taps=taps, **options)
    return [outcome async for outcome in server.run()], server


async def record(path, guest, *, redact=(), flush_traps=1000, bridge=None, taps=(), **options):
    """Run a guest, recorded: the outcomes, and the server."""
    async with (
        Recorder(path, redact=redact, flush_traps=flush_traps) as recorder,
        FakeGuest(guest, memory=MEMORY) as vm,
    ):
        return await serve(vm, *taps, recorder, bridge=bridge, **options)


def read(path, *kinds):
    """The messages of a whole file, of these kinds."""
    with RecordingReader(path) as reader:
        found = [message for _, message in reader.messages()]
        assert (reader.problems, reader.complete) == ([], True)
    return [each for each in found if isinstance(each, kinds)] if kinds else found

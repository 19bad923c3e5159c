"""Guests and handlers that are recorded, and how their recording is played again."""

import anyio

from vmibridge import (
    Bridge,
    BridgeHandler,
    BridgePacket,
    BridgeResponse,
    BridgeServer,
    GuestMemoryError,
    method,
)
from vmibridge.recording.recorder import Recorder
from vmibridge.recording.replay.backend import ReplayBackend
from vmibridge.recording.replay.options import ReplayOptions, replay_settings
from vmibridge.testing import FakeGuest

MAGIC = 0x1234_5678
LOOPS = [("asyncio", {}), ("asyncio", {"use_uvloop": True}), ("trio", {})]
IDS = ["asyncio", "uvloop", "trio"]
MEMORY = {0x1000: b"hello\0", 0x2000: bytes(range(64)), 0x3000: bytes(64)}


class Probe(BridgeHandler[object]):
    """What was recorded; the tests change it in one place at a time."""

    MAGIC = MAGIC
    REQUEST = 1
    VERIFY_VALUE4 = 0x5747
    name = "probe"

    def __init__(self, pause=0.0):
        self.pause = pause
        self.asked = []

    @method(1)
    async def add(self, vmi, packet):
        self.asked.append(packet.value1)
        return BridgeResponse(value1=packet.value1 + 1).with_output({"sum": packet.value1 + 1})

    @method(2)
    async def copy(self, vmi, packet):
        text = await vmi.memory.read_string(0x1000)
        data = await vmi.memory.read(0x2000, 8)
        await vmi.memory.write(0x3000, data)
        await vmi.memory.write(0x3008, text.encode())
        return BridgeResponse(value1=sum(data)).with_output(text)

    @method(3)
    async def fail(self, vmi, packet):
        raise RuntimeError("as it was told to")

    @method(4)
    async def unmapped(self, vmi, packet):
        try:
            await vmi.memory.read(0x9000, 8)
        except GuestMemoryError as error:
            return BridgeResponse(value1=error.address)
        return None

    @method(5, soft_timeout=0.02)
    async def slow(self, vmi, packet):
        self.asked.append(packet.value1)
        await anyio.sleep(self.pause)
        data = await vmi.memory.read(0x2000, 4)
        return BridgeResponse(value1=int.from_bytes(data, "little"))

    @method(6)
    async def hang(self, vmi, packet):
        await anyio.sleep_forever()


class Shared(BridgeHandler[int]):
    """Its answers depend on the order of all that it was asked."""

    MAGIC = MAGIC
    REQUEST = 2
    name = "shared"

    def __init__(self):
        self.count = 0

    async def handle(self, vmi, packet):
        self.count += 1
        number = self.count
        if packet.value1:
            await anyio.sleep(packet.value1 / 1000)
        return BridgeResponse(value1=number)


def ask(code, value1=0, request=1, magic=MAGIC, **more):
    return BridgePacket(magic, request, code, value1, **more)


def run(main, loop=LOOPS[0]):
    return anyio.run(main, backend=loop[0], backend_options=loop[1])


def record(path, guest, bridge=None, loop=LOOPS[0], vm="vm", redact=(), **server_options):
    """Run a guest, recorded; returns what it got."""

    async def main():
        got = []

        async def run_guest(vm):
            got.append(await guest(vm))

        async with (
            Recorder(path, redact=redact) as recorder,
            FakeGuest(run_guest, memory=MEMORY, vm=vm) as backend,
        ):
            server = BridgeServer(
                backend, bridge or Bridge(Probe(), Shared()), taps=[recorder], **server_options
            )
            async for _ in server.run():
                pass
        return got[0] if got else None

    return run(main, loop)


def replay(
    path, *handlers, loop=LOOPS[0], vm="vm", differences=None, verdict=None, taps=(), **options
):
    """Replay it; returns the result."""

    async def main():
        notes = [] if differences is None else differences
        given = ReplayOptions(**options)
        backend = ReplayBackend(path, given, vm, notes.append, verdict=verdict)
        async with backend:
            assert backend.session is not None
            given = replay_settings(backend.session.settings)
            server = BridgeServer(
                backend,
                Bridge(*(handlers or (Probe(), Shared()))),
                timeout=given.timeout,
                wait=given.wait,
                fallback=given.fallback,
                policy=given.policy,
                taps=taps,
            )
            async for _ in server.run():
                pass
        return backend.result

    return run(main, loop)


async def everything(vm):
    for value in range(3):
        await vm.call(ask(1, value))
    await vm.call(ask(2))
    await vm.call(ask(3))
    await vm.call(ask(4))
    await vm.call(ask(9))
    await vm.call(ask(1, request=0x77))
    async with anyio.create_task_group() as tasks:
        for vcpu in range(4):
            tasks.start_soon(_order_matters, vm, vcpu)


async def _order_matters(vm, vcpu):
    for round_ in range(5):
        await vm.call(ask(0, (vcpu * 7 + round_ * 3) % 5, request=2), vcpu=vcpu)

"""A handler that outlives its trap, and how it is served."""

import anyio

from vmibridge import (
    Bridge,
    BridgeHandler,
    BridgePacket,
    BridgeResponse,
    BridgeServer,
    method,
)
from vmibridge.testing import FakeGuest

MAGIC = 0x1234_5678
SOFT = 0.02


class Slow(BridgeHandler[str]):
    """Ends when the test says so."""

    MAGIC = MAGIC
    REQUEST = 1
    VERIFY_VALUE4 = 0x5747
    soft_timeout = SOFT

    def __init__(self):
        self.runs = []
        self.go_on = anyio.Event()
        self.cancelled = anyio.Event()
        self.events = []

    @method(1)
    async def work(self, vmi, packet):
        self.runs.append(packet.value1)
        try:
            await self.go_on.wait()
        except anyio.get_cancelled_exc_class():
            self.cancelled.set()
            raise
        return BridgeResponse(value1=packet.value1 + 100).with_output("done")

    @method(2)
    async def read_later(self, vmi, packet):
        self.runs.append(packet.value1)
        await self.go_on.wait()
        first = (await vmi.memory.read(0x2000, 1))[0]
        self.events.append(vmi.event.seq)
        return BridgeResponse(value1=first)

    @method(3, retry_values=(1, 2))
    async def counted(self, vmi, packet):
        self.runs.append(packet.value1)
        await self.go_on.wait()
        return BridgeResponse(value1=7)

    @method(4)
    async def fail_later(self, vmi, packet):
        self.runs.append(packet.value1)
        await self.go_on.wait()
        raise LookupError("on purpose")


WORK, READ_LATER, COUNTED, FAIL_LATER = (
    BridgePacket(MAGIC, 1, code, value1=5) for code in (1, 2, 3, 4)
)


async def serve(guest, *targets, memory=None, **options):
    async with FakeGuest(guest, memory=memory) as backend:
        server = BridgeServer(backend, Bridge(*targets), **options)
        outcomes = [outcome async for outcome in server.run()]
    assert sorted(backend.writes) == sorted(event.seq for event in backend.events)
    return outcomes, server.summary


def kinds(outcomes):
    return [outcome.kind.value for outcome in outcomes]

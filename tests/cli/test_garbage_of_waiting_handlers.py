"""The commands collect garbage so seldom that 1,000 handlers which wait start no collection.

Each wave of them would be looked at for nothing: it lives until the sleeps end.
"""

import gc

import anyio
import pytest
from base_handlers import StandardHandler

from vmibridge import Bridge, BridgeResponse, BridgeServer, Registers, TrapEvent, TrapReason
from vmibridge.bridge.contract import STANDARD_MAGIC
from vmibridge.cli.event_loop import COLLECT_AFTER
from vmibridge.testing import FakeBackend

pytestmark = pytest.mark.anyio

HANDLERS = 1000


class Sleeps(StandardHandler):
    """Sleeps twice: at the first time the engine learns that it waits."""

    def __init__(self):
        self.sleeping = 0
        self.all_sleep = anyio.Event()

    async def handle(self, vmi, packet):
        if packet.value1:
            self.sleeping += 1
            if self.sleeping == HANDLERS:
                self.all_sleep.set()
            await anyio.sleep(3600)
        await anyio.sleep(0)
        return BridgeResponse(0)


def trap(seq, value1):
    registers = Registers(rcx=STANDARD_MAGIC, rdx=Sleeps.REQUEST, r8=value1)
    return TrapEvent(seq, TrapReason.VMCALL, registers, vcpu=seq, ip=0x1000, length=3)


async def test_handlers_that_begin_together_start_no_collection():
    handler = Sleeps()
    events = [trap(1, 0), *(trap(seq, seq) for seq in range(2, HANDLERS + 2))]
    async with FakeBackend(events) as backend:
        server = BridgeServer(backend, Bridge(handler), timeout=7200, grace=0)

        async def run():
            async for outcome in server.run():
                outcomes.append(outcome.kind.value)

        outcomes = []
        gc.collect()
        gc.disable()
        try:
            before = len(gc.get_objects())
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(run)
                await handler.all_sleep.wait()
                await anyio.wait_all_tasks_blocked()
                made = len(gc.get_objects()) - before
                server.stop(now=True)
        finally:
            gc.enable()
    assert len(outcomes) == HANDLERS + 1
    assert 15 * HANDLERS < made < COLLECT_AFTER

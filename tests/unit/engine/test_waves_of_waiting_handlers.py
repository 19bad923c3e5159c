"""Many handlers that end together have their successors begin together.

Where one worker after the other was started for those, they began far behind, and handlers that
sleep then slept and woke in waves.
"""

import anyio
import anyio.lowlevel
import pytest
from base_handlers import StandardHandler

from vmibridge import Bridge, BridgeResponse, BridgeServer, Registers, TrapEvent, TrapReason
from vmibridge.bridge.contract import STANDARD_MAGIC
from vmibridge.testing import FakeBackend

pytestmark = pytest.mark.anyio

VCPUS = 320
FIRST, SECOND = 1, 2
FEW = 10
"""Turns of the loop: 16 workers a turn would take twice as many."""


class Waits(StandardHandler):
    def __init__(self):
        self.begun = {FIRST: 0, SECOND: 0}
        self.ends = {FIRST: anyio.Event(), SECOND: anyio.Event()}

    async def handle(self, vmi, packet):
        self.begun[packet.value1] += 1
        await self.ends[packet.value1].wait()
        return BridgeResponse(0)


def trap(seq, vcpu, value1):
    registers = Registers(rcx=STANDARD_MAGIC, rdx=Waits.REQUEST, r8=value1)
    return TrapEvent(seq, TrapReason.VMCALL, registers, vcpu=vcpu, ip=0x1000, length=3)


async def test_successors_begin_a_few_turns_later():
    handler = Waits()
    events = [trap(1 + vcpu, vcpu, FIRST) for vcpu in range(VCPUS)]
    events += [trap(1 + VCPUS + vcpu, vcpu, SECOND) for vcpu in range(VCPUS)]
    outcomes = []
    async with FakeBackend(events) as backend:
        server = BridgeServer(backend, Bridge(handler), queue=2 * VCPUS, timeout=3600)

        async def run():
            async for outcome in server.run():
                outcomes.append(outcome.kind.value)

        with anyio.fail_after(60):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(run)
                while handler.begun[FIRST] < VCPUS:
                    await anyio.lowlevel.checkpoint()
                await anyio.wait_all_tasks_blocked()
                handler.ends[FIRST].set()
                turns = 0
                while handler.begun[SECOND] < VCPUS:
                    await anyio.lowlevel.checkpoint()
                    turns += 1
                handler.ends[SECOND].set()
    assert outcomes == ["handled"] * 2 * VCPUS
    assert turns <= FEW

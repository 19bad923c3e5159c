"""A trap whose vCPU is gone: nobody works for it, and it has its outcome all the same."""

import anyio
import pytest

from vmibridge import Bridge, BridgeHandler, BridgeResponse, BridgeServer, Registers
from vmibridge.errors import BackendError
from vmibridge.testing import FakeBackend
from vmibridge.vm.backend import GuestEnd
from vmibridge.vm.trap import TrapEvent, TrapReason

pytestmark = pytest.mark.anyio


class Wait(BridgeHandler[None]):
    MAGIC, REQUEST = 0x1234, 1

    def __init__(self):
        self.begun, self.log = anyio.Event(), []

    async def handle(self, vmi, packet):
        self.log.append("begun")
        self.begun.set()
        try:
            await anyio.sleep_forever()
        except BaseException:
            self.log.append("cancelled")
            raise


class Quick(Wait):
    async def handle(self, vmi, packet):
        return BridgeResponse(1)


class FakeGone(FakeBackend):
    """A VM that goes away while its trap waits, or is queued."""

    def __init__(self, act):
        super().__init__()
        self.act, self.sink, self.answered = act, None, []

    async def run(self, traps, sink):
        self.sink = sink
        await self.act(self)
        return GuestEnd()

    def trap(self, seq):
        registers = Registers(rcx=Wait.MAGIC, rdx=Wait.REQUEST)
        event = TrapEvent(seq, TrapReason.VMCALL, registers, self.vm, seq, length=3)
        self.sink.put_nowait(event)
        return event

    async def resume(self, event, writes):
        self.answered.append(event.seq)
        raise BackendError("the VM is gone")


async def outcomes_of(act, handler):
    async with FakeGone(act) as backend:
        server = BridgeServer(backend, Bridge(handler), timeout=60)
        found = [(each.event.seq, each.kind.value, each.error) async for each in server.run()]
    return found, backend.answered


async def test_its_handler_is_cancelled_at_once(caplog):
    handler = Wait()

    async def act(vm):
        event = vm.trap(1)
        await handler.begun.wait()
        vm.sink.abandon(event)

    with anyio.fail_after(10):
        found = await outcomes_of(act, handler)
    assert found == ([(1, "cancelled", "the VM is gone")], [1])
    assert handler.log == ["begun", "cancelled"]
    assert not caplog.records


async def test_while_it_is_queued_no_handler_begins():
    handler = Wait()

    async def act(vm):
        vm.sink.abandon(vm.trap(1))

    with anyio.fail_after(10):
        assert await outcomes_of(act, handler) == ([(1, "cancelled", "the VM is gone")], [1])
    assert handler.log == []


async def test_a_trap_that_was_answered_is_left_alone():
    async def act(vm):
        event = vm.trap(1)
        while not vm.answered:
            await anyio.sleep(0.001)
        vm.sink.abandon(event)

    with anyio.fail_after(10):
        found, _ = await outcomes_of(act, Quick())
    assert found == [(1, "failed", "not written: BackendError: the VM is gone")]

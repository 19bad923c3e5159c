"""`stop(vm=...)` ends one VM in good order; the others run on."""

import anyio
import pytest
from base_handlers import HandlerWithLives

from vmibridge import Bridge, BridgePacket, BridgeResponse, BridgeServer, OutcomeKind, method
from vmibridge.errors import ServerStateError
from vmibridge.testing import FakeGuest

pytestmark = pytest.mark.anyio

MAGIC = 0x1234_5678
TELL, WAIT = (BridgePacket(MAGIC, 1, code) for code in (1, 2))


class Handler(HandlerWithLives):
    MAGIC = MAGIC
    REQUEST = 1

    def __init__(self):
        super().__init__()
        self.began, self.go_on = anyio.Event(), anyio.Event()

    @method(1)
    async def tell(self, vmi, packet):
        return BridgeResponse(value1=1)

    @method(2)
    async def wait_for_the_test(self, vmi, packet):
        self.began.set()
        await self.go_on.wait()
        return BridgeResponse(value1=2)


async def endless(vm):
    while (await vm.call(TELL)) is not None:
        pass


async def test_its_guest_is_let_go_and_the_others_run_to_their_ends():
    handlers = {}

    async def three(vm):
        for _ in range(3):
            await vm.call(TELL)

    def make(vm):
        return handlers.setdefault(vm, Handler())

    async with FakeGuest(endless, vm="red") as red, FakeGuest(three, vm="blue") as blue:
        server = BridgeServer([red, blue], make)
        async for outcome in server.run():
            if outcome.event.vm == "red":
                server.stop(vm="red")
    assert server.summaries["blue"].outcomes[OutcomeKind.HANDLED] == 3
    assert [end.reason for end in server.summaries["blue"].guest.vcpus] == ["halted"]
    assert [end.reason for end in server.summaries["red"].guest.vcpus] == ["stopped"]


async def test_what_another_vcpu_waits_for_is_answered():
    handler = Handler()

    async def guest(vm):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(vm.call, WAIT)
            await handler.began.wait()
            await vm.call(TELL, vcpu=1)

    async with FakeGuest(guest) as backend:
        server = BridgeServer(backend, Bridge(handler))
        kinds = []
        async for outcome in server.run():
            kinds.append((outcome.packet.method, outcome.kind))
            if outcome.packet.method == TELL.method:
                server.stop(vm="fake")
                handler.go_on.set()
    assert kinds == [(1, OutcomeKind.HANDLED), (2, OutcomeKind.HANDLED)]


async def test_a_vm_that_is_none_and_a_server_that_does_not_run():
    async def guest(vm):
        await vm.call(TELL)

    async with FakeGuest(guest) as backend:
        server = BridgeServer(backend, Bridge(Handler()))
        with pytest.raises(ServerStateError):
            server.stop(vm="fake")
        async for _ in server.run():
            with pytest.raises(ValueError, match="no VM is named 'red': there are fake"):
                server.stop(vm="red")

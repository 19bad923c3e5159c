"""How many handlers are under way at a time: serial ones, limits per VM and in all."""

import time
from contextlib import AsyncExitStack

import anyio
import pytest

from vmibridge import (
    Bridge,
    BridgeHandler,
    BridgePacket,
    BridgeResponse,
    BridgeServer,
    Gate,
    OutcomeKind,
    method,
)
from vmibridge.testing import FakeGuest

pytestmark = pytest.mark.anyio

MAGIC = 0x1234_5678
CALL = BridgePacket(MAGIC, 1, 1)
DONE = 0x77


class Counted(BridgeHandler[None]):
    """Knows how many of its requests overlap. They wait until as many as `together` have."""

    MAGIC = MAGIC
    REQUEST = 1
    shared = True

    def __init__(self, seconds=0.03, together=0):
        self.seconds = seconds
        self.together = together
        self.are_together = anyio.Event()
        self.running = 0
        self.most = 0
        self.order = []

    @method(1)
    async def work(self, vmi, packet):
        self.running += 1
        self.most = max(self.most, self.running)
        if self.most >= self.together:
            self.are_together.set()
        try:
            await self.are_together.wait()
            # One too many would come now.
            await anyio.sleep(self.seconds)
        finally:
            self.running -= 1
        self.order.append(vmi.vcpu)
        return BridgeResponse(value1=DONE)

    @method(2)
    async def at_once(self, vmi, packet):
        return BridgeResponse(value1=self.running)


def calls(vcpus, packet=CALL):
    """A guest that calls on each vCPU at the same time."""

    async def guest(vm):
        async def call(vcpu):
            assert (await vm.call(packet, vcpu=vcpu)).rax == DONE

        async with anyio.create_task_group() as tasks:
            for vcpu in range(vcpus):
                tasks.start_soon(call, vcpu)

    return guest


async def serve(guests, *targets, **options):
    async with AsyncExitStack() as stack:
        backends = [
            await stack.enter_async_context(FakeGuest(guest, vm=f"vm{number}"))
            for number, guest in enumerate(guests)
        ]
        server = BridgeServer(backends, lambda vm: Bridge(*targets), **options)
        outcomes = [outcome async for outcome in server.run()]
    return outcomes, server.summary


async def test_without_limits_vcpus_do_not_wait_for_each_other():
    handler = Counted(together=16)
    await serve([calls(16)], handler, timeout=60)
    assert handler.most == 16


async def test_a_limit_holds_for_each_vm():
    handler = Counted(together=6)
    await serve([calls(8), calls(8)], handler, in_flight=3, timeout=60)
    assert handler.most == 6


async def test_a_limit_holds_for_all_vms_together():
    handler = Counted(together=5)
    await serve([calls(8), calls(8)], handler, in_flight_total=5, timeout=60)
    assert handler.most == 5


async def test_places_are_given_first_come_first_served():
    handler = Counted()
    outcomes, _ = await serve([calls(8)], handler, in_flight=1)
    assert handler.order == [outcome.event.vcpu for outcome in outcomes]


async def test_a_serial_handler_answers_one_request_at_a_time():
    class Serial(Counted):
        serial = True

    handler = Serial()
    await serve([calls(8)], handler)
    assert (handler.most, sorted(handler.order)) == (1, list(range(8)))


async def test_a_serial_handler_that_is_shared_has_one_turn_for_all_vms():
    class Serial(Counted):
        serial = True

    handler = Serial()
    await serve([calls(4), calls(4)], handler)
    assert handler.most == 1


async def test_who_waits_for_a_turn_takes_no_place_of_others():
    class Serial(Counted):
        serial = True

    class Other(Counted):
        REQUEST = 2

        async def handle(self, vmi, packet):
            response = await super().handle(vmi, packet)
            if len(self.order) == 4:
                serial.are_together.set()
            return response

    # The first one has its turn until all of the others are done.
    serial, other = Serial(together=2), Other()
    serial.order = other.order

    async def guest(vm):
        async with anyio.create_task_group() as tasks:
            for vcpu in range(4):
                tasks.start_soon(_call, vm, CALL, vcpu)
            await anyio.sleep(0)
            for vcpu in range(4, 8):
                tasks.start_soon(_call, vm, BridgePacket(MAGIC, 2, 1), vcpu)

    await serve([guest], serial, other, in_flight=2, timeout=60)
    assert set(other.order[:4]) == {4, 5, 6, 7}


async def _call(vm, packet, vcpu):
    await vm.call(packet, vcpu=vcpu)


async def test_a_handler_that_does_not_wait_needs_no_place():
    handler = Counted(0.02)

    async def guest(vm):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_call, vm, CALL, 0)
            await anyio.sleep(0.005)
            # It is asked when there is a place; only then it shows that it needs none.
            assert (await vm.call(BridgePacket(MAGIC, 1, 2), vcpu=1)).rax == 0

    await serve([guest], handler, in_flight=1)


async def test_an_instant_handler_is_not_held_up_by_others():
    class Instant(Counted):
        REQUEST = 2
        instant = True

    # The slow one waits for another, which does not come.
    slow, instant = Counted(together=2), Instant()

    async def guest(vm):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_call, vm, CALL, 0)
            while not slow.running:
                await anyio.sleep(0.001)
            assert (await vm.call(BridgePacket(MAGIC, 2, 2), vcpu=1)).rax == 0
            assert slow.running
            slow.are_together.set()

    await serve([guest], slow, instant, in_flight=1)


async def test_an_instant_handler_that_waits_after_all_is_answered_too():
    class Liar(Counted):
        instant = True

    handler = Liar()
    await serve([calls(3)], handler, in_flight=1)
    assert handler.most == 3


async def test_a_handler_that_does_not_end_when_cancelled_keeps_its_place():
    class Stubborn(Counted):
        @method(1)
        async def work(self, vmi, packet):
            self.running += 1
            self.most = max(self.most, self.running)
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.05)
            self.running -= 1

    handler = Stubborn()

    async def guest(vm):
        for _ in range(4):
            assert (await vm.call(CALL)).rax == 0xBAD

    await serve([guest], handler, in_flight=2, timeout=0.01, fallback=BridgeResponse(0xBAD))
    assert handler.most == 2


async def test_a_handler_whose_trap_was_answered_as_its_turn_came_does_not_begin():
    class Serial(Counted):
        serial = True

        @method(3, timeout=0.02)
        async def next(self, vmi, packet):
            self.order.append("begun")
            return BridgeResponse(value1=DONE)

    class Blocks(BridgeHandler[None]):
        MAGIC, REQUEST = MAGIC, 2

        async def handle(self, vmi, packet):
            await anyio.sleep(0)
            time.sleep(0.05)  # Meanwhile the turn comes, and the deadline passes.

    serial = Serial(0.01)

    async def guest(vm):
        async with anyio.create_task_group() as tasks:
            for vcpu, packet in enumerate(
                (CALL, BridgePacket(MAGIC, 1, 3), BridgePacket(MAGIC, 2, 0))
            ):
                tasks.start_soon(_call, vm, packet, vcpu)
                await anyio.sleep(0.001)

    outcomes, _ = await serve([guest], serial, Blocks())
    (second,) = [outcome for outcome in outcomes if outcome.event.vcpu == 1]
    assert (second.kind is OutcomeKind.HANDLED) == ("begun" in serial.order)


class TestSoftDeadline:
    async def test_of_a_request_that_has_not_begun_forgets_it(self):
        class Serial(Counted):
            serial = True
            soft_timeout = 0.01

        handler = Serial(0.1)
        finished = []

        async def poll(vm, vcpu):
            packet = CALL.with_value1(vcpu)
            while (await vm.call(packet, vcpu=vcpu)).rax == Gate.WAIT:
                pass
            finished.append(vcpu)

        async def guest(vm):
            async with anyio.create_task_group() as tasks:
                for vcpu in range(3):
                    tasks.start_soon(poll, vm, vcpu)

        _, summary = await serve([guest], handler)
        assert sorted(finished) == sorted(handler.order) == [0, 1, 2]
        assert (summary.uncollected, summary.abandoned) == (0, 0)

    async def test_a_guest_that_never_retries_piles_nothing_up(self):
        handler = Counted(0.05)
        handler.soft_timeout = 0.001

        async def guest(vm):
            for value in range(50):
                assert (await vm.call(CALL.with_value1(value))).rax == Gate.WAIT

        _, summary = await serve([guest], handler, in_flight=4)
        assert handler.most == 4
        assert summary.uncollected + summary.abandoned < 50

"""A consumer that acts on an outcome while the vCPU still stands at its instruction."""

import anyio
import pytest

from vmibridge import Bridge, BridgeHandler, BridgePacket, BridgeResponse, BridgeServer, OutcomeKind
from vmibridge.testing import FakeGuest

pytestmark = pytest.mark.anyio

MAGIC = 0xFEDC_BA98
CALL = BridgePacket(MAGIC, 1, 1, value1=5)


class Double(BridgeHandler[int]):
    MAGIC = MAGIC
    REQUEST = 1

    async def handle(self, vmi, packet):
        if packet.method == 2:
            await anyio.sleep_forever()
        return BridgeResponse(2 * packet.value1).with_output(packet.value1)


async def serve(before_resume, *calls, stop=None, **options):
    answers = []

    async def guest(vm):
        for call in calls:
            answers.append((await vm.call(call)).rax)

    async with FakeGuest(guest) as backend:
        server = BridgeServer(backend, Bridge(Double()), before_resume=before_resume, **options)
        if stop is not None:
            stop.append(server)
        outcomes = [outcome async for outcome in server.run()]
    assert sorted(backend.writes) == [event.seq for event in backend.events]
    return backend, answers, outcomes


async def test_the_answer_is_written_after_it():
    order = []
    backends = []

    async def consume(outcome):
        await anyio.sleep(0)
        order.append((outcome.output, outcome.writes, dict(backends[0].writes)))

    async def guest(vm):
        assert (await vm.call(CALL)).rax == 10
        assert (await vm.call(CALL.with_value1(6))).rax == 12

    async with FakeGuest(guest) as backend:
        backends.append(backend)
        server = BridgeServer(backend, Bridge(Double()), before_resume=consume)
        outcomes = [outcome async for outcome in server.run()]
    (first, second) = order
    assert first == (5, None, {})
    assert second[:2] == (6, None)
    assert list(second[2]) == [1]
    assert [outcome.writes is not None for outcome in outcomes] == [True, True]


async def test_it_sees_every_outcome_of_a_trap_of_ours():
    seen = []

    async def consume(outcome):
        seen.append(outcome.kind)

    await serve(consume, CALL, BridgePacket(MAGIC, 9, 1), BridgePacket(MAGIC, 1, 2), timeout=0.01)
    assert seen == [OutcomeKind.HANDLED, OutcomeKind.UNMATCHED, OutcomeKind.TIMEOUT]


async def test_one_that_raises_is_logged_and_the_guest_gets_its_answer(caplog):
    async def consume(outcome):
        raise LookupError("on purpose")

    _, answers, outcomes = await serve(consume, CALL)
    assert answers == [10]
    assert [outcome.kind for outcome in outcomes] == [OutcomeKind.HANDLED]
    assert "before_resume of trap 1 of vm fake failed" in caplog.text
    assert "on purpose" in caplog.text


async def test_one_that_hangs_is_cut_off_at_the_deadline_of_the_server(caplog):
    async def consume(outcome):
        await anyio.sleep_forever()

    _, answers, _ = await serve(consume, CALL, timeout=0.01)
    assert answers == [10]
    assert "was cut off" in caplog.text


async def test_a_stop_cuts_it_off_after_the_grace_period():
    servers = []

    async def consume(outcome):
        servers[0].stop()
        await anyio.sleep_forever()

    backend, _, _ = await serve(consume, CALL, stop=servers, grace=0.01, timeout=3600.0)
    assert backend.writes[1].rax == 10


async def test_vcpus_do_not_wait_for_each_other_in_it():
    both = anyio.Event()
    inside = []

    async def consume(outcome):
        inside.append(outcome.event.vcpu)
        if len(inside) == 2:
            both.set()
        await both.wait()

    async def guest(vm):
        async with anyio.create_task_group() as tasks:
            for vcpu in range(2):
                tasks.start_soon(lambda vcpu=vcpu: vm.call(CALL, vcpu=vcpu))

    async with FakeGuest(guest) as backend:
        server = BridgeServer(backend, Bridge(Double()), before_resume=consume, timeout=3600.0)
        assert len([outcome async for outcome in server.run()]) == 2
    assert sorted(inside) == [0, 1]

"""Handlers that outlive their trap: soft deadlines, retries, guest memory in between."""

import math

import anyio
import pytest

from vmibridge import (
    STANDARD_WAIT,
    Bridge,
    BridgeHandler,
    BridgePacket,
    BridgeResponse,
    BridgeServer,
    Gate,
    OutcomeKind,
    method,
)
from vmibridge.settings import ServerSettings
from vmibridge.testing import FakeGuest

pytestmark = pytest.mark.anyio

MAGIC = 0x1234_5678
SOFT = 0.01


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


class TestSoftDeadline:
    async def test_the_guest_is_told_to_wait_and_the_retry_gets_the_result(self):
        slow = Slow()

        async def guest(vm):
            first = await vm.call(WORK)
            assert (first.rax, first.rdx) == (Gate.WAIT, 0x5747)
            slow.go_on.set()
            await anyio.sleep(SOFT)
            assert (await vm.call(WORK)).rax == 105

        outcomes, summary = await serve(guest, slow)
        assert kinds(outcomes) == ["waiting", "handled"]
        assert [outcome.output for outcome in outcomes] == [None, "done"]
        assert slow.runs == [5]
        assert summary.retries == 1

    async def test_a_retry_that_comes_early_waits_with_the_handler(self):
        slow = Slow()

        async def go_on():
            slow.go_on.set()

        async def guest(vm):
            assert (await vm.call(WORK)).rax == Gate.WAIT
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(go_on)
                assert (await vm.call(WORK)).rax == 105

        outcomes, _ = await serve(guest, slow)
        assert kinds(outcomes) == ["waiting", "handled"]
        assert slow.runs == [5]

    async def test_however_often_the_guest_asks_the_handler_runs_once(self):
        slow = Slow()

        async def guest(vm):
            for _ in range(20):
                assert (await vm.call(WORK)).rax == Gate.WAIT
            slow.go_on.set()
            assert (await vm.call(WORK)).rax == 105

        outcomes, summary = await serve(guest, slow)
        assert kinds(outcomes) == ["waiting"] * 20 + ["handled"]
        assert slow.runs == [5]
        assert summary.retries == 20

    async def test_another_request_after_the_result_runs_the_handler_again(self):
        slow = Slow()

        async def guest(vm):
            assert (await vm.call(WORK)).rax == Gate.WAIT
            slow.go_on.set()
            assert (await vm.call(WORK)).rax == 105
            assert (await vm.call(WORK)).rax == 105

        await serve(guest, slow)
        assert slow.runs == [5, 5]

    async def test_a_failure_is_kept_for_the_retry_too(self):
        slow = Slow()

        async def guest(vm):
            assert (await vm.call(FAIL_LATER)).rax == Gate.WAIT
            slow.go_on.set()
            await anyio.sleep(SOFT)
            assert (await vm.call(FAIL_LATER)).rax == 0xBAD

        outcomes, _ = await serve(guest, slow, fallback=BridgeResponse(value1=0xBAD))
        assert kinds(outcomes) == ["waiting", "failed"]


class TestMemory:
    async def test_is_read_with_the_trap_of_the_retry(self):
        slow = Slow()

        async def guest(vm):
            assert (await vm.call(READ_LATER)).rax == Gate.WAIT
            slow.go_on.set()
            await anyio.sleep(SOFT)
            assert slow.events == []
            vm.memory.write(0x2000, b"\x42")
            assert (await vm.call(READ_LATER, vcpu=1)).rax == 0x42

        await serve(guest, slow, memory={0x2000: b"\x01"})
        assert slow.events == [2]


class TestHardDeadline:
    async def test_cancels_the_handler_and_its_retry_gets_the_fallback(self):
        slow = Slow()

        async def guest(vm):
            assert (await vm.call(WORK)).rax == Gate.WAIT
            await slow.cancelled.wait()
            assert (await vm.call(WORK)).rax == 0xBAD

        outcomes, _ = await serve(guest, slow, timeout=0.05, fallback=BridgeResponse(value1=0xBAD))
        assert kinds(outcomes) == ["waiting", "timeout"]

    async def test_is_counted_from_the_first_trap_however_often_the_guest_asks(self):
        slow = Slow()

        async def guest(vm):
            while (await vm.call(WORK)).rax == Gate.WAIT:
                pass

        outcomes, summary = await serve(
            guest, slow, timeout=0.1, fallback=BridgeResponse(value1=0xBAD)
        )
        assert kinds(outcomes)[-1] == "timeout"
        assert outcomes[-1].error == "no answer within 0.1 s"
        assert slow.runs == [5]

"""Handlers that outlive their trap: which retry gets the result, how long it is kept, and guest
memory.
"""

import anyio
import pytest
from soft_deadline_parts import COUNTED, MAGIC, READ_LATER, SOFT, WORK, Slow, kinds, serve

from vmibridge import (
    BridgeHandler,
    BridgeResponse,
    BridgeServer,
    Gate,
    GuestMemoryError,
    method,
)
from vmibridge.aio.clock import VirtualTime, virtual_loop
from vmibridge.testing import FakeGuest

pytestmark = pytest.mark.anyio


class TestWhichRetry:
    @pytest.mark.parametrize(
        ("again", "where"),
        [
            (WORK.with_value1(6), {}),
            (WORK.with_value4(1), {}),
            (WORK, {"address_space": 0x2000}),
            (WORK, {"ring": 3}),
        ],
    )
    async def test_another_request_is_none(self, again, where):
        slow = Slow()

        async def guest(vm):
            assert (await vm.call(WORK, address_space=0x1000)).rax == Gate.WAIT
            assert (await vm.call(again, **{"address_space": 0x1000, **where})).rax == Gate.WAIT

        _, summary = await serve(guest, slow)
        assert (len(slow.runs), summary.retries) == (2, 0)

    async def test_another_vcpu_may_bring_it(self):
        slow = Slow()

        async def guest(vm):
            assert (await vm.call(WORK, vcpu=0)).rax == Gate.WAIT
            slow.go_on.set()
            assert (await vm.call(WORK, vcpu=3)).rax == 105

        await serve(guest, slow)
        assert slow.runs == [5]

    async def test_a_value_that_counts_the_attempts_is_left_out(self):
        slow = Slow()

        async def guest(vm):
            for attempt in range(3):
                assert (await vm.call(COUNTED.with_value3(attempt))).rax == Gate.WAIT
            slow.go_on.set()
            assert (await vm.call(COUNTED.with_value3(3))).rax == 7

        outcomes, summary = await serve(guest, slow)
        assert (slow.runs, summary.retries) == ([5], 3)
        assert [outcome.packet.value3 for outcome in outcomes] == [0, 1, 2, 3]

    async def test_a_second_one_at_the_same_time_is_told_to_wait_at_once(self):
        slow = Slow()
        slow.soft_timeout = 30 * SOFT
        told = []

        async def retry(vm, vcpu):
            told.append((await vm.call(WORK, vcpu=vcpu)).rax)
            if len(told) == 1:
                slow.go_on.set()

        async def guest(vm):
            assert (await vm.call(WORK)).rax == Gate.WAIT
            async with anyio.create_task_group() as tasks:
                for vcpu in range(2):
                    tasks.start_soon(retry, vm, vcpu)

        await serve(guest, slow)
        assert told == [Gate.WAIT, 105]
        assert slow.runs == [5]


class TestRequestsAlike:
    @pytest.fixture(params=["asyncio", "trio"])
    def anyio_backend(self, request):
        """Time passes when nothing is left to do: both have come before one is told to wait."""
        return virtual_loop(request.param, VirtualTime())

    async def test_of_two_vcpus_at_a_time_are_two_requests(self):
        slow = Slow()
        results = []

        async def poll(vm, vcpu):
            while (answer := await vm.call(WORK, vcpu=vcpu)).rax == Gate.WAIT:
                slow.go_on.set() if len(slow.runs) == 2 else None
            results.append(answer.rax)

        async def guest(vm):
            async with anyio.create_task_group() as tasks:
                for vcpu in range(2):
                    tasks.start_soon(poll, vm, vcpu)

        await serve(guest, slow)
        assert results == [105, 105]
        assert slow.runs == [5, 5]


class TestResults:
    async def test_that_nobody_collects_expire(self):
        slow = Slow()

        async def guest(vm):
            assert (await vm.call(WORK)).rax == Gate.WAIT
            slow.go_on.set()
            await anyio.sleep(8 * SOFT)
            # Its handler runs again, and may be late on a machine with other work.
            while (answer := (await vm.call(WORK)).rax) == Gate.WAIT:
                pass
            assert answer == 105

        outcomes, summary = await serve(guest, slow, result_timeout=2 * SOFT)
        first, *waits, last = kinds(outcomes)
        assert (first, {*waits} - {"waiting"}, last) == ("waiting", set(), "handled")
        assert slow.runs == [5, 5]
        assert (summary.uncollected, summary.retries) == (1, len(waits))

    async def test_that_are_left_at_the_end_are_counted(self):
        slow = Slow()

        async def guest(vm):
            assert (await vm.call(WORK)).rax == Gate.WAIT
            slow.go_on.set()
            await anyio.sleep(SOFT)

        _, summary = await serve(guest, slow)
        assert (summary.uncollected, summary.abandoned) == (1, 0)

    async def test_of_a_handler_that_runs_when_the_guest_ends_are_never_made(self):
        slow = Slow()

        async def guest(vm):
            assert (await vm.call(WORK)).rax == Gate.WAIT

        _, summary = await serve(guest, slow)
        assert slow.cancelled.is_set()
        assert (summary.uncollected, summary.abandoned) == (0, 1)

    async def test_are_bounded_in_number(self):
        ends = [anyio.Event() for _ in range(10)]

        class Later(BridgeHandler[None]):
            MAGIC, REQUEST, soft_timeout = MAGIC, 1, SOFT

            async def handle(self, vmi, packet):
                await ends[packet.value1].wait()
                return BridgeResponse(0x77)

        later = [WORK.with_value1(value) for value in range(10)]

        async def guest(vm):
            for value, packet in enumerate(later):
                assert (await vm.call(packet)).rax == Gate.WAIT
                ends[value].set()
            assert (await vm.call(later[9])).rax == 0x77

        _, summary = await serve(guest, Later(), in_flight=4)
        assert summary.uncollected == 9
        assert summary.retries == 1


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

    async def test_may_be_in_the_middle_of_an_access_when_the_guest_goes_on(self):
        """The access that is under way holds the answer; the next one waits for the retry."""
        slow, reading, read_on = Slow(), anyio.Event(), anyio.Event()
        slow.go_on.set()
        pages = []

        class SlowMemory(FakeGuest):
            async def read_physical(self, event, address, size):
                if address == 0x3000 - 4 and event.seq == 1:
                    reading.set()
                    await read_on.wait()
                assert event.seq in self._open, "the guest runs"
                return await super().read_physical(event, address, size)

        class Reader(Slow):
            @method(1)
            async def work(self, vmi, packet):
                pages.append(await vmi.memory.read(0x3000 - 4, 8))
                return BridgeResponse(value1=1)

        async def let_it_read(vm):
            await reading.wait()
            await anyio.sleep(3 * SOFT)
            assert not vm.writes
            read_on.set()

        async def guest(vm):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(let_it_read, vm)
                assert (await vm.call(WORK)).rax == Gate.WAIT
            vm.memory.write(0x3000 - 4, b"changed!")
            assert (await vm.call(WORK)).rax == 1

        memory = {0x3000 - 4: b"original"}
        async with SlowMemory(guest, memory=memory) as backend:
            server = BridgeServer(backend, Reader())
            assert kinds([outcome async for outcome in server.run()]) == ["waiting", "handled"]
        assert pages in ([b"original"], [b"changed!"])

    async def test_fails_after_the_hard_deadline_also_when_it_was_parked(self):
        told = []

        class Stubborn(Slow):
            @method(1)
            async def work(self, vmi, packet):
                try:
                    await vmi.memory.read(0x2000, 1) if await self.go_on.wait() else None
                    await vmi.memory.read(0x2000, 1)
                finally:
                    with pytest.raises(GuestMemoryError) as error:
                        await vmi.memory.read(0x2000, 1)
                    told.append(error.value.reason)

        slow = Stubborn()

        async def guest(vm):
            assert (await vm.call(WORK)).rax == Gate.WAIT
            slow.go_on.set()
            await anyio.sleep(10 * SOFT)
            assert (await vm.call(WORK)).rax == 0xBAD

        await serve(guest, slow, timeout=5 * SOFT, fallback=BridgeResponse(0xBAD))
        assert told == ["the trap is answered: the guest runs again"]

"""One server that owns several backends."""

from contextlib import AsyncExitStack

import anyio
import pytest
from base_handlers import HandlerWithLives

from vmibridge import (
    Bridge,
    BridgePacket,
    BridgeResponse,
    BridgeServer,
    OutcomeKind,
    method,
)
from vmibridge.errors import BackendError, HandlerLifeError, ServerStateError
from vmibridge.testing import FakeGuest

pytestmark = pytest.mark.anyio

MAGIC = 0x1234_5678
COUNT, HANG = (BridgePacket(MAGIC, 1, code) for code in (1, 2))


class Counter(HandlerWithLives):
    """Counts its requests, which is a state that guests may not share."""

    MAGIC = MAGIC
    REQUEST = 1

    def __init__(self, vm=""):
        self.vm = vm
        self.count = 0
        super().__init__()

    @method(1)
    async def next(self, vmi, packet):
        self.count += 1
        return BridgeResponse(value1=self.count).with_output(self.count)

    @method(2)
    async def hang(self, vmi, packet):
        await anyio.sleep_forever()


class Shared(Counter):
    shared = True


async def three_calls(vm):
    vm.got = [(await vm.call(COUNT)).rax for _ in range(3)]


def open_vms(stack, *guests):
    return [
        stack.enter_async_context(FakeGuest(guest, vm=name))
        for name, guest in zip(("red", "green", "blue"), guests, strict=False)
    ]


async def serve(factory, *guests, **options):
    async with AsyncExitStack() as stack:
        vms = [await vm for vm in open_vms(stack, *guests)]
        server = BridgeServer(vms, factory, **options)
        outcomes = [outcome async for outcome in server.run()]
    return vms, outcomes, server


class TestHandlers:
    async def test_are_made_for_each_vm(self):
        made = {}

        def factory(vm):
            made[vm] = Counter(vm)
            return Bridge(made[vm])

        vms, outcomes, server = await serve(factory, three_calls, three_calls)
        assert [vm.got for vm in vms] == [[1, 2, 3]] * 2
        assert {vm: handler.count for vm, handler in made.items()} == {"red": 3, "green": 3}
        assert [handler.lives for handler in made.values()] == [["entered", "left"]] * 2
        assert sorted(outcome.event.vm for outcome in outcomes) == ["green"] * 3 + ["red"] * 3
        assert {vm: summary.total for vm, summary in server.summaries.items()} == {
            "red": 3,
            "green": 3,
        }
        assert server.summary.outcomes[OutcomeKind.HANDLED] == 6
        assert not server.summary.guest.failed

    async def test_that_are_shared_are_entered_once_and_left_last(self):
        shared = Shared()
        vms, _, _ = await serve(lambda vm: shared, three_calls, three_calls)
        assert sorted(vms[0].got + vms[1].got) == [1, 2, 3, 4, 5, 6]
        assert shared.lives == ["entered", "left"]

    async def test_of_two_vms_are_not_the_same_unless_they_say_so(self):
        counter = Counter()
        with pytest.raises(ValueError, match="counter would serve several VMs"):
            await serve(lambda vm: counter, three_calls, three_calls)

    async def test_a_bridge_alone_serves_one_vm_only(self):
        with pytest.raises(ValueError, match="in a function that is given the VM's name"):
            await serve(Bridge(Counter()), three_calls, three_calls)
        vms, _, _ = await serve(Bridge(Counter()), three_calls)
        assert vms[0].got == [1, 2, 3]

    async def test_that_cannot_be_entered_end_their_vm_only(self):
        class Broken(Counter):
            async def __aenter__(self):
                raise OSError("no disk")

        outcomes = []
        async with AsyncExitStack() as stack:
            vms = [await vm for vm in open_vms(stack, three_calls, three_calls)]
            server = BridgeServer(vms, lambda vm: Broken() if vm == "red" else Counter())
            with pytest.raises(HandlerLifeError, match="no disk"):
                async for outcome in server.run():
                    outcomes.append(outcome)
        assert [outcome.event.vm for outcome in outcomes] == ["green"] * 3

    async def test_that_are_shared_and_cannot_be_entered_end_the_run_before_it_begins(self):
        class Broken(Shared):
            async def __aenter__(self):
                raise OSError("no disk")

        broken = Broken()
        with pytest.raises(HandlerLifeError, match="no disk"):
            await serve(lambda vm: broken, three_calls, three_calls)


class TestNames:
    async def test_are_different(self):
        with pytest.raises(ValueError, match="2 VMs are named 'a'"):
            BridgeServer([FakeGuest(three_calls, vm="a"), FakeGuest(three_calls, vm="a")], Counter)

    async def test_there_is_one_at_least(self):
        with pytest.raises(ValueError, match="at least one backend"):
            BridgeServer([], Bridge())


class TestEnd:
    async def test_comes_with_the_last_guest(self):
        red_is_done = anyio.Event()

        async def short(vm):
            await three_calls(vm)
            red_is_done.set()

        async def long(vm):
            await red_is_done.wait()
            await three_calls(vm)

        _, outcomes, _ = await serve(Counter, short, long)
        assert [outcome.event.vm for outcome in outcomes] == ["red"] * 3 + ["green"] * 3

    async def test_of_one_vm_by_an_error_is_told_at_the_end_of_the_others(self, caplog):
        async def lost(vm):
            raise BackendError("the VM is gone")

        async def long(vm):
            await anyio.sleep(0.02)
            await three_calls(vm)

        outcomes = []
        async with AsyncExitStack() as stack:
            vms = [await vm for vm in open_vms(stack, lost, long)]
            server = BridgeServer(vms, Counter)
            with pytest.raises(BackendError, match="the VM is gone"):
                async for outcome in server.run():
                    outcomes.append(outcome)
        assert [outcome.event.vm for outcome in outcomes] == ["green"] * 3
        assert "vm red: BackendError: the VM is gone; the other VMs run on" in caplog.text

    async def test_at_an_output_stops_all_vms(self):
        async def hang(vm):
            await vm.call(HANG)

        outcomes = []
        async with AsyncExitStack() as stack:
            vms = [await vm for vm in open_vms(stack, three_calls, hang)]
            server = BridgeServer(vms, Counter, grace=0.0)
            async for outcome in server.run(until="output"):
                outcomes.append(outcome)
        assert len(outcomes) == 1
        assert server.summaries["green"].outcomes[OutcomeKind.CANCELLED] == 1
        assert set(vms[1].writes) == {1}

    async def test_of_the_block_of_one_backend_lets_the_others_run_on(self):
        stop_blue = anyio.Event()

        async def patient(vm):
            await three_calls(vm)
            await stop_blue.wait()
            await three_calls(vm)

        async def hang(vm):
            await vm.call(HANG)

        outcomes = []
        async with FakeGuest(patient, vm="red") as red:
            async with AsyncExitStack() as inner:
                blue = await inner.enter_async_context(FakeGuest(hang, vm="blue"))
                run = BridgeServer([red, blue], Counter).run()
                for _ in range(3):
                    outcomes.append(await anext(run))
            assert set(blue.writes) == {1}
            stop_blue.set()
            outcomes += [outcome async for outcome in run]
        assert [outcome.event.vm for outcome in outcomes].count("red") == 6

    async def test_of_the_first_backends_block_ends_them_all(self):
        class Waits(Counter):
            waiting = 0

            @method(2)
            async def hang(self, vmi, packet):
                Waits.waiting += 1
                if Waits.waiting == 2:
                    both_wait.cancel()
                await anyio.sleep_forever()

        async def hang(vm):
            await vm.call(HANG)

        red, blue = FakeGuest(hang, vm="red"), FakeGuest(hang, vm="blue")
        async with blue:
            async with red:
                server = BridgeServer([red, blue], Waits)
                run = server.run()
                with anyio.CancelScope() as both_wait:
                    await anext(run)
            assert set(red.writes) == set(blue.writes) == {1}
            assert server.summary.outcomes[OutcomeKind.CANCELLED] == 2

    async def test_a_backend_that_is_not_open_is_refused(self):
        async with FakeGuest(three_calls, vm="red") as red:
            server = BridgeServer([red, FakeGuest(three_calls, vm="blue")], Counter)
            with pytest.raises(ServerStateError, match="not open"):
                server.run()

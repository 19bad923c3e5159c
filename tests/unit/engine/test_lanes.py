"""The bounded queue of traps: in order for a vCPU, and vCPUs do not wait for each other."""

from typing import Self

import anyio
import pytest
from anyio.lowlevel import checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import examples

from vmibridge.engine import lanes as module
from vmibridge.engine.lanes import Lanes
from vmibridge.errors import TrapQueueClosedError
from vmibridge.vm.trap import Registers, TrapEvent, TrapReason


def trap(seq: int, vcpu: int = 0) -> TrapEvent:
    return TrapEvent(seq, TrapReason.CPUID, Registers(), vcpu=vcpu, length=2)


def filled(capacity: int, *vcpus: int) -> tuple[Lanes, list[TrapEvent]]:
    """Lanes with a trap of each vCPU given, and those traps."""
    lanes = Lanes(capacity)
    events = [trap(seq, vcpu) for seq, vcpu in enumerate(vcpus, 1)]
    for event in events:
        lanes.put_nowait(event)
    return lanes, events


async def settle() -> None:
    """Let every task run for as long as it can: nothing here waits for time."""
    for _ in range(20):
        await checkpoint()


class Tasks:
    """Tasks that are cancelled at the end of the block, and what they ended with."""

    def __init__(self) -> None:
        self.group = anyio.create_task_group()
        self.done: list = []

    async def __aenter__(self) -> Self:
        await self.group.__aenter__()
        return self

    async def __aexit__(self, *error):
        self.group.cancel_scope.cancel()
        return await self.group.__aexit__(*error)

    async def start(self, function, *args) -> anyio.CancelScope:
        """Start it and let it run until it waits; cancel the returned scope to end it."""
        scope = anyio.CancelScope()

        async def run() -> None:
            with scope:
                try:
                    self.done.append(await function(*args))
                except TrapQueueClosedError as error:
                    self.done.append(error)

        self.group.start_soon(run)
        await settle()
        return scope


# --- order --------------------------------------------------------------------------


def test_traps_of_one_vcpu_come_in_order_and_one_at_a_time():
    lanes, (first, second, third) = filled(8, 0, 0, 0)
    assert lanes.get_nowait() is first
    assert lanes.get_nowait() is None
    lanes.release(0)
    assert lanes.get_nowait() is second
    lanes.release(0)
    assert lanes.get_nowait() is third
    lanes.release(0)
    assert lanes.get_nowait() is None


def test_a_vcpu_does_not_wait_for_another():
    lanes, (slow, behind_slow, other, another) = filled(8, 0, 0, 1, 2)
    assert [lanes.get_nowait() for _ in range(3)] == [slow, other, another]
    assert lanes.get_nowait() is None
    lanes.release(1)
    lanes.put_nowait(trap(9, 1))
    assert lanes.get_nowait().seq == 9
    lanes.release(0)
    assert lanes.get_nowait() is behind_slow


def test_a_trap_is_ready_only_when_the_one_before_is_answered():
    lanes, _ = filled(8, 0, 0)
    assert lanes.has_ready
    lanes.get_nowait()
    assert not lanes.has_ready
    lanes.release(0)
    assert lanes.has_ready


def test_a_trap_that_comes_while_its_vcpu_is_busy_waits_for_the_answer():
    lanes, (first,) = filled(8, 0)
    lanes.get_nowait()
    lanes.put_nowait(trap(2))
    assert lanes.get_nowait() is None
    lanes.release(first.vcpu)
    assert lanes.get_nowait().seq == 2


def test_the_release_of_a_vcpu_that_has_no_trap_changes_nothing():
    lanes, (event,) = filled(8, 0)
    lanes.release(7)
    assert lanes.get_nowait() is event
    lanes.release(0)
    lanes.release(0)
    assert lanes.get_nowait() is None


@settings(max_examples=examples(200))
@given(
    st.integers(1, 6),
    st.lists(
        st.tuples(st.just("put"), st.integers(0, 3))
        | st.tuples(st.just("get"), st.just(0))
        | st.tuples(st.just("release"), st.integers(0, 3)),
        max_size=60,
    ),
)
def test_lanes_agree_with_a_simple_model(capacity, steps):
    # The model: all queued traps in the order in which they came to be ready for it.
    lanes = Lanes(capacity)
    ready: list[TrapEvent] = []
    waiting: list[TrapEvent] = []
    taken: dict[int, TrapEvent] = {}

    for seq, (step, vcpu) in enumerate(steps):
        if step == "put":
            event = trap(seq, vcpu)
            if len(ready) + len(waiting) == capacity:
                with pytest.raises(anyio.WouldBlock):
                    lanes.put_nowait(event)
                continue
            lanes.put_nowait(event)
            busy = vcpu in taken or any(other.vcpu == vcpu for other in ready)
            (waiting if busy else ready).append(event)
        elif step == "get":
            event = lanes.get_nowait()
            assert event is (ready.pop(0) if ready else None)
            if event is not None:
                assert event.vcpu not in taken
                taken[event.vcpu] = event
        elif vcpu in taken:
            lanes.release(vcpu)
            del taken[vcpu]
            following = next((event for event in waiting if event.vcpu == vcpu), None)
            if following is not None:
                waiting.remove(following)
                ready.append(following)
        assert lanes.has_ready is bool(ready)

    for vcpu in taken:
        lanes.release(vcpu)
    rest = []
    while (event := lanes.get_nowait()) is not None:
        rest.append(event)
        lanes.release(event.vcpu)
    assert sorted(event.seq for event in rest) == sorted(event.seq for event in ready + waiting)
    for vcpu in range(4):
        order = [event.seq for event in rest if event.vcpu == vcpu]
        assert order == sorted(order)


# --- bounds -------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [0, -1])
def test_a_queue_holds_at_least_one_trap(capacity):
    with pytest.raises(ValueError, match="at least one trap"):
        Lanes(capacity)


@pytest.mark.parametrize("vcpus", [(0, 0, 0), (0, 1, 2), (0, 0, 1)])
def test_a_full_queue_takes_no_more_of_any_vcpu(vcpus):
    lanes, _ = filled(3, *vcpus)
    for vcpu in (0, 1, 7):
        with pytest.raises(anyio.WouldBlock):
            lanes.put_nowait(trap(9, vcpu))
    # Taken out of the queue is out of the queue; answered or not.
    lanes.get_nowait()
    lanes.put_nowait(trap(9, 7))
    with pytest.raises(anyio.WouldBlock):
        lanes.put_nowait(trap(10, 8))


@pytest.mark.anyio
async def test_a_put_waits_for_room_and_drops_nothing():
    lanes, (first,) = filled(1, 0)
    async with Tasks() as tasks:
        await tasks.start(lanes.put, trap(2, 1))
        assert tasks.done == []
        assert lanes.get_nowait() is first
        await settle()
        assert tasks.done == [None]
        assert lanes.get_nowait().seq == 2


@pytest.mark.anyio
async def test_room_comes_in_batches_of_half_the_capacity():
    lanes, _ = filled(4, 0, 1, 2, 3)
    async with Tasks() as tasks:
        for seq in (5, 6, 7):
            await tasks.start(lanes.put, trap(seq, seq))
        lanes.get_nowait()
        await settle()
        assert tasks.done == []
        lanes.get_nowait()
        await settle()
        # Two got in; the third waits for the next batch.
        assert tasks.done == [None, None]
        lanes.get_nowait()
        lanes.get_nowait()
        await settle()
        assert tasks.done == [None, None, None]


@pytest.mark.anyio
@pytest.mark.parametrize("capacity", [1, 2, 3, 7])
async def test_every_trap_gets_through_a_queue_of_any_capacity(capacity):
    lanes = Lanes(capacity)
    seen: list[tuple[int, int]] = []

    async def vcpu(number: int) -> None:
        for seq in range(10):
            await lanes.put(trap(seq, number))

    async def worker() -> None:
        while (event := await lanes.get()) is not None:
            seen.append((event.vcpu, event.seq))
            await checkpoint()
            lanes.release(event.vcpu)
            if lanes.has_ready:
                lanes.wake()

    async with anyio.create_task_group() as workers:
        for _ in range(3):
            workers.start_soon(worker)
        async with anyio.create_task_group() as vcpus:
            for number in range(5):
                vcpus.start_soon(vcpu, number)
        await lanes.quiet()
        lanes.close()
    assert len(seen) == 50
    for number in range(5):
        assert [seq for vcpu_, seq in seen if vcpu_ == number] == list(range(10))


@pytest.mark.anyio
async def test_a_put_that_is_cancelled_has_put_nothing():
    lanes, (first,) = filled(1, 0)
    async with Tasks() as tasks:
        scope = await tasks.start(lanes.put, trap(2, 1))
        scope.cancel()
        await settle()
        assert scope.cancelled_caught
        assert lanes.get_nowait() is first
        assert lanes.get_nowait() is None
        # And the room that it waited for is free for others.
        lanes.put_nowait(trap(3, 2))
        assert lanes.get_nowait().seq == 3


# --- workers that wait --------------------------------------------------------------


@pytest.mark.anyio
async def test_a_worker_waits_for_the_next_trap():
    lanes = Lanes(8)
    async with Tasks() as tasks:
        await tasks.start(lanes.get)
        assert (tasks.done, lanes.idle, lanes.attended) == ([], 1, True)
        event = trap(1)
        lanes.put_nowait(event)
        assert lanes.idle == 0
        await settle()
        assert tasks.done == [event]
        assert not lanes.attended


@pytest.mark.anyio
async def test_a_ready_trap_is_taken_without_waiting():
    lanes, (first, second) = filled(8, 0, 1)
    assert await lanes.get() is first
    assert await lanes.get() is second


@pytest.mark.anyio
async def test_a_released_trap_is_for_whoever_takes_next():
    lanes, (_, second) = filled(8, 0, 0)
    await lanes.get()
    lanes.release(0)
    assert await lanes.get() is second


@pytest.mark.anyio
async def test_one_waiting_worker_at_a_time_is_woken():
    lanes = Lanes(8)
    async with Tasks() as tasks:
        for _ in range(3):
            await tasks.start(lanes.get)
        assert lanes.idle == 3
        events = [trap(seq, seq) for seq in (1, 2, 3)]
        for event in events:
            lanes.put_nowait(event)
        assert lanes.idle == 2
        await settle()
        # It may well take the other traps too, before it has to wait for anything.
        assert tasks.done == events[:1]
        assert lanes.has_ready
        for n in (2, 3):
            assert lanes.wake()
            assert lanes.wake(), "one is on its way, which is as good"
            await settle()
            assert tasks.done == events[:n]
        assert not lanes.wake()


@pytest.mark.anyio
async def test_the_worker_that_has_waited_least_is_woken():
    lanes = Lanes(8)
    woken = []

    async def worker(name):
        woken.append((name, (await lanes.get()).seq))

    async with Tasks() as tasks:
        for name in ("first", "second", "third"):
            await tasks.start(worker, name)
        for seq in (1, 2, 3):
            lanes.put_nowait(trap(seq, seq))
            await settle()
    assert woken == [("third", 1), ("second", 2), ("first", 3)]


@pytest.mark.anyio
async def test_a_woken_worker_whose_trap_was_taken_by_another_waits_on():
    lanes = Lanes(8)
    async with Tasks() as tasks:
        await tasks.start(lanes.get)
        lanes.put_nowait(trap(1))
        assert lanes.get_nowait().seq == 1
        await settle()
        assert (tasks.done, lanes.idle) == ([], 1)
        lanes.put_nowait(trap(2, 1))
        await settle()
        assert [event.seq for event in tasks.done] == [2]


@pytest.mark.anyio
async def test_a_trap_that_waits_for_its_vcpu_wakes_nobody():
    lanes = Lanes(8)
    async with Tasks() as tasks:
        lanes.put_nowait(trap(1))
        assert lanes.get_nowait().seq == 1
        await tasks.start(lanes.get)
        lanes.put_nowait(trap(2))
        await settle()
        assert (tasks.done, lanes.idle) == ([], 1)


@pytest.mark.anyio
async def test_a_worker_that_is_cancelled_no_longer_waits():
    lanes = Lanes(8)
    async with Tasks() as tasks:
        scope = await tasks.start(lanes.get)
        scope.cancel()
        await settle()
        assert scope.cancelled_caught
        assert (lanes.idle, lanes.attended) == (0, False)
        lanes.put_nowait(trap(1))
        assert lanes.get_nowait().seq == 1


@pytest.mark.anyio
async def test_a_worker_that_is_cancelled_as_it_is_woken_loses_no_trap():
    lanes = Lanes(8)
    async with Tasks() as tasks:
        scope = await tasks.start(lanes.get)
        lanes.put_nowait(trap(1))
        scope.cancel()
        await settle()
        # Whether the trap or the cancellation came first is the event loop's affair.
        left = lanes.get_nowait()
        assert [event.seq for event in [*tasks.done, left] if event is not None] == [1]
        assert not lanes.attended
        # The next one is woken as ever.
        await tasks.start(lanes.get)
        lanes.put_nowait(trap(2, 1))
        await settle()
        assert tasks.done[-1].seq == 2


def test_a_worker_that_dies_between_its_wake_up_and_its_turn_leaves_the_trap_to_the_next(
    monkeypatch,
):
    # asyncio itself can cancel a task at that point, so the steps are taken by hand here.
    class Turn:
        def wake(self) -> None: ...

        async def wait(self) -> None:
            await self

        def __await__(self):
            yield

    monkeypatch.setattr(module, "parking", Turn)
    lanes = Lanes(8)
    workers = [lanes.get(), lanes.get()]
    for worker in workers:
        worker.send(None)
    lanes.put_nowait(trap(1))
    with pytest.raises(LookupError):
        workers[1].throw(LookupError())
    assert (lanes.has_ready, lanes.idle, lanes.attended) == (True, 1, True)
    assert lanes.wake()
    assert lanes.idle == 0
    with pytest.raises(StopIteration) as end:
        workers[0].send(None)
    assert end.value.value.seq == 1


# --- the end ------------------------------------------------------------------------


@pytest.mark.anyio
async def test_a_closed_queue_takes_no_more():
    lanes = Lanes(8)
    lanes.close()
    lanes.close()
    with pytest.raises(TrapQueueClosedError):
        lanes.put_nowait(trap(1))
    with pytest.raises(TrapQueueClosedError):
        await lanes.put(trap(1))


@pytest.mark.anyio
async def test_what_is_queued_can_be_taken_after_the_close():
    lanes, (first, other, second) = filled(8, 0, 1, 0)
    lanes.close()
    assert await lanes.get() is first
    assert await lanes.get() is other
    assert await lanes.get() is None
    lanes.release(0)
    assert await lanes.get() is second
    assert await lanes.get() is None


@pytest.mark.anyio
async def test_a_close_ends_all_that_wait_for_a_trap():
    lanes = Lanes(8)
    async with Tasks() as tasks:
        for _ in range(3):
            await tasks.start(lanes.get)
        lanes.close()
        await settle()
        assert tasks.done == [None, None, None]
        assert (lanes.idle, lanes.attended) == (0, False)


@pytest.mark.anyio
async def test_a_close_ends_all_that_wait_for_room():
    lanes, _ = filled(1, 0)
    async with Tasks() as tasks:
        for seq in (2, 3):
            await tasks.start(lanes.put, trap(seq, seq))
        lanes.close()
        await settle()
        assert [type(result) for result in tasks.done] == [
            TrapQueueClosedError,
            TrapQueueClosedError,
        ]


@pytest.mark.anyio
async def test_lanes_without_traps_are_quiet():
    lanes = Lanes(8)
    async with Tasks() as tasks:
        await tasks.start(lanes.quiet)
        assert tasks.done == [None]


@pytest.mark.anyio
async def test_lanes_are_quiet_when_every_trap_that_was_put_is_released():
    lanes, _ = filled(8, 0, 0, 1)
    async with Tasks() as tasks:
        await tasks.start(lanes.quiet)
        for vcpu in (0, 1):
            lanes.get_nowait()
            lanes.release(vcpu)
            await settle()
            assert tasks.done == []
        assert lanes.get_nowait().vcpu == 0
        await settle()
        assert tasks.done == [], "taken is not yet answered"
        lanes.release(0)
        await settle()
        assert tasks.done == [None]

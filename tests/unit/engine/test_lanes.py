"""The bounded queue of traps: in order for each vCPU, and how it ends."""

import anyio
import pytest
from anyio.lowlevel import checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from lanes_parts import Tasks, filled, settle, trap
from laws import examples

from vmibridge.engine.lanes import Lanes
from vmibridge.errors import TrapQueueClosedError
from vmibridge.vm.trap import TrapEvent

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

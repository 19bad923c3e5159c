"""The bounded queue of traps: workers that wait for the next one."""

import pytest
from lanes_parts import Tasks, filled, settle, trap

from vmibridge.engine import lanes as module
from vmibridge.engine.lanes import Lanes

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

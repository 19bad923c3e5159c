"""Where one task waits until another wakes it, on each loop."""

import math

import anyio
import pytest
from anyio._backends import _asyncio as anyio_on_asyncio

from vmibridge.aio.loops import parking

pytestmark = pytest.mark.anyio
LONG = 3600


async def test_a_task_waits_until_it_is_woken():
    place, woken = parking(), []

    async def wait():
        await place.wait()
        woken.append(True)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait)
        await anyio.wait_all_tasks_blocked()
        assert not woken
        place.wake()
    assert woken


@pytest.mark.parametrize("seconds", [-1, 0, 0.0001, 0.001])
async def test_it_waits_no_longer_than_it_is_to(seconds):
    await parking().wait_for(seconds)


@pytest.mark.parametrize("seconds", [LONG, math.inf])
async def test_one_that_is_woken_before_that_goes_on(seconds):
    place = parking()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(place.wait_for, seconds)
        await anyio.wait_all_tasks_blocked()
        place.wake()


@pytest.mark.parametrize("seconds", [None, LONG])
async def test_one_that_is_cancelled_is_woken_by_nothing(seconds):
    place = parking()
    async with anyio.create_task_group() as tasks:
        if seconds is None:
            tasks.start_soon(place.wait)
        else:
            tasks.start_soon(place.wait_for, seconds)
        await anyio.wait_all_tasks_blocked()
        tasks.cancel_scope.cancel()
    place.wake()


async def test_the_loop_is_not_kept_busy_while_a_short_time_passes(monkeypatch):
    """On uvloop, a deadline of anyio is looked at a thousand times in its last millisecond."""
    looks = []
    looking = anyio_on_asyncio.CancelScope._timeout

    def counted(scope):
        looks.append(scope)
        return looking(scope)

    monkeypatch.setattr(anyio_on_asyncio.CancelScope, "_timeout", counted)
    for _ in range(50):
        await parking().wait_for(0.001)
    assert len(looks) <= 50

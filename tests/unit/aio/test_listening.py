"""What a loop waits for from a peer, while a handler keeps the loop from hearing it."""

import socket
import time

import anyio
import pytest

from vmibridge.aio import sockets
from vmibridge.aio.listening import fail_after_listening, sleep_late, wait_listening

pytestmark = pytest.mark.anyio

ROUNDS = 12
"""Trio runs the tasks of a turn in any order: once would tell nothing."""
PATIENCE = 0.04


def stand_still():
    """As a handler that blocks: for longer than anything here is waited for."""
    time.sleep(3 * PATIENCE)


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        yield ours, theirs


async def receives(ours, event):
    """As most of what receives: a task that tells another."""
    await sockets.receive(ours, 100)
    event.set()


async def test_it_says_how_late_the_loop_was():
    async with anyio.create_task_group() as tasks:
        late, begun = 0.0, anyio.Event()

        async def sleeps():
            nonlocal late
            begun.set()
            late = await sleep_late(PATIENCE)

        tasks.start_soon(sleeps)
        await begun.wait()
        stand_still()
    assert late > PATIENCE


async def test_a_sleep_in_time_was_not_late(monkeypatch):
    now = iter((7.0, 7.0078125))
    monkeypatch.setattr("vmibridge.aio.listening.anyio.current_time", lambda: next(now))
    assert await sleep_late(0.0078125) == 0.0


class TestAnEvent:
    async def test_what_came_while_the_loop_stood_still_came_in_time(self, pair):
        ours, theirs = pair
        for _ in range(ROUNDS):
            event = anyio.Event()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(receives, ours, event)
                tasks.start_soon(wait_listening, event, PATIENCE)
                await anyio.lowlevel.checkpoint()
                theirs.send(b"here")
                stand_still()
                await wait_listening(event, PATIENCE)
                assert event.is_set()

    async def test_what_does_not_come_is_not_waited_for(self):
        event = anyio.Event()
        await wait_listening(event, PATIENCE)
        assert not event.is_set()


class TestABlock:
    async def test_it_goes_on_with_what_came_while_the_loop_stood_still(self, pair):
        ours, theirs = pair
        for _ in range(ROUNDS):
            event = anyio.Event()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(receives, ours, event)
                with fail_after_listening(PATIENCE):
                    await anyio.lowlevel.checkpoint()
                    theirs.send(b"here")
                    stand_still()
                    await event.wait()

    async def test_it_is_cut_off_when_nothing_comes(self):
        with pytest.raises(TimeoutError), fail_after_listening(PATIENCE):
            await anyio.sleep_forever()

    async def test_it_returns_at_once(self):
        with fail_after_listening(3600):
            pass

    async def test_what_it_raises_comes_out_as_it_is(self):
        with pytest.raises(OSError, match=r"^3$") as raised, fail_after_listening(3600):
            raise OSError(3)
        assert raised.value.__context__ is None

    async def test_and_out_of_a_block_that_is_cancelled(self):
        async def raises():
            try:
                await anyio.sleep_forever()
            finally:
                raise OSError(3)

        with anyio.CancelScope() as scope, pytest.raises(OSError, match=r"^3$"):  # noqa: SIM117 - what raises is the inner one
            with fail_after_listening(3600):
                scope.cancel()
                await raises()

    async def test_nothing_is_awaited_on_the_way_out(self):
        """What the block has come to, such as a connection, would be lost."""
        came_to = None
        with anyio.CancelScope() as scope:
            with fail_after_listening(3600):
                scope.cancel()
            came_to = "a connection"
        assert came_to

    async def test_a_cancellation_is_that_of_its_scope(self):
        with anyio.CancelScope() as scope:
            with fail_after_listening(3600):
                scope.cancel()
                await anyio.sleep_forever()
        assert scope.cancelled_caught

    async def test_a_group_of_its_own_stays_one(self):
        with pytest.raises(ExceptionGroup, match="two"), fail_after_listening(3600):
            raise ExceptionGroup("two", [OSError(1), OSError(2)])

"""What is done with each loop's own means behaves alike on all of them."""

import socket

import anyio
import pytest
from anyio.lowlevel import checkpoint

from vmibridge.aio.loops import parking, while_readable

pytestmark = pytest.mark.anyio


async def settle():
    for _ in range(5):
        await checkpoint()


async def test_a_parked_task_goes_on_when_it_is_woken_and_may_park_again():
    place, log = parking(), []

    async def wait():
        for number in range(3):
            await place.wait()
            log.append(number)

    place.wake()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait)
        for number in range(3):
            await settle()
            assert log == list(range(number))
            place.wake()
            place.wake()
    assert log == [0, 1, 2]


async def test_a_parked_task_that_is_cancelled_is_not_woken_any_more():
    place = parking()
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(place.wait)
            await settle()
            scope.cancel()
    assert scope.cancelled_caught
    place.wake()
    with anyio.move_on_after(0.01) as waited:
        await place.wait()
    assert waited.cancelled_caught


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs:
        yield ours, theirs


async def test_take_is_called_for_each_message_until_it_says_no(pair):
    ours, theirs = pair
    taken = []

    def take():
        taken.append(ours.recv(10))
        return taken[-1] != b"end"

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(while_readable, ours, take)
        for message in (b"a", b"b", b"end"):
            theirs.send(message)
            while not taken or taken[-1] != message:
                await checkpoint()
    theirs.send(b"later")
    await settle()
    assert taken == [b"a", b"b", b"end"]
    assert ours.recv(10) == b"later"


async def test_what_take_raises_comes_out(pair):
    ours, theirs = pair

    def take():
        raise LookupError("wrong")

    theirs.send(b"a")
    with pytest.raises(LookupError, match="wrong"):
        await while_readable(ours, take)


async def test_after_a_cancellation_take_is_not_called(pair):
    ours, theirs = pair
    taken = []
    with anyio.move_on_after(0.01):
        await while_readable(ours, lambda: taken.append(ours.recv(10)) is None)
    theirs.send(b"a")
    await settle()
    assert taken == []

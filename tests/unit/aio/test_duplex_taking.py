"""Received data is taken without a turn of the loop; errors are raised where it is received."""

import anyio
import pytest
from anyio.lowlevel import checkpoint
from socket_pairs import socket_pair

from vmibridge.aio import lookahead
from vmibridge.aio.duplex import AT_ONCE, Duplex

pytestmark = pytest.mark.anyio
MAX_UNSENT = 1 << 24


@pytest.fixture
def pair():
    with socket_pair(1 << 16) as ends:
        yield ends


class Taker:
    """Takes what comes, a piece at a time, until `b"."`."""

    def __init__(self, sock):
        self.duplex = Duplex(sock, MAX_UNSENT)
        self.taken = []

    def take(self):
        data = self.duplex.receive_now(1)
        if data == b"!":
            raise LookupError("wrong")
        self.taken.append(data)
        return data != b"."

    async def until(self, count):
        with anyio.fail_after(10):
            while len(self.taken) < count:
                await checkpoint()


async def test_each_piece_is_taken_until_it_is_said_that_it_was_the_last(pair):
    ours, theirs = pair
    taker = Taker(ours)
    theirs.send(b"abc.later")
    with anyio.fail_after(10):
        await taker.duplex.receive_each(taker.take)
    assert taker.taken == [b"a", b"b", b"c", b"."]
    taker.duplex.take_at_once()
    assert len(taker.taken) == 4


async def test_what_has_come_is_taken_at_once_so_many_times_a_turn(pair):
    ours, theirs = pair
    taker = Taker(ours)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(taker.duplex.receive_each, taker.take)
        theirs.send(b"a")
        await taker.until(1)
        theirs.send(b"b" * 100)
        for _ in range(AT_ONCE * 2):
            taker.duplex.take_at_once()
        # No turn of the loop has been since the first.
        assert len(taker.taken) == 1 + AT_ONCE
        await taker.until(101)
        # There is nothing, which it finds out.
        taker.duplex.take_at_once()
        assert taker.taken[101:] == [None]
        tasks.cancel_scope.cancel()
    taken = len(taker.taken)
    theirs.send(b"c")
    taker.duplex.take_at_once()
    assert len(taker.taken) == taken


async def test_what_is_about_to_come_is_looked_for(pair, monkeypatch):
    ours, theirs = pair
    taker = Taker(ours)
    # However long this process stood still.
    monkeypatch.setattr(lookahead, "_WITHOUT_TURN", 3600)
    monkeypatch.setattr(lookahead, "_MOMENT", 3600)
    monkeypatch.setattr(lookahead.os, "sched_yield", lambda: theirs.send(b"b"))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(taker.duplex.receive_each, taker.take)
        theirs.send(b"a")
        await taker.until(1)
        taker.duplex.look()
        assert taker.taken == [b"a", None, b"b"]
        tasks.cancel_scope.cancel()
    theirs.send(b"c")
    taker.duplex.end()
    taker.duplex.look()
    assert len(taker.taken) == 3


async def test_where_a_look_is_left_out_what_has_come_is_taken_all_the_same(pair, monkeypatch):
    ours, theirs = pair
    taker = Taker(ours)
    monkeypatch.setattr(lookahead, "_WITHOUT_TURN", -1)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(taker.duplex.receive_each, taker.take)
        theirs.send(b"a")
        await taker.until(1)
        theirs.send(b"b")
        taker.duplex.look()
        assert taker.taken == [b"a", b"b"]
        taker.duplex.look()
        assert taker.taken == [b"a", b"b", None]
        tasks.cancel_scope.cancel()


async def test_nothing_is_taken_before_somebody_receives(pair):
    ours, theirs = pair
    taker = Taker(ours)
    theirs.send(b"a")
    taker.duplex.take_at_once()
    assert ours.recv(10) == b"a"


@pytest.mark.parametrize(
    ("does", "error"),
    [
        (lambda theirs: theirs.send(b"!"), LookupError),
        (lambda theirs: theirs.close(), anyio.EndOfStream),
    ],
    ids=["raises", "end"],
)
@pytest.mark.parametrize("how", [None, "take_at_once", "look"], ids=str)
async def test_an_error_is_raised_by_the_task_that_receives(pair, does, error, how):
    ours, theirs = pair
    taker = Taker(ours)

    async def receive():
        with pytest.raises(error):
            await taker.duplex.receive_each(taker.take)

    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(receive)
            theirs.send(b"a")
            await taker.until(1)
            does(theirs)
            if how is not None:
                # The first one counts, also when it is tried once more.
                getattr(taker.duplex, how)()
                getattr(taker.duplex, how)()


async def test_a_reset_is_an_error(pair):
    ours, theirs = pair
    taker = Taker(ours)
    ours.send(b"never read")
    theirs.close()
    with pytest.raises(ConnectionResetError), anyio.fail_after(10):
        await taker.duplex.receive_each(taker.take)


async def test_who_hangs_up_ends_the_reception(pair):
    ours, _ = pair
    taker = Taker(ours)

    async def receive():
        with pytest.raises(anyio.EndOfStream):
            await taker.duplex.receive_each(taker.take)

    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(receive)
            for _ in range(10):
                await checkpoint()
            taker.duplex.hang_up()
            taker.duplex.hang_up()

"""A socket both ways, on each loop: what is kept, what is received, and how it ends."""

import os

import anyio
import pytest
from anyio.lowlevel import checkpoint
from socket_pairs import socket_pair

from vmibridge.aio.duplex import AT_ONCE, Duplex

pytestmark = pytest.mark.anyio
MAX_UNSENT = 1 << 24
LARGE = os.urandom(1 << 20)
"""More than there is room for."""


@pytest.fixture
def pair():
    with socket_pair(1 << 16) as ends:
        yield ends


async def read_all(theirs, size):
    """`size` bytes, as a slow peer reads them."""
    got = bytearray()
    with anyio.fail_after(10):
        while len(got) < size:
            await anyio.wait_readable(theirs)
            got += theirs.recv(10_000)
    return bytes(got)


async def settle():
    for _ in range(10):
        await checkpoint()


class Counted:
    """A socket that counts its system calls."""

    def __init__(self, sock):
        self.sock = sock
        self.calls = []

    def send(self, data):
        self.calls.append("send")
        return self.sock.send(data)

    def recv(self, size):
        self.calls.append("recv")
        return self.sock.recv(size)

    def fileno(self):
        return self.sock.fileno()


class TestSending:
    async def test_what_there_is_room_for_is_sent_by_one_system_call(self, pair):
        ours, theirs = pair
        counted = Counted(ours)
        duplex = Duplex(counted, MAX_UNSENT)
        assert duplex.send(b"answer")
        assert counted.calls == ["send"]
        assert theirs.recv(100) == b"answer"
        assert not duplex.unsent

    @pytest.mark.parametrize("kind", [bytes, bytearray])
    async def test_what_there_is_no_room_for_is_kept_and_sent_in_its_order(self, pair, kind):
        ours, theirs = pair
        counted = Counted(ours)
        duplex = Duplex(counted, MAX_UNSENT)
        assert not duplex.send(kind(LARGE))
        kept = len(duplex.unsent)
        assert 0 < kept < len(LARGE)
        tried = len(counted.calls)
        assert not duplex.send(b"behind")
        # There is no room yet: it is not tried.
        assert len(counted.calls) == tried
        assert len(duplex.unsent) == kept + 6
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(duplex.flush)
            assert await read_all(theirs, len(LARGE) + 6) == LARGE + b"behind"
        assert not duplex.unsent

    async def test_what_the_caller_sent_may_be_changed_afterwards(self, pair):
        ours, theirs = pair
        duplex = Duplex(ours, MAX_UNSENT)
        data = bytearray(LARGE)
        duplex.send(data)
        data.clear()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(duplex.flush)
            assert await read_all(theirs, len(LARGE)) == LARGE

    async def test_several_tasks_may_wait_for_it(self, pair):
        ours, theirs = pair
        duplex, done = Duplex(ours, MAX_UNSENT), []

        async def send(number):
            duplex.send(bytes([number]) * 100_000)
            await duplex.flush()
            done.append(number)

        async with anyio.create_task_group() as tasks:
            for number in range(5):
                tasks.start_soon(send, number)
            await settle()
            got = await read_all(theirs, 500_000)
        assert sorted(done) == list(range(5))
        # Whole, whoever was first.
        pieces = {got[at : at + 100_000] for at in range(0, 500_000, 100_000)}
        assert pieces == {bytes([number]) * 100_000 for number in range(5)}

    async def test_nothing_is_cut_when_who_waits_is_cancelled_in_the_middle(self, pair):
        ours, theirs = pair
        duplex = Duplex(ours, MAX_UNSENT)
        duplex.send(LARGE)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(duplex.flush)
            got = await read_all(theirs, 300_000)
            tasks.cancel_scope.cancel()
        assert duplex.unsent
        assert not duplex.send(b"next")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(duplex.flush)
            got += await read_all(theirs, len(LARGE) + 4 - len(got))
        assert got == LARGE + b"next"

    async def test_another_one_goes_on_when_who_waits_is_cancelled(self, pair):
        ours, theirs = pair
        duplex = Duplex(ours, MAX_UNSENT)
        duplex.send(LARGE)
        async with anyio.create_task_group() as tasks:
            scope = anyio.CancelScope()

            async def cancelled():
                with scope:
                    await duplex.flush()

            tasks.start_soon(cancelled)
            await settle()
            tasks.start_soon(duplex.flush)
            await settle()
            scope.cancel()
            assert await read_all(theirs, len(LARGE)) == LARGE

    async def test_it_may_be_tried_without_waiting(self, pair):
        ours, theirs = pair
        duplex = Duplex(ours, MAX_UNSENT)
        duplex.send(LARGE)
        kept = len(duplex.unsent)
        duplex.send_unsent()
        assert len(duplex.unsent) == kept
        got = theirs.recv(1 << 20)
        duplex.send_unsent()
        assert len(duplex.unsent) < kept
        while duplex.unsent:
            got += theirs.recv(1 << 20)
            duplex.send_unsent()
        got += theirs.recv(1 << 20)
        assert got == LARGE

    async def test_a_peer_that_does_not_read_loses_its_connection_at_the_bound(self, pair):
        ours, theirs = pair
        duplex = Duplex(ours, 10_000)
        while duplex.send(bytes(1000)):
            pass
        room = 10_000 - len(duplex.unsent)
        assert duplex.has_room(room)
        assert not duplex.has_room(room + 1)
        assert not duplex.send(bytes(room))
        with pytest.raises(OSError, match="does not read"):
            duplex.send(b"x")
        assert len(duplex.unsent) == 10_000
        # Whoever receives sees it, at both ends.
        with pytest.raises(anyio.EndOfStream):
            await duplex.receive(10)
        with anyio.fail_after(10):
            while theirs.recv(1 << 20):
                pass

    async def test_the_rest_of_one_piece_counts_too(self, pair):
        ours, _ = pair
        duplex = Duplex(ours, 10_000)
        with pytest.raises(OSError, match="does not read"):
            duplex.send(LARGE)
        assert not duplex.unsent

    async def test_a_broken_connection_is_an_error_of_whoever_sends(self, pair):
        ours, theirs = pair
        duplex = Duplex(ours, MAX_UNSENT)
        theirs.close()
        with pytest.raises(BrokenPipeError):
            duplex.send(b"x")
        assert not duplex.unsent

    async def test_it_is_one_of_whoever_waits_and_what_was_kept_stays(self, pair):
        ours, theirs = pair
        duplex = Duplex(ours, MAX_UNSENT)
        duplex.send(LARGE)

        async def flush():
            with pytest.raises(OSError):
                await duplex.flush()

        with anyio.fail_after(10):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(flush)
                await settle()
                theirs.close()
        assert duplex.unsent

    async def test_everybody_who_waits_is_woken_at_the_end(self, pair):
        ours, _ = pair
        duplex, ended = Duplex(ours, MAX_UNSENT), []
        duplex.send(LARGE)

        async def flush():
            with pytest.raises(anyio.ClosedResourceError):
                await duplex.flush()
            ended.append(1)

        with anyio.fail_after(10):
            async with anyio.create_task_group() as tasks:
                for _ in range(3):
                    tasks.start_soon(flush)
                await settle()
                duplex.end()
                ours.close()
        assert len(ended) == 3


class TestAwaiting:
    async def test_what_has_come_is_received_without_a_turn_of_the_loop(self, pair):
        ours, theirs = pair
        counted = Counted(ours)
        duplex, turns = Duplex(counted, MAX_UNSENT), []

        async def count():
            turns.append(1)

        theirs.send(b"abc")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(count)
            assert await duplex.receive(2) == b"ab"
            assert await duplex.receive(2) == b"c"
            assert not turns
            assert counted.calls == ["recv", "recv"]

    async def test_what_comes_is_waited_for(self, pair):
        ours, theirs = pair
        duplex, got = Duplex(ours, MAX_UNSENT), []

        async def receive():
            got.append(await duplex.receive(100))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(receive)
            await settle()
            assert not got
            theirs.send(b"abc")
        assert got == [b"abc"]

    async def test_others_have_their_turn_when_it_comes_all_the_time(self, pair):
        ours, theirs = pair
        duplex, seen = Duplex(ours, MAX_UNSENT), []

        async def look():
            seen.append(len(got))

        got = b""
        theirs.send(b"x" * 100)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(look)
            while len(got) < 100:
                got += await duplex.receive(1)
        # Which task is first in a turn is nobody's promise.
        assert seen[0] in (AT_ONCE, 2 * AT_ONCE)

    async def test_nothing_is_lost_when_who_receives_is_cancelled(self, pair):
        ours, theirs = pair
        duplex, got = Duplex(ours, MAX_UNSENT), bytearray()
        theirs.send(bytes(range(100)))
        while len(got) < 100:
            # Each task is cancelled at its first wait, which is for the turn of others.
            with anyio.CancelScope() as scope:
                scope.cancel()
                while len(got) < 100:
                    got += await duplex.receive(1)
        assert got == bytes(range(100))

    async def test_the_end_is_an_end(self, pair):
        ours, theirs = pair
        duplex = Duplex(ours, MAX_UNSENT)
        theirs.send(b"last")
        theirs.close()
        assert await duplex.receive(100) == b"last"
        with pytest.raises(anyio.EndOfStream):
            await duplex.receive(100)

    async def test_a_reset_is_an_error(self, pair):
        ours, theirs = pair
        duplex = Duplex(ours, MAX_UNSENT)
        ours.send(b"never read")
        theirs.close()
        with pytest.raises(ConnectionResetError):
            await duplex.receive(100)

    async def test_who_waits_is_woken_at_the_end(self, pair):
        ours, _ = pair
        duplex = Duplex(ours, MAX_UNSENT)

        async def receive():
            with pytest.raises(anyio.ClosedResourceError):
                await duplex.receive(100)

        with anyio.fail_after(10):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(receive)
                await settle()
                duplex.end()
                ours.close()
        with pytest.raises(anyio.ClosedResourceError):
            await duplex.receive(100)

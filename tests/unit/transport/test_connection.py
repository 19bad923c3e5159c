"""Frames over one connection whose peer reads slowly, or not at all."""

import anyio
import pytest
from anyio.lowlevel import checkpoint
from socket_pairs import socket_pair

from vmibridge.errors import ConnectionLostError
from vmibridge.transport.sockets.connection import Connection
from vmibridge.transport.wire import FROM_SERVER, Native

pytestmark = pytest.mark.anyio


@pytest.fixture
def pair():
    with socket_pair(1 << 14) as ends:
        yield ends


async def frames(connection, count):
    got = []
    with anyio.fail_after(10):
        while len(got) < count:
            got += await connection.receive()
    return got


async def settle():
    for _ in range(10):
        await checkpoint()


def natives(numbers):
    return [Native(seq) for seq in numbers]


async def test_what_there_is_no_room_for_is_sent_by_its_task_in_order(pair):
    connection, peer = Connection(pair[0], FROM_SERVER), Connection(pair[1], FROM_SERVER)
    posted = natives(range(5000))
    async with anyio.create_task_group() as tasks:
        for at, frame in enumerate(posted):
            connection.post(frame, later=at % 3 == 0)
        tasks.start_soon(connection.write)
        assert await frames(peer, 5000) == posted
        tasks.cancel_scope.cancel()


async def test_what_is_corked_while_there_is_no_room_comes_in_order_too(pair):
    connection, peer = Connection(pair[0], FROM_SERVER), Connection(pair[1], FROM_SERVER)
    posted = natives(range(9000))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(connection.write)
        for frame in posted[:3000]:
            connection.post(frame)
        await settle()
        connection.cork()
        for frame in posted[3000:6000]:
            connection.post(frame)
        connection.uncork()
        for frame in posted[6000:]:
            connection.post(frame)
        assert await frames(peer, 9000) == posted
        tasks.cancel_scope.cancel()


async def test_it_may_be_drained_beside_the_task_that_sends(pair):
    connection, peer = Connection(pair[0], FROM_SERVER), Connection(pair[1], FROM_SERVER)
    posted = natives(range(5000))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(connection.write)
        for frame in posted:
            connection.post(frame)
        await settle()
        tasks.start_soon(connection.drain, 10)
        assert await frames(peer, 5000) == posted
        tasks.cancel_scope.cancel()


async def test_a_peer_that_does_not_read_loses_its_connection_at_the_bound(pair):
    connection = Connection(pair[0], FROM_SERVER, unsent=10_000)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(connection.write)
        for posted in range(1 << 20):
            connection.post(Native(posted))
            if connection.closed:
                break
            if not posted % 100:
                await checkpoint()
        assert connection.closed
    with pytest.raises(ConnectionLostError, match=r"^closed by the peer$"):
        await connection.receive()

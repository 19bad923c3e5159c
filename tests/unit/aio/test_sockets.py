"""Sockets that do not block, on each loop."""

import os
import socket
import stat
from pathlib import Path

import anyio
import pytest

from vmibridge.aio import sockets
from vmibridge.errors import BackendError

pytestmark = pytest.mark.anyio


@pytest.fixture
def pair():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.setblocking(False)
        yield ours, theirs


async def test_who_receives_may_be_cancelled_as_bytes_come(pair):
    """In the turn of the loop that sees the bytes: they are received, or still there."""
    ours, theirs = pair
    scope, begin, got = anyio.CancelScope(), anyio.Event(), []

    async def receiver():
        with scope:
            got.append(await sockets.receive(ours, 10))

    async def canceller():
        await begin.wait()
        scope.cancel()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(receiver)
        tasks.start_soon(canceller)
        await anyio.wait_all_tasks_blocked()
        theirs.send(b"bytes")
        begin.set()
    if scope.cancelled_caught:
        got.append(ours.recv(10))
    assert got == [b"bytes"]


async def test_bytes_come_and_end(pair):
    ours, theirs = pair
    theirs.send(b"bytes")
    assert await sockets.receive(ours, 3) == b"byt"
    assert await sockets.receive(ours, 3) == b"es"
    theirs.close()
    with pytest.raises(anyio.EndOfStream):
        await sockets.receive(ours, 3)


async def test_more_than_there_is_room_for_is_sent_as_it_is_taken(pair):
    ours, theirs = pair
    data, got = os.urandom(3_000_000), bytearray()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(sockets.send, ours, data)
        while len(got) < len(data):
            got += await sockets.receive(theirs, 1 << 20)
    assert bytes(got) == data


async def test_a_file_descriptor_comes_with_its_bytes_and_is_dropped_where_nobody_wants_one(pair):
    ours, theirs = pair
    before = len([*Path("/proc/self/fd").iterdir()])
    with Path(os.devnull).open("rb") as file:
        for most in (1, 0):
            socket.send_fds(theirs, [b"x"], [file.fileno()])
            data, passed = await sockets.receive_fds(ours, 10, most)
            assert (data, len(passed)) == (b"x", most)
            for each in passed:
                os.close(each)
    assert len([*Path("/proc/self/fd").iterdir()]) == before


async def test_whoever_waits_for_a_socket_is_told_when_it_is_closed(pair):
    ours, _ = pair

    async def receive():
        with pytest.raises(anyio.ClosedResourceError):
            await sockets.receive(ours, 1)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(receive)
        await anyio.wait_all_tasks_blocked()
        sockets.close(ours)
        sockets.close(ours)


async def test_who_comes_to_a_socket_that_is_closed_is_told_so_too(pair):
    ours, _ = pair
    sockets.close(ours)
    with pytest.raises(anyio.ClosedResourceError):
        await sockets.receive(ours, 1)


async def test_a_listener_has_its_mode_takes_connections_and_ends_when_it_is_closed(tmp_path):
    path, taken = tmp_path / "s", []
    listener = await sockets.listen_unix(path, 0o640)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(sockets.accept, listener.socket, taken.append)
        with await sockets.connect(socket.AF_UNIX, str(path)) as connected:
            while not taken:
                await anyio.sleep(0.001)
            await sockets.send(connected, b"bytes")
            with taken[0] as peer:
                assert await sockets.receive(peer, 10) == b"bytes"
        with pytest.raises(BackendError, match=r"^address already in use$"):
            await sockets.listen_unix(path, 0o600)
        listener.close()
        listener.close()
    assert not path.exists()


async def test_a_file_that_a_dead_process_left_is_in_nobodys_way(tmp_path):
    path = tmp_path / "s"
    sockets.close((await sockets.listen_unix(path, 0o600)).socket)
    assert path.exists()
    (await sockets.listen_unix(path, 0o600)).close()


async def test_a_listener_leaves_the_file_of_one_that_has_replaced_it(tmp_path):
    path = tmp_path / "s"
    first = await sockets.listen_unix(path, 0o600)
    path.unlink()
    second = await sockets.listen_unix(path, 0o600)
    first.close()
    assert path.exists()
    second.close()
    assert not path.exists()


async def test_a_file_that_is_no_socket_is_left_alone(tmp_path):
    path = tmp_path / "s"
    path.write_text("something dear")
    with pytest.raises(BackendError, match=r"^exists, and is not a socket$"):
        await sockets.listen_unix(path, 0o600)
    assert path.read_text() == "something dear"


async def test_nobody_to_connect_to_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        await sockets.connect(socket.AF_UNIX, str(tmp_path / "none"))
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        with pytest.raises(ConnectionRefusedError):
            await sockets.connect_tcp("127.0.0.1", bound.getsockname()[1])


async def test_a_queue_that_is_full_refuses_instead_of_pretending(tmp_path):
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(0)
        with await sockets.connect(socket.AF_UNIX, path), pytest.raises(BlockingIOError):
            await sockets.connect(socket.AF_UNIX, path)

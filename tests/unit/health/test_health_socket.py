"""The health socket on each loop: who may ask, how often, and what a peer can do to it."""

import json
import os
import socket
import stat
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path

import anyio
import anyio.lowlevel
import pytest
from patience import HUNG
from waiting import until

from vmibridge.errors import ConfigError
from vmibridge.health import answers
from vmibridge.health.answers import answer_health, health_socket
from vmibridge.health.ask import ask_health
from vmibridge.health.protocol import encode_ask
from vmibridge.health.state import Health, Reason

pytestmark = pytest.mark.anyio

TURNS = 6
"""Of a loop, from a question to its answer."""


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "health.sock")


@asynccontextmanager
async def answering(path, *reasons):
    health = Health()
    health.add(lambda: reasons)
    async with health_socket(path) as listener, anyio.create_task_group() as tasks:
        tasks.start_soon(answer_health, listener, health)
        yield
        tasks.cancel_scope.cancel()


def connected(path):
    made = socket.socket(socket.AF_UNIX)
    made.connect(path)
    made.setblocking(False)
    return made


async def heard(peer):
    """All that is said to a peer, until it is hung up on."""
    data = b""
    while True:
        await anyio.wait_readable(peer)
        try:
            more = peer.recv(1 << 16)
        except ConnectionResetError:
            return data
        if not more:
            return data
        data += more


async def ask(path, check="ready"):
    with connected(path) as peer:
        peer.send(encode_ask(check))
        return json.loads((await heard(peer)).split(b"\n")[1])


async def test_it_answers_each_who_asks(path):
    async with answering(path, Reason("disk-full", "no room")):
        for check, ok in (("live", True), ("ready", False)) * 3:
            assert (await ask(path, check))["ok"] is ok


async def test_only_its_user_may_connect_and_the_file_is_gone_at_the_end(path):
    async with answering(path):
        assert stat.S_IMODE(Path(path).stat().st_mode) == 0o600
    assert not Path(path).exists()


async def test_another_user_is_hung_up_on(path, monkeypatch):
    monkeypatch.setattr(answers, "peer_user", lambda _: os.geteuid() + 1)
    async with answering(path):
        with connected(path) as peer:
            assert await heard(peer) == b""


async def test_a_peer_that_asks_late_or_in_pieces_is_answered(path, monkeypatch):
    monkeypatch.setattr(answers, "_SECONDS", HUNG)  # this process may stand still for seconds
    async with answering(path):
        with connected(path) as peer:
            for byte in encode_ask("ready"):
                await anyio.wait_all_tasks_blocked()
                peer.send(bytes([byte]))
            assert (await heard(peer)).startswith(b"pass ready\n")


async def test_silent_peers_keep_no_other_out(path):
    """And the oldest of them has to go."""
    async with answering(path):
        peers = [connected(path) for _ in range(30)]
        try:
            assert (await ask(path))["ready"]
            for peer in peers[: 30 - answers._MAX_WAITING]:
                assert await heard(peer) == b""
        finally:
            for peer in peers:
                peer.close()


async def test_a_peer_that_never_asks_is_let_go(path, monkeypatch):
    monkeypatch.setattr(answers, "_SECONDS", 0.01)
    async with answering(path):
        with connected(path) as peer:
            assert await heard(peer) == b""


@pytest.mark.parametrize(
    "data", [b"", b"\xff\n", b"GET /healthz HTTP/1.1\r\n\r\n", b"x" * 100_000], ids=range(4)
)
async def test_what_a_peer_says_and_leaves_hurts_nobody(path, data):
    async with answering(path):
        with connected(path) as peer:
            peer.send(data)
        with connected(path) as peer:
            peer.send(data)
            peer.shutdown(socket.SHUT_WR)
            await heard(peer)
        assert (await ask(path))["ready"]


async def test_a_crowd_is_paced(path):
    """Whoever connects in a loop takes a bounded share of the loop, and others get through."""
    accepted = 0

    async def connect_on():
        nonlocal accepted
        while True:
            with closing(socket.socket(socket.AF_UNIX)) as made:
                made.setblocking(False)
                try:
                    made.connect(path)
                except BlockingIOError:
                    await anyio.sleep(0.001)
                    continue
                made.send(encode_ask("ready"))
                await heard(made)
                accepted += 1

    async with answering(path), anyio.create_task_group() as tasks:
        for _ in range(8):
            tasks.start_soon(connect_on)
        begun = anyio.current_time()
        await until(lambda: accepted >= 10 * answers._BURST)
        # Two bursts may be in one period.
        assert anyio.current_time() - begun >= 8 * answers._PERIOD
        assert (await ask(path))["ready"]
        tasks.cancel_scope.cancel()


async def test_a_file_that_was_left_behind_is_replaced(path):
    with closing(socket.socket(socket.AF_UNIX)) as left:
        left.bind(path)
    async with answering(path):
        assert (await ask(path))["ready"]


async def test_another_process_at_the_path_keeps_it(path):
    async with answering(path, Reason("disk-full", "the first one")):
        with pytest.raises(ConfigError) as error:
            async with health_socket(path):
                raise AssertionError
        told = f"--health-socket {path}: address already in use; name another path"
        assert str(error.value) == told
        assert (await ask(path))["reasons"][0]["text"] == "the first one"


async def test_another_process_that_is_stopped_keeps_it_however_long_its_backlog(path):
    with closing(socket.socket(socket.AF_UNIX)) as stopped, anyio.CancelScope():
        stopped.bind(path)
        stopped.listen(0)
        waiting = []
        with pytest.raises(BlockingIOError):
            while True:
                waiting.append(socket.socket(socket.AF_UNIX))
                waiting[-1].setblocking(False)
                waiting[-1].connect(path)
        with pytest.raises(ConfigError, match="address already in use"):
            async with health_socket(path):
                raise AssertionError
        for each in waiting:
            each.close()


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("none/health.sock", "there is no folder"),
        ("x" * 200, "AF_UNIX path too long"),
        ("a-file", "exists, and is not a socket"),
    ],
)
async def test_a_path_that_cannot_be_had_is_told_in_one_line(tmp_path, name, why):
    (tmp_path / "a-file").touch()
    with pytest.raises(ConfigError) as error:
        async with health_socket(str(tmp_path / name)):
            raise AssertionError
    assert why in str(error.value)


async def test_who_asks_is_told_by_status_and_line(path, capsys):
    async with answering(path, Reason("reload-failed", "kept", None)):

        def run(**options):
            status = ask_health(path, "ready", within=60.0, **options)
            return status, capsys.readouterr()

        status, told = await anyio.to_thread.run_sync(lambda: run(as_json=False))
        assert (status, told.out, told.err) == (0, "ready; reload-failed: kept\n", "")
        status, told = await anyio.to_thread.run_sync(lambda: run(as_json=True))
        assert (status, json.loads(told.out)["ok"]) == (0, True)


async def test_a_peer_that_is_pushed_out_is_told_that_it_was_hung_up_on(path, capsys, monkeypatch):
    monkeypatch.setattr(answers, "peer_user", lambda _: os.geteuid() + 1)
    async with answering(path):
        status = await anyio.to_thread.run_sync(
            lambda: ask_health(path, "live", within=60.0, as_json=False)
        )
    told = f"vmibridge: not live: not-running: {path}: hung up without an answer\n"
    assert (status, capsys.readouterr().err) == (1, told)


async def test_a_busy_loop_answers_within_a_few_turns(path):
    """However many tasks have something to do in each: as in a flood of traps."""
    turns = 0

    async def busy():
        nonlocal turns
        while True:
            await anyio.lowlevel.checkpoint()
            turns += 1

    async def work():
        while True:
            await anyio.lowlevel.checkpoint()

    async with answering(path), anyio.create_task_group() as tasks:
        for _ in range(500):
            tasks.start_soon(work)
        tasks.start_soon(busy)
        await until(lambda: turns > 3)
        for _ in range(20):
            with connected(path) as peer:
                begun = turns
                peer.send(encode_ask("ready"))
                told = b""
                while not told:
                    await anyio.lowlevel.checkpoint()
                    with suppress(BlockingIOError):
                        told = peer.recv(1 << 16)
                assert told.startswith(b"pass ready\n")
                assert turns - begun <= TURNS
        tasks.cancel_scope.cancel()

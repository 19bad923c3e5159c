"""A loop that stood still, as under a handler that blocks, takes that for no peer's silence."""

import socket
import time

import anyio
import pytest
from nats_stages import AgentLinkStage, NatsServerStage

from vmibridge.errors import ConnectionLostError
from vmibridge.transport import AgentLimits
from vmibridge.transport.handshake import VERSION, WORD
from vmibridge.transport.session import Session
from vmibridge.transport.sockets.connection import Connection, keep_alive
from vmibridge.transport.wire import FROM_SERVER, Hello, Ping, Pong, encode_into

pytestmark = pytest.mark.anyio


class TestSockets:
    SILENCE = 0.06

    @pytest.fixture
    def pair(self):
        ours, theirs = socket.socketpair()
        with ours, theirs:
            ours.setblocking(False)
            yield ours, theirs

    async def test_a_peer_that_spoke_meanwhile_is_there(self, pair):
        ours, theirs = pair
        connection = Connection(ours, FROM_SERVER)
        word = bytearray()
        encode_into(word, Pong())
        heard = anyio.Event()

        async def receive():
            nonlocal heard
            while True:
                await connection.receive()
                heard.set()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(receive)
            tasks.start_soon(keep_alive, connection, None, self.SILENCE)
            # Trio runs the tasks of a turn in any order: once would tell nothing.
            for _ in range(12):
                heard = anyio.Event()
                await anyio.sleep(self.SILENCE / 4)
                theirs.send(word)
                time.sleep(2 * self.SILENCE)
                await heard.wait()
                assert not connection.closed
            tasks.cancel_scope.cancel()

    async def test_one_that_says_nothing_is_asked_and_then_hung_up_on(self, pair):
        ours, theirs = pair
        connection = Connection(ours, FROM_SERVER)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(keep_alive, connection, Ping(), self.SILENCE)
            with pytest.raises(ConnectionLostError):
                await connection.receive()
        asked = bytearray()
        for _ in range(2):
            encode_into(asked, Ping())
        assert theirs.recv(4096) == asked


class TestNats:
    async def test_a_server_is_not_given_up_for_it(self):
        await AgentLinkStage().run("""
            agent -> trap 1
            queue <- trap 1 at=1.1 ...
            web -> taken 1
            !! passes 60 late=59.9
            web <- ask 1 0 at=to.1
            !! passes 5.8
            web <- ask 1 0 at=to.1
            !! passes 0.4
            web <- cancel 1 at=1.1
            queue <- trap 1 at=1.2 elsewhere=yes ...
        """)

    async def test_nor_is_it_passed_by_for_the_next_trap(self):
        async with AgentLinkStage() as stage:
            await stage.play("""
                agent -> trap 1
                queue <- trap 1 at=1.1 ...
                web -> answer 1 7
                agent <- answer 1 rax=7
                !! passes 60 late=60
            """)
            now = stage.clock()
            assert stage.link._peers.heard_of(now).name == "web"

    async def test_its_word_of_the_end_is_waited_for(self):
        await AgentLinkStage().run("""
            agent -> trap 1
            queue <- trap 1 at=1.1 ...
            web -> answer 1 7
            agent <- answer 1 rax=7
            agent -> end
            web <- end ...
            !! passes 60 late=59
            !! passes 5
            agent <- ended
        """)

    async def test_an_agent_is_not_away_for_it(self):
        await NatsServerStage(limits=AgentLimits(silence=6)).run("""
            web -> hello
            web <- welcome at=hello ...
            !! passes 60 late=59
            == here=1
            !! passes 60 late=59
            == here=1
            !! passes 5
            == here=0
        """)

    async def test_one_that_says_nothing_is_away_until_it_speaks(self):
        await NatsServerStage(limits=AgentLimits(silence=6)).run("""
            web -> hello
            web <- welcome at=hello ...
            !! passes 7
            == here=0
            web -> hello
            web <- welcome at=hello ...
            == here=1
        """)


def test_an_agent_that_could_not_come_back_is_not_given_up():
    session = Session(Hello(WORD, VERSION, VERSION, b"s" * 16, "vm"), "uid:0", vcpus=4)
    session.away_since -= 100
    session.give_up_agent(50, late=99)
    assert not session.over.is_set()
    session.give_up_agent(50)
    assert not session.over.is_set()
    session.away_since -= 50
    session.give_up_agent(50)
    assert session.over.is_set()

"""Peers that send without end, or take without reading: what they cost is bounded.

How long others wait is counted in turns of the loop, and in frames between two turns; no time.
"""

from contextlib import asynccontextmanager

import anyio
import pytest
from anyio.lowlevel import checkpoint
from played_server import beside, guest_of
from remote_parts import Echo, FakeAgent, Steps, frame_of, served, talking_to, trap
from waiting import until

from vmibridge.engine.settings import ServerSettings
from vmibridge.testing import FakeGuest
from vmibridge.transport import AgentLimits
from vmibridge.transport.agent import agent as module
from vmibridge.transport.agent.traps import InFlightTraps
from vmibridge.transport.limits import MAX_PEERS, WINDOW, NewSessions
from vmibridge.transport.session import MAX_PREFETCHED, Session
from vmibridge.transport.wire import (
    MAX_PREFETCHED_PER_TRAP,
    Answer,
    Cancel,
    End,
    Ended,
    Ping,
    Pong,
    Read,
    Refused,
    Welcome,
)

pytestmark = pytest.mark.anyio


@pytest.fixture
def url(tmp_path):
    return f"unix:{tmp_path / 'serve.sock'}"


@asynccontextmanager
async def counted_by_turn(monkeypatch, owner, name):
    """How often a method is called between two turns of the loop, at the most; in a list."""
    most, calls = [0], [0]
    called = getattr(owner, name)

    def counting(self, *arguments):
        calls[0] += 1
        return called(self, *arguments)

    monkeypatch.setattr(owner, name, counting)

    async def look():
        while True:
            most[0] = max(most[0], calls[0])
            calls[0] = 0
            await checkpoint()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(look)
        yield most
        tasks.cancel_scope.cancel()


class TestAgents:
    @pytest.mark.parametrize("frame", [Ping(), Cancel(7)])
    async def test_a_flood_leaves_others_their_turns(self, url, monkeypatch, frame):
        async with (
            talking_to(url, Echo()) as (_, agent),
            counted_by_turn(monkeypatch, Session, "take") as most,
        ):
            agent.connection.cork()
            for _ in range(20_000):
                agent.post(frame)
            agent.connection.uncork()
            agent.post(frame_of(trap(1)))
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(agent.connection.write)
                while not isinstance(await agent.next(), Answer):
                    pass
                tasks.cancel_scope.cancel()
        # Of one connection 64; what came with the handshake, and the trap, beside it.
        assert 0 < most[0] <= 130

    async def test_traps_that_nobody_waits_for_are_not_kept(self, url):
        """Numbers of one vCPU that rise without an answer."""
        handler = Steps()
        settings = ServerSettings(queue=8)
        async with talking_to(url, handler, settings=settings) as (server, agent):
            for seq in range(1, 2001):
                agent.post(frame_of(trap(seq)))
                if not seq % 50:
                    agent.post(Ping())
                    while not isinstance(await agent.next(), Pong):
                        pass
                    (vm,) = server._vms.values()
                    backend = vm.current.backend
                    assert len(backend._held) <= 2
                    assert backend.unanswered <= settings.queue + 3
                    assert vm.session.open_traps == 1
            handler.go_on.set()
            while (answer := await agent.next()) != Answer(2000, 0x1003, 7):
                assert answer.seq < 2000
            await until(lambda: backend.unanswered == 0)
        assert handler.runs < 1000

    async def test_memory_that_came_along_is_bounded_and_goes_with_the_answer(self, url):
        handler = Steps()
        piece = ((0x8000, bytes(MAX_PREFETCHED_PER_TRAP)),)
        fits = MAX_PREFETCHED // MAX_PREFETCHED_PER_TRAP
        async with talking_to(url, handler) as (server, agent):
            for vcpu in range(fits + 2):
                agent.post(frame_of(trap(vcpu + 1, vcpu), memory=piece))
                agent.post(Ping())
                assert await agent.next() == Pong()
            (vm,) = server._vms.values()
            assert vm.session._prefetched == fits * MAX_PREFETCHED_PER_TRAP
            agent.post(frame_of(trap(1000, 0)))
            agent.post(Ping())
            assert await agent.next() == Pong()
            assert vm.session._prefetched == (fits - 1) * MAX_PREFETCHED_PER_TRAP
            handler.go_on.set()
            for _ in range(fits + 2):
                await agent.next()
            assert vm.session._prefetched == 0

    async def test_vms_that_begin_again_and_again_are_refused_for_a_while(self, url):
        limits = AgentLimits(new_sessions=3)
        async with served(url, Echo(), limits=limits) as server:
            said = []
            for number in range(5):
                async with FakeAgent.connected(url) as agent:
                    said.append(await agent.hello(session=bytes([number]) * 16, vm=f"vm{number}"))
                    if isinstance(said[-1], Welcome):
                        agent.post(End(()))
                        assert await agent.next() == Ended()
            assert [type(frame) for frame in said] == [Welcome] * 3 + [Refused] * 2
            assert said[-1].why == "this peer starts too many VMs: try again later"
            assert not said[-1].final
            assert server.refused == 2

    def test_each_peer_has_a_bucket_that_fills_with_time(self):
        sessions = NewSessions(4)
        assert [sessions.take("a", 0.0) for _ in range(6)] == [True] * 4 + [False] * 2
        assert sessions.take("b", 0.0)
        assert not sessions.take("a", WINDOW / 4 - 0.01)
        assert sessions.take("a", WINDOW / 4)
        assert [sessions.take("a", 100 * WINDOW) for _ in range(5)] == [True] * 4 + [False]

    def test_so_many_peers_are_remembered(self):
        sessions = NewSessions(1)
        assert sessions.take("first", 0.0)
        assert all(sessions.take(str(number), 0.0) for number in range(MAX_PEERS))
        assert sessions.take("first", 0.0)
        assert not sessions.take("first", 0.0)


class TestServers:
    async def test_a_flood_of_answers_leaves_the_vcpus_their_turns(self, url, monkeypatch):
        async with (
            counted_by_turn(monkeypatch, InFlightTraps, "answer") as most,
            beside(FakeGuest(guest_of({})), url, ends=False) as (agent, server),
            anyio.create_task_group() as tasks,
        ):
            await server.greet()
            trapped = await server.next()
            server.connection.cork()
            for _ in range(20_000):
                server.post(Answer(trapped.seq + 1, 0x1003, 1))
            server.post(Answer(trapped.seq, 0x1003, 1))
            server.connection.uncork()
            tasks.start_soon(server.connection.write)
            await until(lambda: agent.counts.answered == 1)
            assert agent.counts.late == 20_000
            tasks.cancel_scope.cancel()
        assert 0 < most[0] <= 130

    async def test_one_that_asks_for_memory_and_does_not_read_is_left(self, url):
        """600 accesses of 16 MiB: a few are done, and the trap has its fallback in time."""
        asked = []

        class Vm(FakeGuest):
            async def read_physical(self, event, address, size):
                asked.append(size)
                return bytes(size)

        vm = Vm(guest_of({}))
        async with (
            beside(vm, url, ends=False, deadline=0.5) as (agent, server),
            anyio.create_task_group() as tasks,
        ):
            await server.greet()
            trapped = await server.next()
            server.connection.cork()
            for number in range(600):
                server.post(Read(number, trapped.seq, 0, 16 << 20))
            server.connection.uncork()
            tasks.start_soon(server.connection.write)
            await until(lambda: agent.counts.own == 1)
            tasks.cancel_scope.cancel()
        assert 0 < sum(asked) <= 96 << 20

    async def test_one_that_welcomes_and_hangs_up_is_asked_less_and_less(self, url, monkeypatch):
        pauses = []
        following = module.Backoff.next

        def noted(self):
            pauses.append(following(self))
            return 0.0

        monkeypatch.setattr(module.Backoff, "next", noted)
        monkeypatch.setattr(module.random, "uniform", lambda low, high: high)
        vm = FakeGuest(guest_of({}, {}))
        async with beside(vm, url, ends=False, longest_pause=5.0) as (agent, server):
            for _ in range(4):
                await server.greet()
                server.hang_up()
            await server.greet()
            trapped = await server.next()
            server.post(Answer(trapped.seq, 0x1003, 1))
            await until(lambda: agent.counts.answered == 1)
            server.hang_up()
            await until(lambda: len(pauses) == 5)
        assert pauses == [0.05, 0.1, 0.2, 0.4, 0.05]

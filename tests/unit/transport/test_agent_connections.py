"""The agent, against a server that is played: lost connections, refusals, its stop."""

import anyio
import pytest
from played_server import INCARNATIONS, PACKET, FakeServer, beside, guest_of, welcome

from vmibridge.errors import BackendError
from vmibridge.testing import FakeGuest
from vmibridge.transport import Agent
from vmibridge.transport.wire import (
    Answer,
    End,
    Native,
    Ping,
    Pong,
    Refused,
    Returned,
)
from vmibridge.vm.trap import RegisterWrites

pytestmark = pytest.mark.anyio


class TestReconnection:
    async def test_a_trap_in_flight_is_sent_again_with_its_number(self, url):
        vm = FakeGuest(guest_of({}))
        async with beside(vm, url) as (agent, server):
            hello = await server.greet()
            first = await server.next()
            server.hang_up()
            again = await server.greet()
            assert again.session == hello.session
            second = await server.next()
            assert (second.seq, second.registers) == (first.seq, first.registers)
            assert not second.elsewhere
            assert second.left <= first.left
            server.post(Native(first.seq))
        assert (agent.counts.connections, agent.counts.sent_again) == (2, 1)

    async def test_one_that_another_incarnation_may_have_run_is_marked(self, url):
        async with beside(FakeGuest(guest_of({}, {})), url) as (_, server):
            await server.greet(welcome(INCARNATIONS[0]))
            first = await server.next()
            server.hang_up()
            for incarnation in INCARNATIONS[1:3]:
                await server.greet(welcome(incarnation))
                assert (await server.next()).elsewhere
                server.hang_up()
            await server.greet(welcome(INCARNATIONS[0]))
            assert not (await server.next()).elsewhere
            server.post(Native(first.seq))
            second = await server.next()
            assert not second.elsewhere
            server.post(Native(second.seq))

    async def test_one_that_was_given_back_is_not(self, url):
        async with beside(FakeGuest(guest_of({})), url) as (_, server):
            await server.greet(welcome(INCARNATIONS[0]))
            first = await server.next()
            server.post(Returned(first.seq))
            server.post(Returned(99))
            server.hang_up()
            await server.greet(welcome(INCARNATIONS[1]))
            assert not (await server.next()).elsewhere
            server.post(Native(first.seq))

    async def test_a_trap_that_comes_in_between_is_sent_when_there_is_a_server(self, url):
        start = anyio.Event()

        async def guest(vm):
            await start.wait()
            await vm.call(PACKET)

        async with beside(FakeGuest(guest), url) as (agent, server):
            await server.greet()
            while agent._in_flight.link is None:
                await anyio.sleep(0.001)
            server.hang_up()
            while agent._in_flight.link is not None:
                await anyio.sleep(0.001)
            start.set()
            await server.greet(welcome(INCARNATIONS[1]))
            first = await server.next()
            assert not first.elsewhere
            server.post(Native(first.seq))

    @pytest.mark.parametrize("frame", [welcome(), "garbage"], ids=["welcome", "garbage"])
    async def test_a_server_that_sends_what_it_must_not_is_left(self, url, frame):
        async with beside(FakeGuest(guest_of({})), url) as (_, server):
            await server.greet()
            first = await server.next()
            if frame == "garbage":
                server.connection._socket.send(b"\xff" * 100)
            else:
                server.post(frame)
            await server.greet()
            assert (await server.next()).seq == first.seq
            server.post(Native(first.seq))

    async def test_one_that_says_nothing_for_long_is_left(self, url):
        async with beside(FakeGuest(guest_of({})), url, silence=0.5) as (_, server):
            await server.greet()
            first = await server.next()
            await server.greet()
            assert (await server.next()).seq == first.seq
            server.post(Native(first.seq))

    async def test_one_that_answers_pings_is_not(self, url):
        start = anyio.Event()

        async def guest(vm):
            await start.wait()
            await vm.call(PACKET)

        async with beside(FakeGuest(guest), url, silence=1) as (agent, server):
            await server.greet()
            for _ in range(4):
                while not server.frames:
                    server.frames += await server.connection.receive()
                assert server.frames == [Ping()]
                server.frames.clear()
                server.post(Pong())
            start.set()
            server.post(Native((await server.next()).seq))
        assert agent.counts.connections == 1

    async def test_other_traps_that_a_server_wants_later_are_logged(self, url, caplog):
        async with beside(FakeGuest(guest_of({})), url) as (_, server):
            await server.greet()
            first = await server.next()
            server.hang_up()
            await server.greet(welcome(magics=(1, 2)))
            server.post(Native(first.seq))
        assert "wants other traps now" in caplog.text


class TestRefusal:
    async def test_a_final_one_ends_the_run(self, url):
        server = FakeServer(url)
        async with anyio.create_task_group() as tasks:
            await tasks.start(server.run)
            tasks.start_soon(server.greet, Refused("not today"))
            async with FakeGuest(guest_of({})) as vm:
                with pytest.raises(BackendError, match="not today"):
                    await Agent(vm, url).run()
            tasks.cancel_scope.cancel()

    async def test_another_one_is_tried_again(self, url):
        async with beside(FakeGuest(guest_of({})), url) as (_, server):
            await server.greet(Refused("in use", final=False))
            await server.greet()
            first = await server.next()
            # With a guest that runs, none is final.
            server.hang_up()
            await server.greet(Refused("not today"))
            await server.greet()
            server.post(Native(first.seq))


class TestStop:
    async def test_traps_in_flight_have_the_grace_period(self, url):
        async with beside(FakeGuest(guest_of({}, {})), url, grace=60) as (agent, server):
            await server.greet()
            first = await server.next()
            agent.stop()
            server.post(Answer(first.seq, 0x1003, 7))
        assert agent.counts.answered == 1
        assert agent.end.vcpus[0].reason == "stopped"

    async def test_without_it_they_get_the_fallback(self, url):
        vm = FakeGuest(guest_of({}, {}))
        async with beside(vm, url) as (agent, server):
            await server.greet()
            await server.next()
            agent.stop(now=True)
        assert vm.writes == {1: RegisterWrites(0x1003, 0xBAD)}

    async def test_before_there_is_a_server_the_guest_does_not_run(self, url):
        async with FakeGuest(guest_of({})) as vm:
            agent = Agent(vm, url)
            agent.stop()
            with anyio.fail_after(10):
                assert (await agent.run()).vcpus == ()

    async def test_without_a_server_nobody_is_told(self, url):
        start = anyio.Event()

        async def guest(vm):
            await start.wait()

        async with beside(FakeGuest(guest), url, ends=False) as (agent, server):
            await server.greet()
            server.hang_up()
            agent.stop(now=True)
            with anyio.fail_after(10):
                while not hasattr(agent, "end"):
                    await anyio.sleep(0.001)

    async def test_an_end_that_was_not_heard_is_told_again(self, url):
        async with beside(FakeGuest(guest_of()), url) as (_, server):
            await server.greet()
            assert isinstance(await server.next(), End)
            server.hang_up()
            await server.greet()

    async def test_a_server_that_has_forgotten_the_vm_by_then_has_heard_it(self, url):
        async with beside(FakeGuest(guest_of()), url, ends=False) as (agent, server):
            await server.greet()
            assert isinstance(await server.next(), End)
            server.hang_up()
            await server.greet(Refused("this VM has ended"))
            with anyio.fail_after(4):
                while not hasattr(agent, "end"):
                    await anyio.sleep(0.001)

"""The server of agents: a handler that says `shared` is one object for all its VMs."""

from contextlib import AsyncExitStack, asynccontextmanager

import anyio
import pytest
from base_handlers import HandlerWithLives
from remote_parts import FakeAgent, frame_of, served, trap
from waiting import until

from vmibridge import Bridge, BridgeHandler, BridgeResponse, method
from vmibridge.bridge.contract import STANDARD_MAGIC
from vmibridge.engine.settings import ServerSettings
from vmibridge.transport import AgentServer
from vmibridge.transport.server.shared_handlers import SharedHandlers
from vmibridge.transport.wire import End, Ended, Welcome

pytestmark = pytest.mark.anyio


@pytest.fixture
def url(tmp_path):
    return f"unix:{tmp_path / 'serve.sock'}"


class Shared(HandlerWithLives):
    """Counts its requests, which of them are under way, and its lives."""

    MAGIC = STANDARD_MAGIC
    REQUEST = 0x0100
    shared = True

    def __init__(self):
        super().__init__()
        self.count = self.under_way = self.most = 0
        self.began = anyio.Event()
        self.go_on = anyio.Event()

    @method(1)
    async def tell(self, vmi, packet):
        self.count += 1
        return BridgeResponse(value1=self.count)

    @method(2)
    async def linger(self, vmi, packet):
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        self.began.set()
        await self.go_on.wait()
        self.under_way -= 1
        return BridgeResponse(value1=7)


class Serial(Shared):
    serial = True


class Own(BridgeHandler[None]):
    """Each VM has one of its own."""

    MAGIC = STANDARD_MAGIC
    REQUEST = 0x0200


LINGER, TELL = 2, 1


@asynccontextmanager
async def agents(url, *names):
    """Played agents, welcome, each with a VM of this name."""
    async with AsyncExitStack() as stack:
        found = [await stack.enter_async_context(FakeAgent.connected(url)) for _ in names]
        for agent, name in zip(found, names, strict=True):
            assert isinstance(await agent.hello(session=name.encode() * 16, vm=name), Welcome)
        yield found


async def ask(agent, seq, code=TELL, vcpu=0):
    agent.post(frame_of(trap(seq, vcpu, code=code)))
    return (await agent.next()).rax


async def end(agent):
    agent.post(End())
    assert await agent.next() == Ended()


class TestLife:
    async def test_it_is_entered_once_for_all_vms_and_left_when_the_server_ends(self, url):
        handler, answers = Shared(), []
        async with served(url, handler) as server:
            async with agents(url, "a", "b") as (one, two):
                answers = [await ask(one, 1), await ask(two, 1), await ask(one, 2)]
                await end(one)
                await until(lambda: server.vms == ["b"])
                await end(two)
                await until(lambda: not server.vms)
            # Nobody has it for a while.
            async with agents(url, "c") as (one,):
                answers.append(await ask(one, 1))
            assert handler.lives == ["entered"]
        assert answers == [1, 2, 3, 4]
        assert handler.lives == ["entered", "left"]

    async def test_it_is_left_after_what_it_is_at(self, url):
        handler = Shared()
        settings = ServerSettings(grace=60, stop_timeout=3600)
        async with (
            served(url, handler, settings=settings) as server,
            agents(url, "a") as (agent,),
        ):
            agent.post(frame_of(trap(1, code=LINGER)))
            await handler.began.wait()
            server.stop()
            assert handler.lives == ["entered"]
            handler.go_on.set()
            assert (await agent.next()).rax == 7
        assert handler.lives == ["entered", "left"]

    async def test_one_that_no_vm_came_for_is_not_entered(self, url):
        handler = Shared()
        async with served(url, handler):
            pass
        assert handler.lives == []

    async def test_cancelled_the_server_leaves_it_too(self, url):
        handler = Shared()
        server = AgentServer([url], lambda _: handler)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(server.run)
            await server.listening.wait()
            async with agents(url, "a") as (agent,):
                agent.post(frame_of(trap(1, code=LINGER)))
                await handler.began.wait()
                tasks.cancel_scope.cancel()
        assert handler.lives == ["entered", "left"]

    async def test_traps_wait_until_it_is_entered(self, url):
        class Slow(Shared):
            async def __aenter__(self):
                self.began.set()
                await self.go_on.wait()
                return await super().__aenter__()

        handler = Slow()
        async with served(url, handler), agents(url, "a", "b") as found:
            await handler.began.wait()
            for agent in found:
                agent.post(frame_of(trap(1)))
            handler.go_on.set()
            assert sorted([(await agent.next()).rax for agent in found]) == [1, 2]
            assert handler.lives == ["entered"]

    async def test_one_that_cannot_be_entered_fails_its_vms_and_is_tried_again(self, url, caplog):
        class Fails(Shared):
            async def __aenter__(self):
                if not self.lives:
                    self.lives.append("failed")
                    raise OSError("no database")
                return await super().__aenter__()

        handler = Fails()
        async with served(url, handler) as server:
            async with agents(url, "a") as (agent,):
                assert await agent.is_hung_up_on()
            await until(lambda: not server.vms)
            async with agents(url, "a") as (agent,):
                assert await ask(agent, 1) == 1
        assert handler.lives == ["failed", "entered", "left"]
        assert "no database" in caplog.text

    async def test_one_that_ends_by_itself_ends_its_vms_and_is_entered_again(self, url, caplog):
        class Breaks(Shared):
            async def __aenter__(self):
                self.tasks = await anyio.create_task_group().__aenter__()
                self.tasks.start_soon(self.work)
                return await super().__aenter__()

            async def __aexit__(self, *error):
                await super().__aexit__(*error)
                self.tasks.cancel_scope.cancel()
                await self.tasks.__aexit__(*error)

            async def work(self):
                await self.go_on.wait()
                self.go_on = anyio.Event()
                raise OSError("the database is gone")

        handler = Breaks()
        async with served(url, handler) as server:
            async with agents(url, "a", "b") as found:
                assert [await ask(agent, 1) for agent in found] == [1, 2]
                handler.go_on.set()
                for agent in found:
                    assert await agent.is_hung_up_on()
            await until(lambda: not server.vms)
            async with agents(url, "a") as (agent,):
                assert await ask(agent, 1) == 3
        assert handler.lives == ["entered", "left"] * 2
        assert "handler breaks" in caplog.text
        assert "the database is gone" in caplog.text

    async def test_one_that_fails_at_its_end_is_logged(self, url, caplog):
        class Fails(Shared):
            async def __aexit__(self, *error):
                raise OSError("no disk")

        async with served(url, Fails()), agents(url, "a") as (agent,):
            assert await ask(agent, 1) == 1
        assert "handler fails did not end: OSError: no disk" in caplog.text

    async def test_a_vm_that_comes_as_it_is_left_waits_and_has_it_entered_again(self):
        handler, common = Shared(), SharedHandlers(1)
        ended = []

        def end():
            ended.append(handler)

        async with anyio.create_task_group() as tasks:
            async with common.use([handler], tasks, end):
                common.supersede()
            # Nobody had a turn in between: it is about to be left.
            async with common.use([handler], tasks, end):
                assert handler.lives == ["entered", "left", "entered"]
            await common.close()
        assert handler.lives == ["entered", "left"] * 2
        assert ended == []


class TestTurns:
    async def test_of_a_serial_one_hold_in_all_vms(self, url):
        handler = Serial()
        async with served(url, handler), agents(url, "a", "b") as (one, two):
            one.post(frame_of(trap(1, code=LINGER)))
            await handler.began.wait()
            two.post(frame_of(trap(1, code=LINGER)))
            # Whoever waits for the turn of another VM holds its own vCPU only.
            two.post(frame_of(trap(2, vcpu=1, magic=0x9999)))
            assert (await two.next()).seq == 2
            assert handler.most == 1
            handler.go_on.set()
            assert [(await agent.next()).rax for agent in (one, two)] == [7, 7]
        assert handler.most == 1

    async def test_of_one_that_is_not_serial_overlap(self, url):
        handler = Shared()
        async with served(url, handler), agents(url, "a", "b") as found:
            for agent in found:
                agent.post(frame_of(trap(1, code=LINGER)))
            await until(lambda: handler.most == 2)
            handler.go_on.set()

    async def test_places_in_all_are_those_of_the_server(self, url):
        """`in_flight_total` of them, whichever VM they are for."""
        handler = Shared()
        settings = ServerSettings(in_flight_total=1)
        async with served(url, handler, settings=settings), agents(url, "a", "b") as found:
            found[0].post(frame_of(trap(1, code=LINGER)))
            await handler.began.wait()
            found[1].post(frame_of(trap(1, code=LINGER)))
            found[1].post(frame_of(trap(2, vcpu=1, magic=0x9999)))
            assert (await found[1].next()).seq == 2
            assert handler.most == 1
            handler.go_on.set()
            assert [(await agent.next()).rax for agent in found] == [7, 7]
        assert handler.most == 1


class TestReload:
    async def test_the_old_one_ends_what_it_is_at_and_the_new_one_has_the_rest(self, url):
        old, new = Shared(), Shared()
        new.count = 100
        settings = ServerSettings(timeout=3600)
        async with served(url, old, settings=settings) as server:
            async with agents(url, "a", "b") as (one, two):
                one.post(frame_of(trap(1, code=LINGER)))
                await old.began.wait()
                assert await server.reload(lambda _: Bridge(new)) == 2
                assert [await ask(two, 1), await ask(one, 2, vcpu=1)] == [101, 102]
                assert (old.lives, new.lives) == (["entered"], ["entered"])
                old.go_on.set()
                assert (await one.next()).rax == 7
                await until(lambda: old.lives == ["entered", "left"])
                assert await ask(two, 2) == 103
            assert new.lives == ["entered"]
        assert (old.count, old.lives) == (0, ["entered", "left"])
        assert new.lives == ["entered", "left"]

    async def test_one_that_the_new_handlers_have_too_goes_on(self, url):
        handler = Shared()
        async with served(url, handler) as server:
            async with agents(url, "a") as (agent,):
                assert await ask(agent, 1) == 1
                assert await server.reload(lambda _: Bridge(handler, Own())) == 1
                assert await ask(agent, 2) == 2
                await end(agent)
                await until(lambda: not server._handler_sets)
            async with agents(url, "b") as (agent,):
                assert await ask(agent, 1) == 3
            assert handler.lives == ["entered"]
        assert handler.lives == ["entered", "left"]

    async def test_one_that_nobody_has_is_left(self, url):
        old, new = Shared(), Shared()
        async with served(url, old) as server:
            async with agents(url, "a") as (agent,):
                await ask(agent, 1)
                await end(agent)
                await until(lambda: not server.vms)
            assert old.lives == ["entered"]
            await server.reload(lambda _: Bridge(new))
            await until(lambda: old.lives == ["entered", "left"])
        assert new.lives == []

    async def test_one_that_cannot_be_entered_leaves_the_vms_theirs(self, url, caplog):
        class Fails(Shared):
            async def __aenter__(self):
                raise OSError("no database")

        old = Shared()
        async with served(url, old) as server, agents(url, "a", "b") as found:
            assert await server.reload(lambda _: Bridge(Fails())) == 0
            assert [await ask(agent, 1) for agent in found] == [1, 2]
            assert old.lives == ["entered"]
        assert old.lives == ["entered", "left"]
        assert "no database" in caplog.text

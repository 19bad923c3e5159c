"""The server of agents: how a VM ends, and how the server does."""

import asyncio

import anyio
import pytest
from remote_parts import Echo, FakeAgent, Steps, frame_of, served, talking_to, trap
from server_stage import welcome

from vmibridge import BridgeResponse, method
from vmibridge.engine.settings import ServerSettings
from vmibridge.errors import BackendError, BackendSpecError, ServerStateError
from vmibridge.transport import AgentLimits, AgentServer
from vmibridge.transport.wire import End, Ended, Refused, Welcome, WireEnd

pytestmark = pytest.mark.anyio
FALLBACK = ServerSettings(fallback=BridgeResponse(value1=0xBAD))


@pytest.fixture
def url(tmp_path):
    return f"unix:{tmp_path / 'serve.sock'}"


class TestTheEnd:
    async def test_it_comes_with_that_of_the_guest(self, url):
        ended = []

        async def on_end(vm, summary, counts):
            ended.append((vm, summary))

        async with talking_to(url, Echo(), on_end=on_end) as (server, agent):
            agent.post(frame_of(trap(1)))
            await agent.next()
            agent.post(End((WireEnd(0, "halted", "", {"rax": 5}),)))
            assert await agent.next() == Ended()
            while server.vms:
                await anyio.sleep(0.001)
        (vm, summary) = ended[0]
        assert (vm, summary.total) == ("vm", 1)
        assert summary.guest.vcpus[0].registers == {"rax": 5}

    async def test_an_agent_that_did_not_hear_of_it_is_told_again(self, url):
        async with welcome(url) as stage:
            await stage.play("""
                -> end
                <- ended
                ** ended vm 0 halted ""
                !! connects again
                again -> hello
                again <- refused "has ended"
                again ** hung-up
                == vms=0
            """)

    async def test_handlers_that_are_at_work_then_are_cancelled(self, url):
        async with welcome(url) as stage:
            await stage.play("""
                -> trap 1
                ** begins 1
                -> end
                ** cancelled 1
                <- ended
                <- answer 1 rax=0xbad
                ** ended vm 1 halted ""
            """)

    async def test_the_host_may_end_one_vm_and_no_other(self, url):
        ended = []

        async def on_end(vm, summary, counts):
            ended.append((vm, summary.guest and summary.guest.vcpus[0].detail))

        async with (
            talking_to(url, Echo(), on_end=on_end) as (server, agent),
            FakeAgent.connected(url) as other,
        ):
            await other.hello(session=b"o" * 16, vm="other")
            agent.post(frame_of(trap(1)))
            await agent.next()
            assert server.end("vm", "its guest has exited")
            assert await agent.is_hung_up_on()
            while "vm" in server.vms:
                await anyio.sleep(0.001)
            assert ended == [("vm", "its guest has exited")]
            assert not server.end("vm", "it has gone")
            # Its agent comes back in vain, and the other one is answered.
            async with FakeAgent.connected(url) as again:
                assert await again.hello() == Refused("this VM has ended")
            other.post(frame_of(trap(1)))
            assert (await other.next()).seq == 1
            assert server.vms == ["other"]

    async def test_a_handler_that_is_at_work_when_the_host_ends_its_vm_may_finish(self, url):
        steps = Steps()
        async with talking_to(url, steps) as (server, agent):
            agent.post(frame_of(trap(1)))
            await steps.began.wait()
            assert server.end("vm", "enough")
            steps.go_on.set()
            assert (await agent.next()).seq == 1
            assert await agent.is_hung_up_on()

    async def test_a_vm_whose_agent_stays_away_is_given_up(self, url):
        async with welcome(url, limits=AgentLimits(keep=0.05)) as stage:
            await stage.play("""
                !! hangs-up
                ** ended vm 0 lost ...
                == vms=0
            """)

    async def test_an_agent_that_is_silent_is_hung_up_on(self, url):
        async with talking_to(url, Echo(), limits=AgentLimits(silence=0.05)) as (server, agent):
            assert await agent.is_hung_up_on()
            assert server.vms == ["vm"]

    async def test_handlers_that_fail_at_their_start_hang_up(self, url, caplog):
        class Broken(Echo):
            async def __aenter__(self):
                raise RuntimeError("no database")

        async with served(url, Broken()), FakeAgent.connected(url) as agent:
            await agent.hello()
            assert await agent.is_hung_up_on()
        assert "no database" in caplog.text

    @pytest.mark.parametrize(
        "error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit(), asyncio.CancelledError()]
    )
    async def test_whatever_a_handler_raises_ends_its_trap_alone(self, url, error):
        class Raises(Echo):
            @method(1)
            async def invert(self, vmi, packet):
                raise error

        async with (
            served(url, Raises()) as server,
            FakeAgent.connected(url) as agent,
            FakeAgent.connected(url) as other,
        ):
            await agent.hello()
            await other.hello(session=b"t" * 16, vm="other")
            agent.post(frame_of(trap(1)))
            await agent.next()
            assert sorted(server.vms) == ["other", "vm"]

    @pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()])
    async def test_handlers_that_cannot_be_entered_end_no_other_vm(self, url, error):
        class Broken(Echo):
            async def __aenter__(self):
                if self.first:
                    raise error

        Broken.first = True
        async with served(url, Broken()) as server, FakeAgent.connected(url) as agent:
            await agent.hello()
            assert await agent.is_hung_up_on()
            Broken.first = False
            async with FakeAgent.connected(url) as other:
                await other.hello(session=b"t" * 16, vm="other")
                assert server.vms == ["other"]


class TestStop:
    async def test_what_is_at_work_is_answered_and_what_comes_is_given_back(self, url):
        settings = ServerSettings(grace=60, stop_timeout=3600)
        async with welcome(url, settings=settings) as stage:
            await stage.play("""
                -> trap 1
                ** begins 1
                !! stops
                -> trap 2 vcpu=1
                <- returned 2
            """)
            with pytest.raises(OSError):
                async with FakeAgent.connected(url):
                    pass
            await stage.play("""
                !! finishes 1 7
                <- answer 1 rax=7
                ** hung-up
                ** ended vm 1
            """)

    async def test_each_vm_is_told_of_to_the_end(self, url):
        told = []

        async def on_end(vm, summary, counts):
            # As one that writes somewhere does.
            await anyio.sleep(0.01)
            told.append((vm, summary.total))

        async with talking_to(url, Echo(), on_end=on_end) as (server, agent):
            agent.post(frame_of(trap(1)))
            await agent.next()
            server.stop()
            assert await agent.is_hung_up_on()
        assert told == [("vm", 1)]

    async def test_it_runs_once(self, url):
        async with served(url, Echo()) as server:
            with pytest.raises(ServerStateError):
                await server.run()

    async def test_a_place_that_is_taken_is_an_error(self, url):
        async with served(url, Echo()):
            with pytest.raises(BackendError, match="address already in use"):
                await AgentServer([url], lambda _: Echo()).run()

    async def test_so_is_a_port_that_is_taken(self):
        async with served("tcp:127.0.0.1:0", Echo()) as server:
            url = f"tcp:127.0.0.1:{server.ports[0]}"
            with pytest.raises(BackendError, match="in use"):
                await AgentServer([url], lambda _: Echo()).run()

    async def test_and_a_folder_that_is_not_there(self, tmp_path):
        with pytest.raises(BackendError, match="there is no folder"):
            await AgentServer([f"unix:{tmp_path}/no/x.sock"], lambda _: Echo()).run()

    async def test_of_several_places_none_is_left_when_one_cannot_be_had(self, url):
        async with served("tcp:127.0.0.1:0", Echo()) as server:
            taken = f"tcp:127.0.0.1:{server.ports[0]}"
            with pytest.raises(BackendError):
                await AgentServer([url, taken], lambda _: Echo()).run()
        async with served(url, Echo()), FakeAgent.connected(url) as agent:
            assert isinstance(await agent.hello(), Welcome)

    async def test_a_name_is_listened_at_with_all_its_addresses(self):
        async with served("tcp:localhost:0", Echo()) as server:
            where = f"tcp:localhost:{server.ports[0]}"
            async with FakeAgent.connected(where) as agent:
                assert isinstance(await agent.hello(), Welcome)

    async def test_a_port_that_nobody_listens_at_is_an_error(self):
        async with served("tcp:127.0.0.1:0", Echo()) as server:
            port = server.ports[0]
        with pytest.raises(OSError, match="refused"):
            async with FakeAgent.connected(f"tcp:127.0.0.1:{port}"):
                pass

    async def test_a_file_that_is_no_socket_is_left_alone(self, tmp_path):
        path = tmp_path / "file"
        path.write_text("text")
        with pytest.raises(BackendError, match="not a socket"):
            await AgentServer([f"unix:{path}"], lambda _: Echo()).run()
        assert path.read_text() == "text"

    async def test_a_url_that_is_wrong_is_told(self):
        with pytest.raises(BackendSpecError):
            AgentServer(["tcp:0.0.0.0:1"], lambda _: Echo())

    async def test_cancelled_it_answers_what_is_at_work(self, url):
        handler = Steps()
        server = AgentServer([url], lambda _: handler, settings=FALLBACK)
        async with anyio.create_task_group() as tasks:
            scope = anyio.CancelScope()

            async def run():
                with scope:
                    await server.run()

            tasks.start_soon(run)
            await server.listening.wait()
            async with FakeAgent.connected(url) as agent:
                await agent.hello()
                agent.post(frame_of(trap(1)))
                await handler.began.wait()
                scope.cancel()
                assert (await agent.next()).rax == 0xBAD

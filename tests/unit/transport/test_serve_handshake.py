"""The server of agents: who is welcome, and who is told why not."""

import pytest
from remote_parts import Echo, FakeAgent, served, serving, talking_to
from server_stage import welcome

from vmibridge import BridgeResponse, method
from vmibridge.bridge.contract import STANDARD_MAGIC, GuestRead
from vmibridge.engine.settings import ServerSettings
from vmibridge.transport import AgentLimits, AgentServer, wire
from vmibridge.transport.wire import Ping, Refused, Welcome

pytestmark = pytest.mark.anyio
FALLBACK = ServerSettings(fallback=BridgeResponse(value1=0xBAD))


@pytest.fixture
def url(tmp_path):
    return f"unix:{tmp_path / 'serve.sock'}"


class TestHandshake:
    async def test_an_agent_is_told_what_to_do(self, url):
        class Slow(Echo):
            reads = (GuestRead(1, 64, method=2),)

            @method(1, timeout=7.5)
            async def invert(self, vmi, packet): ...

        async with talking_to(url, Slow(), settings=FALLBACK, limits=AgentLimits(vcpus=9)) as (
            _,
            agent,
        ):
            told = agent.welcome
        assert (told.version, told.vcpus, told.timeout) == (1, 9, 7500)
        assert told.magics == (STANDARD_MAGIC,)
        assert not told.any_hypercall
        assert told.fallback == (0xBAD, None, None, None)
        assert [wire.guest_read(each) for each in told.reads] == [GuestRead(1, 64, method=2)]

    @pytest.mark.parametrize(
        ("fields", "why"),
        [
            ({"word": "other"}, "not an agent"),
            ({"version": 9, "oldest": 2}, "versions 2 to 9"),
            ({"vm": "a\x1b[2J"}, "printable"),
        ],
    )
    async def test_one_that_is_not_understood_is_told_why(self, url, fields, why):
        async with served(url, Echo()) as server, FakeAgent.connected(url) as agent:
            told = await agent.hello(**fields)
            assert isinstance(told, Refused)
            assert why in told.why
            assert told.final
            assert await agent.is_hung_up_on()
        assert server.refused == 1

    async def test_a_newer_agent_that_still_speaks_this_version_is_welcome(self, url):
        async with served(url, Echo()), FakeAgent.connected(url) as agent:
            assert (await agent.hello(version=9, oldest=1)).version == 1

    @pytest.mark.parametrize(
        "data",
        [b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 100, wire.encode(Ping()), b"\3\0\0\0\xc1\xc1\xc1"],
    )
    async def test_a_peer_that_says_something_else_is_hung_up_on(self, url, data):
        async with served(url, Echo()), FakeAgent.connected(url) as agent:
            agent.connection._socket.send(data)
            assert await agent.is_hung_up_on()

    async def test_something_behind_hello_is_too_soon(self, url):
        async with served(url, Echo()), FakeAgent.connected(url) as agent:
            agent.connection.cork()
            agent.post(wire.Hello("vmibridge", 1, 1, b"s" * 16, "vm"))
            agent.post(Ping())
            agent.connection.uncork()
            assert await agent.is_hung_up_on()

    async def test_a_peer_that_says_nothing_is_hung_up_on(self, url):
        limits = AgentLimits(handshake=0.05)
        async with served(url, Echo(), limits=limits), FakeAgent.connected(url) as agent:
            assert await agent.is_hung_up_on()

    async def test_of_too_many_that_say_nothing_the_oldest_goes(self, url):
        limits = AgentLimits(handshakes=2, handshake=60)
        async with (
            served(url, Echo(), limits=limits),
            FakeAgent.connected(url) as first,
            FakeAgent.connected(url),
            FakeAgent.connected(url) as third,
        ):
            assert await first.is_hung_up_on()
            assert isinstance(await third.hello(), Welcome)

    async def test_handlers_that_cannot_be_made_refuse_for_now(self, url, caplog):
        def broken(vm):
            raise RuntimeError("no database")

        async with serving(AgentServer([url], broken)), FakeAgent.connected(url) as agent:
            told = await agent.hello()
            assert isinstance(told, Refused)
            assert not told.final
        assert "no database" in caplog.text

    async def test_a_name_that_is_taken_is_refused_while_its_vm_is_there(self, url):
        async with welcome(url) as stage:
            await stage.play("""
                !! connects other
                other -> hello session=new
                other <- refused "name vm" final=no
                other ** hung-up
                == vms=1 refused=1
                -> ping
                <- pong
            """)

    async def test_a_vm_that_was_started_anew_takes_the_place_of_the_one_before(self, url):
        async with welcome(url) as stage:
            await stage.play("""
                !! hangs-up
                !! noticed
                !! connects other
                other -> hello session=new
                other <- welcome ...
                ** ended vm 0 lost "its agent restarted"
                == vms=1 incarnations=2
            """)

    async def test_and_what_the_one_before_was_at_is_cancelled(self, url):
        async with welcome(url) as stage:
            await stage.play("""
                -> trap 1
                ** begins 1
                !! hangs-up
                !! noticed
                !! connects other
                other -> hello session=new
                other <- welcome ...
                ** cancelled 1
                ** ended vm 1 lost "its agent restarted"
            """)

    async def test_a_hello_of_the_one_before_that_comes_late_does_not_take_it_back(self, url):
        async with welcome(url) as stage:
            await stage.play("""
                !! connects late
                !! hangs-up
                !! noticed
                !! connects other
                other -> hello session=new
                other <- welcome ...
                ** ended vm 0 lost "its agent restarted"
                !! hangs-up other
                !! noticed             # it is away for a moment, and still the one of that name
                late -> hello
                late <- refused "this VM has ended"
                late ** hung-up
                !! connects again
                again -> hello session=new
                again <- welcome ...
                == vms=1 incarnations=2
            """)

    async def test_a_hello_of_this_one_that_comes_late_loses_no_trap(self, url):
        async with welcome(url) as stage:
            await stage.play("""
                !! connects late
                -> trap 1 value=5 code=2
                ** inverts 5
                <- answer 1 rax=~5
                late -> hello          # what comes last is the connection
                late <- welcome ...
                ** hung-up
                !! connects again      # so the agent has to come again
                again -> hello
                again <- welcome ...
                late ** hung-up
                again -> trap 1 value=5 code=2
                again <- answer 1 rax=~5
            """)

    async def test_a_second_hello_over_one_connection_loses_it_and_no_trap(self, url):
        async with welcome(url) as stage:
            await stage.play("""
                -> trap 1
                ** begins 1
                -> hello
                ** hung-up
                !! connects again
                again -> hello
                again <- welcome ...
                again -> trap 1
                !! finishes 1 7
                again <- answer 1 rax=7
            """)

    async def test_more_vms_than_allowed_are_refused(self, url):
        async with welcome(url, limits=AgentLimits(sessions=1)) as stage:
            await stage.play("""
                !! connects other
                other -> hello session=new vm=other
                other <- refused "limit" final=no
                other ** hung-up
            """)

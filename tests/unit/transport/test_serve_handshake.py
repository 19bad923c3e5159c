"""The server of agents: who is welcome, and who is told why not."""

import anyio
import pytest
from remote_parts import Echo, FakeAgent, frame_of, served, serving, talking_to, trap, until

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
            ({"word": "other"}, "no agent"),
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
        async with talking_to(url, Echo()), FakeAgent.connected(url) as other:
            told = await other.hello(session=b"t" * 16)
            assert "name vm" in told.why
            assert not told.final

    async def test_a_vm_that_was_started_anew_takes_the_place_of_the_one_before(self, url):
        ended = []

        async def on_end(vm, summary, counts):
            ended.append(summary.guest and summary.guest.vcpus[0].detail)

        async with served(url, Echo(), on_end=on_end):
            async with FakeAgent.connected(url) as agent:
                await agent.hello()
            told = None
            while not isinstance(told, Welcome):
                # At first it may not have seen that the other one has hung up.
                async with FakeAgent.connected(url) as other:
                    told = await other.hello(session=b"t" * 16)
            while not ended:
                await anyio.sleep(0.001)
            assert ended[0] == "its agent began anew"

    async def test_a_hello_of_the_one_before_that_comes_late_does_not_take_it_back(self, url):
        async with served(url, Echo()) as server, FakeAgent.connected(url) as late:
            async with FakeAgent.connected(url) as agent:
                await agent.hello()
            told = None
            while not isinstance(told, Welcome):
                async with FakeAgent.connected(url) as other:
                    told = await other.hello(session=b"t" * 16)
            # The new one is away for a moment, and it is still the one of that name.
            await until(lambda: all(vm.session.link is None for vm in server._vms.values()))
            told = await late.hello()
            assert (type(told), told.final) == (Refused, True)
            async with FakeAgent.connected(url) as again:
                assert isinstance(await again.hello(session=b"t" * 16), Welcome)

    async def test_a_hello_of_this_one_that_comes_late_loses_no_trap(self, url):
        handler = Echo()
        async with talking_to(url, handler) as (_, agent), FakeAgent.connected(url) as late:
            agent.post(frame_of(trap(1, value=5)))
            first = await agent.next()
            # What comes last is the connection: the agent has to come again.
            assert isinstance(await late.hello(), Welcome)
            assert await agent.is_hung_up_on()
            async with FakeAgent.connected(url) as again:
                await again.hello()
                again.post(frame_of(trap(1, value=5)))
                assert await again.next() == first
                assert await late.is_hung_up_on()
        assert handler.asked == [5]

    async def test_more_vms_than_allowed_are_refused(self, url):
        async with (
            talking_to(url, Echo(), limits=AgentLimits(sessions=1)),
            FakeAgent.connected(url) as other,
        ):
            assert "no more" in (await other.hello(session=b"t" * 16, vm="other")).why

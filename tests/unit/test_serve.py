"""The server of agents, against an agent that is played here."""

from contextlib import asynccontextmanager

import anyio
import msgspec
import pytest
from remote_parts import Echo, FakeAgent, carry, frame_of, served, serving, trap

from vmibridge import BridgeHandler, BridgePacket, BridgeResponse, BridgeServer, method
from vmibridge.contract import STANDARD_MAGIC, GuestRead
from vmibridge.errors import BackendError, BackendSpecError, ServerStateError
from vmibridge.outcome import OutcomeKind
from vmibridge.response import BridgeResponse as Response
from vmibridge.settings import ServerSettings
from vmibridge.testing import FakeGuest
from vmibridge.transport import AgentLimits, AgentServer, RemoteBackend, wire
from vmibridge.transport.wire import (
    Answer,
    Cancel,
    End,
    Ended,
    Memory,
    Native,
    Ping,
    Pong,
    Read,
    Refused,
    Returned,
    Welcome,
    WireEnd,
)

pytestmark = pytest.mark.anyio
MASK = (1 << 64) - 1
FALLBACK = ServerSettings(fallback=Response(value1=0xBAD))


@pytest.fixture
def url(tmp_path):
    return f"unix:{tmp_path / 'serve.sock'}"


class Steps(BridgeHandler[str]):
    """Waits for what a test does; says where it is."""

    MAGIC = STANDARD_MAGIC
    REQUEST = 0x0100

    def __init__(self):
        self.began = anyio.Event()
        self.go_on = anyio.Event()
        self.cancelled = anyio.Event()
        self.runs = 0

    @method(1)
    async def linger(self, vmi, packet):
        self.runs += 1
        self.began.set()
        try:
            await self.go_on.wait()
        except anyio.get_cancelled_exc_class():
            self.cancelled.set()
            raise
        return BridgeResponse(value1=7)

    @method(2)
    async def read(self, vmi, packet):
        self.began.set()
        return BridgeResponse(value1=len(await vmi.memory.read(packet.value1, 4)))

    @method(3)
    async def write(self, vmi, packet):
        await vmi.memory.write(packet.value1, b"abcd")
        return BridgeResponse(value1=len(await vmi.memory.read(packet.value1, 4)))

    @method(4)
    async def read_much(self, vmi, packet):
        data = await vmi.memory.read(packet.value1, 2 << 20)
        return BridgeResponse(value1=len(data))


@asynccontextmanager
async def talking_to(url, *handlers, **options):
    """A server, and an agent that is played and welcome."""
    async with served(url, *handlers, **options) as server, FakeAgent.connected(url) as agent:
        agent.welcome = await agent.hello()
        assert isinstance(agent.welcome, Welcome)
        yield server, agent


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

    async def test_more_vms_than_allowed_are_refused(self, url):
        async with (
            talking_to(url, Echo(), limits=AgentLimits(sessions=1)),
            FakeAgent.connected(url) as other,
        ):
            assert "no more" in (await other.hello(session=b"t" * 16, vm="other")).why


class TestTraps:
    async def test_one_gets_its_answer(self, url):
        handler = Echo()
        async with talking_to(url, handler) as (_, agent):
            agent.post(frame_of(trap(1, value=5)))
            answer = await agent.next()
            assert (answer.seq, answer.rip, answer.rax) == (1, 0x1003, ~5 & MASK)
            agent.post(frame_of(trap(2, magic=0x9999)))
            assert await agent.next() == Native(2)
        assert handler.asked == [5]

    async def test_one_that_comes_again_gets_the_same_answer_and_runs_once(self, url):
        handler = Echo()
        async with talking_to(url, handler) as (_, agent):
            agent.post(frame_of(trap(1, value=5)))
            first = await agent.next()
            agent.connection.close()
            async with FakeAgent.connected(url) as again:
                assert (await again.hello()).memory == agent.welcome.memory
                again.post(frame_of(trap(1, value=5)))
                assert await again.next() == first
        assert handler.asked == [5]

    async def test_one_that_is_still_handled_is_answered_where_it_came_from_last(self, url):
        handler = Steps()
        async with talking_to(url, handler) as (_, agent):
            agent.post(frame_of(trap(1)))
            await handler.began.wait()
            # The first connection is still there: the new one takes its place.
            async with FakeAgent.connected(url) as again:
                await again.hello()
                assert await agent.is_hung_up_on()
                again.post(frame_of(trap(1)))
                handler.go_on.set()
                assert (await again.next()).rax == 7
        assert handler.runs == 1

    async def test_one_that_was_lost_on_its_way_is_run(self, url):
        async with talking_to(url, Echo()) as (_, agent):
            agent.post(frame_of(trap(1)))
            await agent.next()
            agent.connection.close()
            async with FakeAgent.connected(url) as again:
                await again.hello()
                again.post(frame_of(trap(2, value=6)))
                assert (await again.next()).rax == ~6 & MASK

    async def test_one_that_may_have_run_elsewhere_is_refused_and_told(self, url, caplog):
        handler, counts = Echo(), []

        async def on_end(vm, summary, told):
            counts.append(told)

        async with talking_to(url, handler, settings=FALLBACK, on_end=on_end) as (_, agent):
            for seq, vcpu in ((1, 0), (2, 1)):
                agent.post(frame_of(trap(seq, vcpu), elsewhere=True))
                assert await agent.next() == Answer(seq, 0x1003, 0xBAD)
            agent.post(frame_of(trap(1), elsewhere=True))
            assert await agent.next() == Answer(1, 0x1003, 0xBAD)
        assert handler.asked == []
        assert caplog.text.count("it may have run there") == 1
        assert (counts[0]["refused"], counts[0]["repeated"]) == (2, 1)

    async def test_or_it_is_run_where_that_is_wanted(self, url):
        handler = Echo()
        async with talking_to(url, handler, repeated="run") as (_, agent):
            agent.post(frame_of(trap(1, value=5), elsewhere=True))
            assert (await agent.next()).rax == ~5 & MASK

    async def test_one_with_an_old_number_is_dropped(self, url):
        async with talking_to(url, Echo()) as (_, agent):
            agent.post(frame_of(trap(2)))
            await agent.next()
            agent.post(frame_of(trap(1)))
            agent.post(Ping())
            assert await agent.next() == Pong()

    async def test_more_vcpus_than_allowed_lose_the_connection(self, url):
        async with talking_to(url, Echo(), limits=AgentLimits(vcpus=2)) as (_, agent):
            for vcpu in range(3):
                agent.post(frame_of(trap(vcpu + 1, vcpu)))
            assert await agent.is_hung_up_on()

    @pytest.mark.parametrize(
        "frame",
        [
            wire.Hello("vmibridge", 1, 1, b"s" * 16, "vm"),
            msgspec.structs.replace(frame_of(trap(1)), width=8),
            frame_of(trap(1), memory=((0, bytes(64 << 10)),) * 3),
        ],
        ids=["hello", "no machine", "much memory"],
    )
    async def test_an_agent_that_sends_what_it_must_not_loses_its_connection(self, url, frame):
        async with talking_to(url, Echo()) as (_, agent):
            agent.post(frame)
            assert await agent.is_hung_up_on()

    async def test_a_full_queue_holds_the_vcpus_and_not_the_connection(self, url):
        handler = Steps()
        settings = ServerSettings(queue=1, in_flight=1)
        async with talking_to(url, handler, settings=settings) as (_, agent):
            for vcpu in range(8):
                agent.post(frame_of(trap(vcpu + 1, vcpu)))
            await handler.began.wait()
            agent.post(Ping())
            assert await agent.next() == Pong()
            handler.go_on.set()
            answers = [await agent.next() for _ in range(8)]
        assert sorted(each.seq for each in answers) == list(range(1, 9))

    async def test_each_vm_has_handlers_of_its_own(self, url):
        made = []

        def make(vm):
            made.append(vm)
            return Echo()

        async with (
            serving(AgentServer([url], make)) as server,
            FakeAgent.connected(url) as one,
            FakeAgent.connected(url) as two,
        ):
            await one.hello(vm="one")
            await two.hello(vm="two", session=b"t" * 16)
            assert server.vms == ["one", "two"]
        assert made == ["one", "two"]


class TestDeadlines:
    async def test_work_that_nobody_waits_for_is_cancelled(self, url):
        handler = Steps()
        async with talking_to(url, handler, settings=ServerSettings(timeout=60)) as (_, agent):
            agent.post(frame_of(trap(1), left=50))
            with anyio.fail_after(10):
                await handler.cancelled.wait()

    async def test_so_it_is_when_the_agent_says_so(self, url):
        handler, outcomes = Steps(), []

        async def on_outcome(outcome):
            outcomes.append(outcome)

        async with talking_to(url, handler, on_outcome=on_outcome) as (_, agent):
            agent.post(frame_of(trap(1)))
            await handler.began.wait()
            agent.post(Cancel(99))
            agent.post(Cancel(1))
            await handler.cancelled.wait()
        assert outcomes[0].kind is OutcomeKind.CANCELLED

    async def test_and_when_the_next_trap_of_the_vcpu_comes(self, url):
        handler = Steps()
        async with talking_to(url, handler) as (_, agent):
            agent.post(frame_of(trap(1)))
            await handler.began.wait()
            agent.post(frame_of(trap(2)))
            await handler.cancelled.wait()
            handler.go_on.set()
            assert (await agent.next()).seq == 2

    async def test_it_goes_on_while_the_agent_is_away(self, url):
        handler = Steps()
        async with talking_to(url, handler) as (_, agent):
            agent.post(frame_of(trap(1)))
            await handler.began.wait()
            agent.connection.close()
            handler.go_on.set()
            async with FakeAgent.connected(url) as again:
                await again.hello()
                again.post(frame_of(trap(1)))
                assert (await again.next()).rax == 7
        assert handler.runs == 1


class TestMemory:
    async def test_it_is_asked_of_the_agent(self, url):
        async with talking_to(url, Steps()) as (_, agent):
            agent.post(frame_of(trap(1, value=0x5000, code=2)))
            asked = await agent.next()
            assert (asked.seq, asked.address, asked.size) == (1, 0x5000, 4)
            agent.post(Memory(asked.access + 7, b"late"))
            agent.post(Memory(asked.access, b"abcd"))
            assert (await agent.next()).rax == 4

    @pytest.mark.parametrize("reply", [{"error": "not mapped"}, {"data": b"abc"}])
    async def test_what_cannot_be_read_is_an_error_of_the_handler(self, url, reply):
        async with talking_to(url, Steps(), settings=FALLBACK) as (_, agent):
            agent.post(frame_of(trap(1, value=0x5000, code=2)))
            agent.post(Memory((await agent.next()).access, **reply))
            assert (await agent.next()).rax == 0xBAD

    async def test_it_is_asked_again_over_the_next_connection(self, url):
        handler = Steps()
        async with talking_to(url, handler) as (_, agent):
            agent.post(frame_of(trap(1, value=0x5000, code=2)))
            asked = await agent.next()
            agent.connection.close()
            async with FakeAgent.connected(url) as again:
                await again.hello()
                assert await again.next() == asked
                again.post(frame_of(trap(1, value=0x5000, code=2)))
                again.post(Memory(asked.access, b"abcd"))
                assert (await again.next()).rax == 4

    async def test_what_travelled_with_the_trap_is_not_asked_for(self, url):
        async with talking_to(url, Steps()) as (_, agent):
            frame = frame_of(trap(1, value=0x5002, code=2), memory=((0x5000, b"0123456789"),))
            agent.post(frame)
            assert (await agent.next()).rax == 4

    async def test_after_a_write_it_is(self, url):
        async with talking_to(url, Steps()) as (_, agent):
            frame = frame_of(trap(1, value=0x5002, code=3), memory=((0x5000, b"0123456789"),))
            agent.post(frame)
            asked = await agent.next()
            assert (asked.address, asked.data) == (0x5002, b"abcd")
            agent.post(Memory(asked.access))
            asked = await agent.next()
            assert isinstance(asked, Read)
            agent.post(Memory(asked.access, b"abcd"))
            assert (await agent.next()).rax == 4

    async def test_a_large_read_comes_in_one_frame(self, url):
        async with talking_to(url, Steps()) as (_, agent):
            agent.post(frame_of(trap(1, value=0, code=4)))
            asked = await agent.next()
            assert asked.size == 2 << 20
            agent.post(Memory(asked.access, bytes(asked.size)))
            await agent.connection.drain(10)
            assert (await agent.next()).rax == 2 << 20

    async def test_more_than_was_asked_for_loses_the_connection(self, url):
        async with talking_to(url, Steps()) as (_, agent):
            agent.post(frame_of(trap(1, value=0x5000, code=2)))
            agent.post(Memory((await agent.next()).access, bytes(2 << 20)))
            await agent.connection.drain(1)
            assert await agent.is_hung_up_on()


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
        async with talking_to(url, Echo()) as (server, agent):
            agent.post(End())
            while server.vms:
                await anyio.sleep(0.001)
            async with FakeAgent.connected(url) as again:
                assert "has ended" in (await again.hello()).why

    async def test_handlers_that_are_at_work_then_are_cancelled(self, url):
        handler = Steps()
        async with talking_to(url, handler) as (_, agent):
            agent.post(frame_of(trap(1)))
            await handler.began.wait()
            agent.post(End())
            await handler.cancelled.wait()

    async def test_a_vm_whose_agent_stays_away_is_given_up(self, url):
        ended = []

        async def on_end(vm, summary, counts):
            ended.append(summary.guest.vcpus[0])

        async with talking_to(url, Echo(), limits=AgentLimits(keep=0.05), on_end=on_end) as (
            server, agent,
        ):  # fmt: skip
            agent.connection.close()
            with anyio.fail_after(10):
                while server.vms:
                    await anyio.sleep(0.001)
        assert ended[0].reason == "lost"

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

    async def test_a_handler_that_exits_ends_its_vm_and_no_other(self, url, caplog):
        class Exits(Echo):
            @method(1)
            async def invert(self, vmi, packet):
                raise SystemExit(3)

        async with (
            served(url, Exits()) as server,
            FakeAgent.connected(url) as agent,
            FakeAgent.connected(url) as other,
        ):
            await agent.hello()
            await other.hello(session=b"t" * 16, vm="other")
            agent.post(frame_of(trap(1)))
            assert await agent.is_hung_up_on()
            assert server.vms == ["other"]
        assert "asked to exit" in caplog.text


class TestStop:
    async def test_what_is_at_work_is_answered_and_what_comes_is_given_back(self, url):
        handler = Steps()
        settings = ServerSettings(grace=60, stop_timeout=3600)
        async with talking_to(url, handler, settings=settings) as (server, agent):
            agent.post(frame_of(trap(1)))
            await handler.began.wait()
            server.stop()
            agent.post(frame_of(trap(2, vcpu=1)))
            assert await agent.next() == Returned(2)
            with pytest.raises(OSError):
                async with FakeAgent.connected(url):
                    pass
            handler.go_on.set()
            assert (await agent.next()).rax == 7
            assert await agent.is_hung_up_on()

    async def test_it_runs_once(self, url):
        async with served(url, Echo()) as server:
            with pytest.raises(ServerStateError):
                await server.run()

    async def test_a_place_that_is_taken_is_an_error(self, url):
        async with served(url, Echo()):
            with pytest.raises(BackendError, match="somebody else listens"):
                await AgentServer([url], lambda _: Echo()).run()

    async def test_so_is_a_port_that_is_taken(self):
        async with served("tcp:127.0.0.1:0", Echo()) as server:
            url = f"tcp:127.0.0.1:{server.ports[0]}"
            with pytest.raises(BackendError, match="in use"):
                await AgentServer([url], lambda _: Echo()).run()

    async def test_and_a_folder_that_is_not_there(self, tmp_path):
        with pytest.raises(BackendError, match="No such file"):
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
        with pytest.raises(BackendError, match="no socket"):
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


class Versioned(Steps):
    def __init__(self, value):
        super().__init__()
        self.value = value

    @method(5)
    async def tell(self, vmi, packet):
        return BridgeResponse(value1=self.value)


class TestReload:
    async def test_new_traps_go_to_the_new_handlers_and_old_ones_end_with_the_old(self, url):
        old, new = Versioned(1), Versioned(2)
        async with talking_to(url, old) as (server, agent):
            agent.post(frame_of(trap(1)))
            await old.began.wait()
            assert await server.reload(lambda _: new) == 1
            agent.post(frame_of(trap(2, vcpu=1, code=5)))
            answer = await agent.next()
            assert (answer.seq, answer.rax) == (2, 2)
            old.go_on.set()
            assert (await agent.next()).rax == 7
            async with FakeAgent.connected(url) as other:
                await other.hello(session=b"t" * 16, vm="other")
        assert (old.runs, new.runs) == (1, 0)

    async def test_a_result_that_is_waited_for_comes_of_the_old_ones(self, url):
        old, new = Versioned(1), Versioned(2)
        settings = ServerSettings(soft_timeout=0.02)
        async with talking_to(url, old, settings=settings) as (server, agent):
            agent.post(frame_of(trap(1)))
            assert (await agent.next()).rax == 1  # WAIT
            await server.reload(lambda _: new)
            old.go_on.set()
            agent.post(frame_of(trap(2, code=5)))
            assert (await agent.next()).rax == 2
            agent.post(frame_of(trap(3)))
            assert (await agent.next()).rax == 7
        assert (old.runs, new.runs) == (1, 0)

    async def test_handlers_that_cannot_be_made_or_entered_change_nothing(self, url, caplog):
        class Broken(Echo):
            async def __aenter__(self):
                raise RuntimeError("no database")

        def fails(vm):
            raise RuntimeError("no such module")

        async with talking_to(url, Versioned(1)) as (server, agent):
            for wrong in (fails, lambda _: Broken()):
                assert await server.reload(wrong) == 0
            agent.post(frame_of(trap(1, code=5)))
            assert (await agent.next()).rax == 1
        assert "no database" in caplog.text
        assert "no such module" in caplog.text

    async def test_magics_that_the_vm_does_not_trap_yet_are_told(self, url, caplog):
        class Other(Echo):
            MAGIC = 0x1234

        async with talking_to(url, Versioned(1)) as (server, _):
            await server.reload(lambda _: Other())
        assert "when it starts anew" in caplog.text


async def all_outcomes(server):
    return [outcome async for outcome in server.run()]


class TestRemoteBackend:
    async def serve(self, url, handler, agents, **options):
        outcomes = []
        async with (
            anyio.create_task_group() as tasks,
            RemoteBackend(url, vm="web", **options) as backend,
        ):
            tasks.start_soon(agents, backend)
            server = BridgeServer(backend, handler)
            async for outcome in server.run():
                outcomes.append(outcome)
        return outcomes, server.summary

    async def test_it_is_the_vm_of_the_first_agent_that_comes(self, url):
        async def guest(vm):
            vm.answer = await vm.call(BridgePacket(STANDARD_MAGIC, 0x0100, 1, 5))

        vm = FakeGuest(guest)

        async def agents(_):
            await carry(vm, url)

        outcomes, summary = await self.serve(url, Echo(), agents)
        assert vm.answer.rax == ~5 & MASK
        assert outcomes[0].event.vm == "web"
        assert summary.guest.vcpus[0].reason == "halted"

    async def test_another_agent_is_refused(self, url):
        async def agents(_):
            async with FakeAgent.connected(url) as one, FakeAgent.connected(url) as two:
                await one.hello()
                told = await two.hello(session=b"t" * 16)
                assert "another agent" in told.why
                one.post(End())
                await one.next()

        await self.serve(url, Echo(), agents)

    async def test_one_that_stays_away_ends_the_run(self, url):
        async def agents(_):
            async with FakeAgent.connected(url) as agent:
                await agent.hello()

        limits = AgentLimits(keep=0.05)
        _, summary = await self.serve(url, Echo(), agents, limits=limits)
        assert summary.guest.vcpus[0].reason == "lost"

    async def test_a_stop_ends_it_whether_one_came_or_not(self, url):
        for come in (False, True):
            async with RemoteBackend(url) as backend:
                server = BridgeServer(backend, Echo())
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(all_outcomes, server)
                    async with FakeAgent.connected(url) as agent:
                        if come:
                            await agent.hello()
                        else:
                            await anyio.sleep(0.01)
                        server.stop()
            assert all(end.reason == "stopped" for end in server.summary.guest.vcpus)

    async def test_memory_after_the_end_is_an_error(self, url):
        seen = []

        class Late(Echo):
            @method(1, timeout=5)
            async def invert(self, vmi, packet):
                began.set()
                try:
                    await anyio.sleep_forever()
                finally:
                    with anyio.CancelScope(shield=True):
                        seen.append(backend_.session.over.is_set())

        began = anyio.Event()

        async def agents(backend):
            nonlocal backend_
            backend_ = backend
            async with FakeAgent.connected(url) as agent:
                await agent.hello()
                agent.post(frame_of(trap(1)))
                await began.wait()
                agent.post(End())
                await agent.next()

        backend_ = None
        await self.serve(url, Late(), agents)
        assert seen == [True]

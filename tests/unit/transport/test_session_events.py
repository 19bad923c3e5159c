"""What taps are told of the agent of a remote VM: it came, was lost, came back, and its end."""

import logging

import anyio
import pytest
from remote_parts import Echo, FakeAgent, Steps, frame_of, serving, talking_to, trap
from waiting import until

from vmibridge import BridgeServer
from vmibridge.engine.taps import Tap
from vmibridge.transport import AgentLimits, AgentServer, RemoteBackend
from vmibridge.transport.session_events import SessionEvents
from vmibridge.transport.wire import End
from vmibridge.vm.backend import SessionEvent, SessionEventKind

pytestmark = pytest.mark.anyio

CONNECTED, LOST, BACK = SessionEventKind.CONNECTED, SessionEventKind.LOST, SessionEventKind.BACK
GIVEN_UP, ENDED = SessionEventKind.GIVEN_UP, SessionEventKind.ENDED


@pytest.fixture
def url(tmp_path):
    return f"unix:{tmp_path / 'serve.sock'}"


class Watch(Tap):
    """Keeps the order of things."""

    def __init__(self):
        self.calls = []
        self.events = []

    def begin(self, vm, bridge, settings, stop):
        self.calls.append("begin")

    def trap(self, event):
        self.calls.append("trap")

    def handler_began(self, began):
        self.calls.append("began")

    def answered(self, outcome):
        self.calls.append(f"answered {outcome.kind.value}")

    def session_event(self, event):
        self.calls.append(event.kind.value)
        self.events.append(event)

    def end(self, vm, summary):
        self.calls.append("end")


class TestAnAgent:
    async def test_that_is_lost_and_comes_back_while_its_handler_runs(self, url):
        watch, handler = Watch(), Steps()
        async with talking_to(url, handler, taps=lambda _: [watch]) as (_, agent):
            agent.post(frame_of(trap(1)))
            await handler.began.wait()
            agent.connection.close()
            await until(lambda: watch.calls[-1] == "lost")
            async with FakeAgent.connected(url) as again:
                await again.hello()
                again.post(frame_of(trap(1)))
                handler.go_on.set()
                assert (await again.next()).rax == 7
                again.post(End())
                await again.next()
                await until(lambda: watch.calls[-1] == "end")
        assert watch.calls == [
            "begin", "connected", "trap", "began", "lost", "back", "answered handled",
            "ended", "end",
        ]  # fmt: skip
        assert {(each.vm, each.session) for each in watch.events} == {("vm", (b"s" * 16).hex())}
        assert len({each.peer for each in watch.events}) == 1
        assert watch.events[0].peer.startswith("uid:")

    async def test_that_comes_again_before_its_loss_was_seen_was_lost_all_the_same(self, url):
        watch = Watch()
        async with talking_to(url, Echo(), taps=lambda _: [watch]) as (_, agent):
            await until(lambda: watch.calls[-1:] == ["connected"])
            async with FakeAgent.connected(url) as again:
                await again.hello()
                assert await agent.is_hung_up_on()
                assert watch.calls == ["begin", "connected", "lost", "back"]
        assert "another connection" in watch.events[1].reason

    async def test_that_stays_away_is_given_up(self, url):
        watch, handler = Watch(), Steps()
        limits = AgentLimits(keep=0.05)
        taps = {"taps": lambda _: [watch], "limits": limits}
        async with talking_to(url, handler, **taps) as (_, agent):
            agent.post(frame_of(trap(1)))
            await handler.began.wait()
            agent.connection.close()
            await until(lambda: watch.calls[-1] == "end")
        assert watch.calls[4:] == ["lost", "given up", "answered cancelled", "end"]
        assert "did not come back" in watch.events[-1].reason

    async def test_that_begins_anew_has_another_session(self, url):
        watches = []

        def taps(vm):
            watches.append(Watch())
            return watches[-1:]

        async with talking_to(url, Echo(), taps=taps) as (_, agent):
            agent.connection.close()
            await until(lambda: "lost" in watches[0].calls)
            async with FakeAgent.connected(url) as again:
                await again.hello(session=b"t" * 16)
                await until(lambda: len(watches) == 2 and "connected" in watches[1].calls)
                await until(lambda: watches[0].calls[-1] == "end")
        assert watches[0].calls == ["begin", "connected", "lost", "given up", "end"]
        assert watches[0].events[-1].reason == "its agent restarted"
        assert watches[0].events[0].session != watches[1].events[0].session

    async def test_that_the_server_leaves_has_no_last_event(self, url):
        watch = Watch()
        async with talking_to(url, Echo(), taps=lambda _: [watch]) as (server, _):
            await until(lambda: watch.calls[-1:] == ["connected"])
            server.stop()
            await until(lambda: watch.calls[-1] == "end")
        assert watch.calls == ["begin", "connected", "end"]


async def test_a_tap_that_raises_is_dropped_and_the_agent_is_served(url, caplog):
    class Raises(Watch):
        def session_event(self, event):
            raise RuntimeError("on purpose")

    watch, raises = Watch(), Raises()
    async with talking_to(url, Echo(), taps=lambda _: [raises, watch]) as (_, agent):
        agent.post(frame_of(trap(1, value=5)))
        await agent.next()
    assert raises.calls == ["begin"]
    assert watch.calls[:2] == ["begin", "connected"]
    assert "answered handled" in watch.calls
    assert caplog.text.count("tap Raises is dropped: its session_event() raised") == 1


async def test_taps_that_come_late_are_told_in_short_what_was_before(url, caplog):
    """Handlers take long to be entered: the agent came, went, came and went in the meantime."""
    caplog.set_level(logging.INFO)
    watch, enter, entering = Watch(), anyio.Event(), anyio.Event()

    class SlowToEnter(Echo):
        async def __aenter__(self):
            entering.set()
            await enter.wait()
            return await super().__aenter__()

    server = AgentServer([url], lambda _: SlowToEnter(), taps=lambda _: [watch])
    async with serving(server):
        for times in (1, 2):
            async with FakeAgent.connected(url) as agent:
                await agent.hello()
                await entering.wait()
            await until(lambda times=times: caplog.text.count("connection is lost") == times)
        assert watch.calls == []
        enter.set()
        await until(lambda: "lost" in watch.calls)
    assert watch.calls == ["begin", "connected", "lost", "end"]


class TestReload:
    async def test_a_tap_that_all_handlers_have_sees_each_change_once(self, url):
        watch = Watch()
        async with talking_to(url, Echo(), taps=lambda _: [watch]) as (server, agent):
            await until(lambda: "connected" in watch.calls)
            assert await server.reload(lambda _: Echo()) == 1
            agent.connection.close()
            await until(lambda: "lost" in watch.calls)
        assert [each.kind for each in watch.events] == [CONNECTED, LOST]

    async def test_the_taps_of_the_new_handlers_are_told_from_there_on(self, url):
        watches = []

        def taps(vm):
            watches.append(Watch())
            return watches[-1:]

        handler = Steps()
        async with talking_to(url, handler, taps=taps) as (server, agent):
            # The old set stays for as long as this one is not answered.
            agent.post(frame_of(trap(1)))
            await handler.began.wait()
            assert await server.reload(lambda _: Echo()) == 1
            agent.connection.close()
            await until(lambda: "lost" in watches[1].calls)
        assert [[each.kind for each in watch.events] for watch in watches] == [[CONNECTED], [LOST]]


async def test_a_remote_backend_tells_the_taps_of_its_server(url):
    watch, handler = Watch(), Steps()
    async with anyio.create_task_group() as tasks, RemoteBackend(url, vm="web") as backend:

        async def agents():
            async with FakeAgent.connected(url) as agent:
                await agent.hello()
                agent.post(frame_of(trap(1)))
                await handler.began.wait()
            await until(lambda: watch.calls[-1] == "lost")
            async with FakeAgent.connected(url) as agent:
                await agent.hello()
                agent.post(frame_of(trap(1)))
                handler.go_on.set()
                await agent.next()
                agent.post(End())
                await agent.next()

        tasks.start_soon(agents)
        async for _ in BridgeServer(backend, handler, taps=[watch]).run():
            pass
    assert watch.calls == [
        "begin", "connected", "trap", "began", "lost", "back", "answered handled", "ended", "end",
    ]  # fmt: skip
    assert {each.vm for each in watch.events} == {"web"}


class TestSessionEvents:
    """What is told to taps that come when something has happened already."""

    def event(self, kind):
        return SessionEvent("vm", kind, "00", "tcp", f"why {kind.value}")

    @pytest.mark.parametrize(
        ("before", "told"),
        [
            ([], []),
            ([CONNECTED], [CONNECTED]),
            ([CONNECTED, LOST], [CONNECTED, LOST]),
            ([CONNECTED, LOST, BACK], [CONNECTED]),
            ([CONNECTED, LOST, BACK, LOST], [CONNECTED, LOST]),
            ([CONNECTED, LOST, GIVEN_UP], [CONNECTED, GIVEN_UP]),
            ([CONNECTED, ENDED], [CONNECTED, ENDED]),
        ],
    )
    def test_before_the_first_tap_is_summed_up(self, before, told):
        events, first, second = SessionEvents(), [], []
        for kind in before:
            events.add(self.event(kind))
        with events.watched(first.append):
            assert [each.kind for each in first] == told
        with events.watched(second.append):
            assert second == []

    def test_the_last_of_several_is_told_and_when_it_goes_the_one_before(self):
        events, old, new = SessionEvents(), [], []
        with events.watched(old.append):
            with events.watched(new.append), events.watched(None):
                events.add(self.event(CONNECTED))
            events.add(self.event(LOST))
        events.add(self.event(BACK))
        assert ([each.kind for each in old], [each.kind for each in new]) == ([LOST], [CONNECTED])

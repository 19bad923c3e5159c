"""The server of agents: each trap that an agent sends, and its deadline."""

import anyio
import msgspec
import pytest
from remote_parts import Echo, FakeAgent, Steps, frame_of, serving, talking_to, trap

from vmibridge import BridgeResponse
from vmibridge.bridge.outcome import OutcomeKind
from vmibridge.engine.settings import ServerSettings
from vmibridge.transport import AgentLimits, AgentServer, wire
from vmibridge.transport.wire import Answer, Cancel, Native, Ping, Pong

pytestmark = pytest.mark.anyio
MASK = (1 << 64) - 1
FALLBACK = ServerSettings(fallback=BridgeResponse(value1=0xBAD))


@pytest.fixture
def url(tmp_path):
    return f"unix:{tmp_path / 'serve.sock'}"


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
                assert (await again.hello()).incarnation == agent.welcome.incarnation
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

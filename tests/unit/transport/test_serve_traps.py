"""The server of agents: each trap that an agent sends, and its deadline."""

import msgspec
import pytest
from remote_parts import Echo, FakeAgent, Steps, frame_of, serving, talking_to, trap
from server_stage import welcome

from vmibridge import BridgeResponse
from vmibridge.bridge.outcome import OutcomeKind
from vmibridge.engine.settings import ServerSettings
from vmibridge.transport import AgentLimits, AgentServer, wire
from vmibridge.transport.wire import Answer, Ping, Pong

pytestmark = pytest.mark.anyio
MASK = (1 << 64) - 1
FALLBACK = ServerSettings(fallback=BridgeResponse(value1=0xBAD))


@pytest.fixture
def url(tmp_path):
    return f"unix:{tmp_path / 'serve.sock'}"


class TestTraps:
    async def test_one_gets_its_answer(self, url):
        async with welcome(url) as stage:
            await stage.play("""
                -> trap 1 value=5 code=2
                ** inverts 5
                <- answer 1 rax=~5
                -> trap 2 magic=0x9999
                <- native 2
            """)

    async def test_one_that_comes_again_gets_the_same_answer_and_runs_once(self, url):
        async with welcome(url) as stage:
            await stage.play("""
                -> trap 1 value=5 code=2
                ** inverts 5
                <- answer 1 rax=~5
                !! hangs-up
                !! connects again
                again -> hello
                again <- welcome ...
                == incarnations=1
                again -> trap 1 value=5 code=2
                again <- answer 1 rax=~5
            """)

    async def test_one_that_is_still_handled_is_answered_where_it_came_from_last(self, url):
        async with welcome(url) as stage:
            await stage.play("""
                -> trap 1
                ** begins 1
                !! connects again
                again -> hello         # the first connection is still there: it has to go
                again <- welcome ...
                ** hung-up
                again -> trap 1
                !! finishes 1 7
                again <- answer 1 rax=7
            """)

    async def test_one_that_was_lost_on_its_way_is_run(self, url):
        async with welcome(url) as stage:
            await stage.play("""
                -> trap 1 code=2
                ** inverts 0
                <- answer 1 rax=~0
                !! hangs-up
                !! connects again
                again -> hello
                again <- welcome ...
                again -> trap 2 value=6 code=2
                ** inverts 6
                again <- answer 2 rax=~6
            """)

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
        async with welcome(url, repeated="run") as stage:
            await stage.play("""
                -> trap 1 value=5 code=2 elsewhere=yes
                ** inverts 5
                <- answer 1 rax=~5
            """)

    async def test_one_with_an_old_number_is_dropped(self, url):
        async with welcome(url) as stage:
            await stage.play("""
                -> trap 2 code=2
                ** inverts 0
                <- answer 2 rax=~0
                -> trap 1 code=2
                -> ping
                <- pong
            """)

    async def test_more_vcpus_than_allowed_lose_the_connection(self, url):
        async with welcome(url, limits=AgentLimits(vcpus=2)) as stage:
            await stage.play("""
                -> trap 1
                ** begins 1
                -> trap 2 vcpu=1
                ** begins 2
                -> trap 3 vcpu=2
                ** hung-up
            """)

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
        async with welcome(url) as stage:
            await stage.play("""
                -> trap 1 left=50
                ** begins 1
                ** cancelled 1
                <- answer 1 rax=0xbad
            """)

    async def test_so_it_is_when_the_agent_says_so(self, url):
        outcomes = []

        async def on_outcome(outcome):
            outcomes.append(outcome)

        async with welcome(url, on_outcome=on_outcome) as stage:
            await stage.play("""
                -> trap 1
                ** begins 1
                -> cancel 99
                -> cancel 1
                ** cancelled 1
                <- answer 1 rax=0xbad
            """)
        assert outcomes[0].kind is OutcomeKind.CANCELLED

    async def test_and_when_the_next_trap_of_the_vcpu_comes(self, url):
        async with welcome(url) as stage:
            await stage.play("""
                -> trap 1
                ** begins 1
                -> trap 2
                ** cancelled 1
                ** begins 2
                !! finishes 2 7
                <- answer 2 rax=7
            """)

    async def test_it_goes_on_while_the_agent_is_away(self, url):
        async with welcome(url) as stage:
            await stage.play("""
                -> trap 1
                ** begins 1
                !! hangs-up
                !! finishes 1 7
                !! connects again
                again -> hello
                again <- welcome ...
                again -> trap 1
                again <- answer 1 rax=7
            """)

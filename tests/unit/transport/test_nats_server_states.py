"""A server on NATS, state by state: sessions, traps, and what agents ask about them."""

import pytest
from nats_stages import NatsServerStage

from vmibridge.transport import AgentLimits

pytestmark = pytest.mark.anyio

WELCOME = """
    web -> hello
    web <- welcome at=hello ...
"""

STATES = {
    "idle": WELCOME,
    "at work": f"""
        {WELCOME}
        web -> trap 1
        web <- taken 1 at=1.1
        ** begins 1
    """,
    "answered": f"""
        {WELCOME}
        web -> trap 1
        web <- taken 1 at=1.1
        ** begins 1
        !! finishes 1 7
        web <- answer 1 rax=7 at=1.1
    """,
    "waiting for memory": f"""
        {WELCOME}
        web -> trap 1 value=0x5000 code=3
        web <- taken 1 at=1.1
        web <- read 1 1 0x5000 4 at=1.1
    """,
}

every_state = pytest.mark.parametrize("state", STATES)


class TestHello:
    async def test_the_first_one_begins_a_session(self):
        await NatsServerStage(limits=AgentLimits(vcpus=9)).run("""
            web -> hello
            web <- welcome at=hello vcpus=9 ...
            == vms=1
        """)

    @every_state
    async def test_one_that_comes_again_is_welcome_and_changes_nothing(self, state):
        async with NatsServerStage() as stage:
            await stage.play(STATES[state])
            # A link that is another asks for memory again; this one is the same.
            await stage.play("""
                web -> hello
                web <- welcome at=hello ...
                == vms=1
            """)

    async def test_a_trap_begins_a_session_too(self):
        await NatsServerStage().run("""
            web -> trap 1
            web <- taken 1 at=1.1
            ** begins 1
            == vms=1
        """)

    async def test_each_vm_has_a_session_of_its_own(self):
        await NatsServerStage().run(f"""
            {WELCOME}
            db -> hello
            db <- welcome at=hello ...
            == vms=2
        """)

    @every_state
    async def test_of_a_second_agent_of_one_vm_is_refused_while_the_first_is_there(self, state):
        async with NatsServerStage() as stage:
            await stage.play(STATES[state])
            await stage.play("""
                !! agent second vm=web
                second -> hello
                web <- pong at=probe
                second <- refused "a VM of the name web is served" final=no at=hello
                == vms=1 refused=1
                web -> ping
                web <- pong at=to.1
            """)

    @every_state
    async def test_and_while_the_first_does_not_say(self, state):
        async with NatsServerStage() as stage:
            await stage.play(STATES[state])
            await stage.play("""
                !! silent web
                !! agent second vm=web
                second -> hello
                web <- pong at=probe
                second <- refused "a VM of the name web is served" final=no at=hello
            """)

    @pytest.mark.parametrize("state", ["idle", "answered"])
    async def test_it_takes_the_place_of_one_that_is_gone(self, state):
        async with NatsServerStage() as stage:
            await stage.play(STATES[state])
            await stage.play("""
                !! gone web
                !! agent second vm=web
                second -> hello
                web <- pong at=probe
                second <- welcome at=hello ...
                == vms=1 refused=0
            """)

    async def test_the_handlers_of_one_that_is_gone_are_cancelled(self):
        async with NatsServerStage() as stage:
            await stage.play(STATES["at work"])
            await stage.play("""
                !! gone web
                !! agent second vm=web
                second -> hello
                web <- pong at=probe
                second <- welcome at=hello ...
                ** cancelled 1
            """)

    async def test_a_vm_too_many_is_refused(self):
        await NatsServerStage(limits=AgentLimits(sessions=1)).run(f"""
            {WELCOME}
            db -> hello
            db <- refused "1 VMs are served, which is the limit" final=no at=hello
        """)


class TestATrap:
    async def test_that_comes_again_is_answered_where_it_came_from_last(self):
        async with NatsServerStage() as stage:
            await stage.play(STATES["at work"])
            await stage.play("""
                web -> trap 1 at=1.2
                web <- taken 1 at=1.2
                !! finishes 1 7
                web <- answer 1 rax=7 at=1.2
            """)

    async def test_that_comes_again_when_it_was_answered_gets_the_answer_there(self):
        async with NatsServerStage() as stage:
            await stage.play(STATES["answered"])
            await stage.play("""
                web -> trap 1 at=1.2
                web <- answer 1 rax=7 at=1.2
            """)

    async def test_with_an_old_number_is_dropped(self):
        async with NatsServerStage() as stage:
            await stage.play(f"""
                {WELCOME}
                web -> trap 2
                web <- taken 2 at=2.1
                ** begins 2
                web -> trap 1
            """)

    async def test_of_a_vcpu_that_went_on_is_abandoned_by_the_next(self):
        async with NatsServerStage() as stage:
            await stage.play(STATES["at work"])
            await stage.play("""
                web -> trap 2
                web <- taken 2 at=2.1
                ** cancelled 1
                ** begins 2
                !! finishes 2 8
                web <- answer 2 rax=8 at=2.1
            """)

    async def test_of_a_vcpu_too_many_is_refused(self):
        await NatsServerStage(limits=AgentLimits(vcpus=1)).run("""
            web -> trap 1
            web <- taken 1 at=1.1
            ** begins 1
            web -> trap 2 vcpu=1
            web <- refused "more than 1 vCPUs" final=no at=2.1
            !! finishes 1 7
            web <- answer 1 rax=7 at=1.1
        """)

    async def test_that_is_at_work_when_the_server_stops_is_answered(self):
        async with NatsServerStage() as stage:
            await stage.play(STATES["at work"])
            await stage.play("""
                !! stops                    # it leaves the queue group, and finishes what it has
                web -> cancel 9
                !! finishes 1 7
                web <- answer 1 rax=7 at=1.1
            """)


class TestAnAsk:
    async def test_about_a_trap_that_is_here_is_answered_taken(self):
        async with NatsServerStage() as stage:
            await stage.play(STATES["at work"])
            await stage.play("""
                web -> ask 1 0
                web <- taken 1 at=1.1
                !! asks-all web 1 0
                web <- taken 1 at=1.1
            """)

    async def test_about_one_that_was_answered_brings_the_answer(self):
        async with NatsServerStage() as stage:
            await stage.play(STATES["answered"])
            await stage.play("""
                web -> ask 1 0
                web <- answer 1 rax=7 at=1.1
                !! asks-all web 1 0
                web <- answer 1 rax=7 at=1.1
            """)

    @every_state
    async def test_about_one_that_is_not_here_is_not_answered(self, state):
        async with NatsServerStage() as stage:
            await stage.play(STATES[state])
            await stage.play("web -> ask 9 0")

    async def test_the_second_brings_what_may_be_lost_on_its_way(self):
        async with NatsServerStage() as stage:
            await stage.play(STATES["waiting for memory"])
            await stage.play("""
                web -> ask 1 0
                web <- taken 1 at=1.1
                web -> ask 1 0
                web <- taken 1 at=1.1
                web <- read 1 1 0x5000 4 at=1.1
                web -> memory 1 "abcd"
                web <- answer 1 rax=0x64636261 at=1.1
            """)

    async def test_those_behind_it_bring_it_less_and_less(self):
        """It may only be large, and on its way."""
        taken, read = "web <- taken 1 at=1.1", "web <- read 1 1 0x5000 4 at=1.1"
        async with NatsServerStage() as stage:
            await stage.play(STATES["waiting for memory"])
            for number in range(1, 10):
                again = [read] if number in (2, 4, 8) else []
                await stage.play("\n".join(["web -> ask 1 0", taken, *again]))

    async def test_nothing_is_sent_again_behind_what_waits_to_be_sent(self):
        async with NatsServerStage() as stage:
            await stage.play(STATES["waiting for memory"])
            stage.client.has_backlog = True
            for _ in range(4):
                await stage.play("""
                    web -> ask 1 0
                    web <- taken 1 at=1.1
                """)


class TestACancel:
    async def test_of_the_attempt_that_is_here_abandons_it(self):
        async with NatsServerStage() as stage:
            await stage.play(STATES["at work"])
            await stage.play("""
                web -> cancel 1 at=1.1
                ** cancelled 1
                web <- answer 1 rax=0xbad at=1.1
            """)

    async def test_of_an_attempt_before_does_not(self):
        async with NatsServerStage() as stage:
            await stage.play(STATES["at work"])
            await stage.play("""
                web -> trap 1 at=1.2
                web <- taken 1 at=1.2
                web -> cancel 1 at=1.1
                !! finishes 1 7
                web <- answer 1 rax=7 at=1.2
            """)

    async def test_of_what_was_answered_does_nothing(self):
        async with NatsServerStage() as stage:
            await stage.play(STATES["answered"])
            await stage.play("""
                web -> cancel 1 at=1.1
                web -> ask 1 0
                web <- answer 1 rax=7 at=1.1
            """)


class TestAnAgentThatIsMissing:
    @every_state
    async def test_is_away_until_it_says_something(self, state):
        async with NatsServerStage() as stage:
            await stage.play(STATES[state])
            asked = "web <- read 1 1 0x5000 4 at=1.1" if state == "waiting for memory" else ""
            await stage.play(f"""
                !! missing web
                web -> ping
                {asked}
                web <- pong at=to.1
                == vms=1
            """)

    async def test_gets_its_answer_when_it_asks(self):
        async with NatsServerStage() as stage:
            await stage.play(STATES["at work"])
            await stage.play("""
                !! missing web
                !! finishes 1 7
                web -> ask 1 0
                web <- answer 1 rax=7 at=1.1
            """)


class TestInEachState:
    @every_state
    async def test_a_ping_is_answered_where_it_came_from(self, state):
        async with NatsServerStage() as stage:
            await stage.play(STATES[state])
            await stage.play("""
                web -> ping at=to.3
                web <- pong at=to.3
            """)

    @every_state
    async def test_the_end_is_answered_and_the_session_over(self, state):
        after = {
            "at work": """
                ** cancelled 1
                web <- answer 1 rax=0xbad at=1.1
            """,
            "waiting for memory": "web <- answer 1 rax=0xbad at=1.1",
        }
        async with NatsServerStage() as stage:
            await stage.play(STATES[state])
            await stage.play(f"""
                web -> end at=to.1
                web <- ended at=to.1
                {after.get(state, "")}
                == vms=0
                web -> end at=to.2          # when it did not hear of it
                web <- ended at=to.2
            """)

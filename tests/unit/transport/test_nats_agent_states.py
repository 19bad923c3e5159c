"""An agent on NATS, state by state: which server has a trap, and what becomes of it."""

import pytest
from nats_stages import AgentLinkStage

pytestmark = pytest.mark.anyio

STATES = {
    "with nobody yet": """
        agent -> trap 1
        queue <- trap 1 at=1.1 ...
    """,
    "taken": """
        agent -> trap 1
        queue <- trap 1 at=1.1 ...
        web -> taken 1
    """,
    "waiting for its pause": """
        agent -> trap 1
        queue <- trap 1 at=1.1 ...
        web -> returned 1
    """,
    "given up, and sent again": """
        agent -> trap 1
        queue <- trap 1 at=1.1 ...
        web -> taken 1
        !! passes 6
        web <- cancel 1 at=1.1
        queue <- trap 1 at=1.2 elsewhere=yes ...
    """,
    "answered": """
        agent -> trap 1
        queue <- trap 1 at=1.1 ...
        web -> answer 1 7
        agent <- answer 1 rax=7
    """,
    "cancelled": """
        agent -> trap 1
        queue <- trap 1 at=1.1 ...
        web -> taken 1
        agent -> cancel 1
        web <- cancel 1 at=1.1
    """,
}
OPEN = ["with nobody yet", "taken", "given up, and sent again"]

every_state = pytest.mark.parametrize("state", STATES)


class TestTheHandshake:
    async def test_a_server_says_welcome(self):
        await AgentLinkStage(welcome=False).run("""
            !! shakes-hands
            queue <- hello ...
            web -> welcome 7000 at=hello
            ** welcome 7000
            == at_work=yes
        """)

    async def test_of_two_welcomes_the_first_counts(self):
        await AgentLinkStage(welcome=False).run("""
            !! shakes-hands
            queue <- hello ...
            web -> welcome 7000 at=hello
            ** welcome 7000
            db -> welcome 1 at=hello
        """)

    @pytest.mark.parametrize(
        ("steps", "why"),
        [
            ('web -> refused "not you" at=hello', "not you"),
            ("web -> welcome version=9 at=hello", "no WELCOME"),
            ("!! nobody hello", "no server listens on this NATS"),
            ('!! denied "not permitted"', "not permitted"),
        ],
    )
    async def test_it_fails_in_words(self, steps, why):
        await AgentLinkStage(welcome=False).run(f"""
            !! shakes-hands
            queue <- hello ...
            {steps}
            ** fails "{why}"
        """)

    async def test_nats_that_closes_the_connection_ends_it(self):
        await AgentLinkStage(welcome=False).run("""
            !! shakes-hands
            queue <- hello ...
            !! nats-closed
            ** fails "NATS has closed the connection"
        """)

    async def test_hello_is_said_again_when_nats_was_away(self):
        await AgentLinkStage(welcome=False).run("""
            !! shakes-hands
            queue <- hello ...
            !! nats-lost
            !! nats-back
            queue <- hello ...
            web -> welcome at=hello
            ** welcome 5000
            !! nats-lost
            !! nats-back           # by now there is no need
        """)


class TestInEachState:
    @every_state
    async def test_garbage_changes_nothing(self, state):
        async with AgentLinkStage() as stage:
            await stage.play(STATES[state])
            for place in ("1.1", "1.2", "x", "1", "1.x", "to", "to.x", "to.77", "probe.x"):
                await stage.play(f"!! says-garbage {place}")
            # Of another trap than the subject says.
            await stage.play("web -> answer 2 0xbad at=1.1")

    @every_state
    async def test_a_connection_that_is_lost_for_good_ends_the_link(self, state):
        async with AgentLinkStage() as stage:
            await stage.play(STATES[state])
            await stage.play("""
                !! nats-closed
                ** lost "NATS has closed the connection"
            """)

    @pytest.mark.parametrize("state", [*OPEN, "waiting for its pause"])
    async def test_nothing_is_given_up_or_sent_while_nats_is_away(self, state):
        async with AgentLinkStage() as stage:
            await stage.play(STATES[state])
            await stage.play("""
                !! nats-lost
                !! passes 100
            """)

    @pytest.mark.parametrize("state", ["answered", "cancelled"])
    async def test_a_late_answer_goes_nowhere(self, state):
        async with AgentLinkStage() as stage:
            await stage.play(STATES[state])
            await stage.play("""
                web -> answer 1 0xbad at=1.1
                db -> answer 1 0xbad at=1.1
                db -> native 1 at=1.1
            """)

    @pytest.mark.parametrize("state", ["waiting for its pause", "given up, and sent again"])
    async def test_so_does_one_of_an_attempt_that_is_over(self, state):
        async with AgentLinkStage() as stage:
            await stage.play(STATES[state])
            await stage.play("web -> answer 1 0xbad at=1.1")

    @every_state
    async def test_a_server_that_says_it_has_an_old_attempt_is_told_to_cancel_it(self, state):
        async with AgentLinkStage() as stage:
            await stage.play(STATES[state])
            await stage.play("""
                late -> taken 1 at=1.9
                late <- cancel 1 at=1.9
            """)

    @every_state
    async def test_a_server_that_does_not_have_the_trap_gets_no_memory(self, state):
        async with AgentLinkStage() as stage:
            await stage.play(STATES[state])
            await stage.play("""
                late -> read 5 1 0x5000 8 at=1.9
                late <- memory 5 error="not yours any more" ...
            """)

    @pytest.mark.parametrize("state", OPEN)
    async def test_a_cancel_reaches_whoever_has_it_or_all(self, state):
        last, where = {
            "with nobody yet": ("1.1", "all"),
            "taken": ("1.1", "web"),
            "given up, and sent again": ("1.2", "all"),
        }[state]
        async with AgentLinkStage() as stage:
            await stage.play(STATES[state])
            # Those that are to all have no place of their own, but that of the attempt.
            await stage.play(f"""
                agent -> cancel 1
                {where} <- cancel 1 at={last}
                agent -> cancel 1
            """)

    @pytest.mark.parametrize("state", ["answered", "cancelled"])
    async def test_a_cancel_of_what_is_over_is_not_published(self, state):
        async with AgentLinkStage() as stage:
            await stage.play(STATES[state])
            await stage.play("agent -> cancel 1")


class TestWhoHasATrap:
    async def test_a_second_server_that_says_so_is_told_that_it_does_not(self):
        await AgentLinkStage().run("""
            agent -> trap 1
            queue <- trap 1 at=1.1 ...
            web -> taken 1
            db -> taken 1
            db <- cancel 1 at=1.1
            web -> answer 1 7
            agent <- answer 1 rax=7
            == shares=1
        """)

    async def test_all_are_asked_and_then_the_one_that_has_it(self):
        await AgentLinkStage().run("""
            agent -> trap 1
            queue <- trap 1 at=1.1 ...
            !! passes 1
            all <- ask 1 0 at=""
            web -> taken 1
            !! passes 1
            web <- ask 1 0 at=to.1
            web -> taken 1
            !! passes 5            # it was heard, so it has as long again
            web <- ask 1 0 at=to.1
        """)

    async def test_one_that_is_silent_is_given_up_and_the_trap_marked(self):
        await AgentLinkStage().run("""
            agent -> trap 1
            queue <- trap 1 at=1.1 elsewhere=no ...
            web -> taken 1
            !! passes 6
            web <- cancel 1 at=1.1
            queue <- trap 1 at=1.2 elsewhere=yes ...
            web -> answer 1 0xbad at=1.1
            web -> read 1 1 0x5000 8 at=1.1
            web <- memory 1 error="not yours any more" ...
            db -> answer 1 7
            agent <- answer 1 rax=7
        """)

    @pytest.mark.parametrize("what", ["returned 1", 'refused "too many" no at=1.1'])
    async def test_one_that_gives_it_back_has_not_run_it(self, what):
        await AgentLinkStage().run(f"""
            agent -> trap 1
            queue <- trap 1 at=1.1 ...
            web -> {what}
            !! passes 0.001        # a pause of 10 milliseconds at least
            !! passes 0.02
            queue <- trap 1 at=1.3 elsewhere=no ...
            web -> answer 1 7
            agent <- answer 1 rax=7
        """)

    async def test_where_there_are_no_responders_it_is_sent_again(self):
        await AgentLinkStage().run("""
            agent -> trap 1
            queue <- trap 1 at=1.1 ...
            !! nobody 1.1
            !! passes 0.02
            queue <- trap 1 at=1.3 elsewhere=no ...
            web -> taken 1
            !! nobody 1.3          # it was said of another server
            web -> answer 1 7
            agent <- answer 1 rax=7
        """)

    async def test_a_server_that_is_missing_twice_is_gone(self):
        await AgentLinkStage().run("""
            agent -> trap 1
            queue <- trap 1 at=1.1 ...
            web -> taken 1
            !! nobody web
            !! passes 0.5
            !! nobody web
            !! passes 0.1
            web <- cancel 1 at=1.1
            queue <- trap 1 at=1.2 elsewhere=yes ...
        """)

    async def test_just_after_nats_was_away_it_may_not_have_subscribed_yet(self):
        await AgentLinkStage().run("""
            agent -> trap 1
            queue <- trap 1 at=1.1 ...
            web -> taken 1
            !! nats-lost
            !! nats-back
            !! nobody web
            !! nobody web
            !! passes 0.5
        """)

    async def test_one_that_speaks_in_between_is_not(self):
        await AgentLinkStage().run("""
            agent -> trap 1
            queue <- trap 1 at=1.1 ...
            web -> taken 1
            !! nobody web
            web -> taken 1
            !! nobody web
            !! passes 0.1
        """)

    async def test_a_request_that_was_told_to_wait_goes_to_that_server_again(self):
        await AgentLinkStage().run("""
            agent -> trap 1
            queue <- trap 1 at=1.1 ...
            db -> answer 1 1       # WAIT
            agent <- answer 1 rax=1
            agent -> trap 2
            db <- trap 2 at=2.1 ...
            db -> answer 2 7
            agent <- answer 2 rax=7
            agent -> trap 3        # it has its answer: any server may have the next one
            queue <- trap 3 at=3.1 ...
        """)

    async def test_unless_that_server_is_missing(self):
        await AgentLinkStage().run("""
            agent -> trap 1
            queue <- trap 1 at=1.1 ...
            db -> answer 1 1       # WAIT
            agent <- answer 1 rax=1
            agent -> trap 2
            db <- trap 2 at=2.1 ...
            !! nobody 2.1
            !! passes 0.02
            queue <- trap 2 at=2.3 elsewhere=no ...
        """)

    async def test_or_silent(self):
        await AgentLinkStage().run("""
            agent -> trap 1
            queue <- trap 1 at=1.1 ...
            db -> answer 1 1       # WAIT
            agent <- answer 1 rax=1
            agent -> trap 2
            db <- trap 2 at=2.1 ...
            !! passes 6
            all <- cancel 2 at=2.1
            queue <- trap 2 at=2.2 elsewhere=yes ...
        """)

    async def test_after_a_silent_one_traps_go_straight_to_those_that_are_heard(self):
        await AgentLinkStage().run("""
            agent -> trap 1
            queue <- trap 1 at=1.1 ...
            db -> taken 1
            !! passes 5
            db <- ask 1 0 at=to.2
            agent -> trap 2 vcpu=1
            queue <- trap 2 at=2.1 ...
            web -> taken 2
            !! passes 1
            db <- cancel 1 at=1.1
            web <- trap 1 at=1.2 elsewhere=yes ...
            web <- ask 2 1 at=to.1
        """)

    async def test_the_next_trap_of_the_vcpu_takes_the_place_of_the_last(self):
        await AgentLinkStage().run("""
            agent -> trap 1
            queue <- trap 1 at=1.1 ...
            agent -> trap 2
            queue <- trap 2 at=2.1 ...
            web -> answer 1 0xbad at=1.1
            web -> answer 2 7
            agent <- answer 2 rax=7
        """)


class TestMemory:
    """The agent knows an access by the number of its server, and 64 bits of that server's own."""

    async def test_accesses_of_two_servers_find_their_way_back(self):
        await AgentLinkStage().run("""
            agent -> trap 1
            queue <- trap 1 at=1.1 ...
            agent -> trap 2 vcpu=1
            queue <- trap 2 at=2.1 ...
            web -> read 1 1 0x5000 4
            agent <- read 0x10000000000000001 1 0x5000 4
            db -> write 1 2 0x6000 "abcd"
            agent <- write 0x20000000000000001 2 0x6000 "abcd"
            web -> read 1 1 0x5000 4     # asked again: done once
            agent -> memory 0x20000000000000001
            db <- memory 1 at=to.2
            agent -> memory 0x10000000000000001 "abcd"
            web <- memory 1 "abcd" at=to.1
            agent -> memory 0x10000000000000001 "late"
        """)


class TestTheEnd:
    async def test_it_has_come_when_every_server_has_said_so(self):
        await AgentLinkStage().run("""
            agent -> trap 1
            queue <- trap 1 at=1.1 ...
            web -> answer 1 7
            agent <- answer 1 rax=7
            db -> taken 1 at=1.1
            db <- cancel 1 at=1.1
            agent -> end
            web <- end ...
            db <- end ...
            web -> ended at=to.1
            db -> ended at=to.2
            agent <- ended
        """)

    async def test_nobody_waits_for_a_server_that_is_silent(self):
        await AgentLinkStage().run("""
            agent -> trap 1
            queue <- trap 1 at=1.1 ...
            web -> answer 1 7
            agent <- answer 1 rax=7
            agent -> end
            web <- end ...
            !! passes 5
            !! passes 1
            agent <- ended
        """)

    async def test_a_server_that_was_away_with_nats_is_told_again(self):
        await AgentLinkStage().run("""
            agent -> trap 1
            queue <- trap 1 at=1.1 ...
            web -> answer 1 7
            agent <- answer 1 rax=7
            agent -> end
            web <- end ...
            !! nats-lost
            !! nats-back
            web <- end ...
            web -> ended at=to.1
            agent <- ended
        """)

    async def test_nobody_waits_for_one_that_is_missing_either(self):
        await AgentLinkStage().run("""
            agent -> end
            web <- end ...
            !! nobody web
            agent <- ended
        """)

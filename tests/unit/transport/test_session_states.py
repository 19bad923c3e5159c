"""What a session remembers of a VM, state by state: a playbook of frames for each."""

import pytest
from session_stage import SessionStage

pytestmark = pytest.mark.anyio

STATES = {
    "idle": "",
    "with its handler": """
        -> trap 1
        ** takes 1
    """,
    "answered": """
        -> trap 1
        ** takes 1
        !! answers 1 rax=7
        <- answer 1 rax=7
    """,
    "let run": """
        -> trap 1
        ** takes 1
        !! native 1
        <- native 1
    """,
    "refused": """
        -> trap 1 elsewhere=yes
        <- answer 1 rax=0xbad
    """,
    "given back": """
        !! stops
        -> trap 1
        <- returned 1
    """,
    "waiting for memory": """
        -> trap 1
        ** takes 1
        !! writes 1 0x5000 "abcd"
        <- write 1 1 0x5000 "abcd"
    """,
    "over": """
        -> end
        <- ended
        ** over halted
    """,
}
"""What brings a session there."""

every_state = pytest.mark.parametrize("state", STATES)


class TestInEachState:
    @every_state
    async def test_a_ping_is_answered(self, state):
        async with SessionStage() as stage:
            await stage.play(STATES[state])
            await stage.play("""
                -> ping
                <- pong
            """)

    @every_state
    async def test_a_ping_that_came_before_the_connection_was_lost_is_answered_to_nobody(
        self, state
    ):
        async with SessionStage() as stage:
            await stage.play(STATES[state])
            await stage.play("""
                !! lost
                -> ping
                == away=yes
            """)

    @every_state
    async def test_a_second_hello_is_garbage(self, state):
        async with SessionStage() as stage:
            await stage.play(STATES[state])
            await stage.play("""
                -> hello
                ** garbage "HELLO where it must not be"
            """)

    @every_state
    async def test_the_next_connection_takes_the_place_of_the_last(self, state):
        async with SessionStage() as stage:
            await stage.play(STATES[state])
            asked = 'second <- write 1 1 0x5000 "abcd"' if state == "waiting for memory" else ""
            await stage.play(f"""
                !! connects second
                ** hangs-up
                {asked}
                !! lost             # of the first one, which is known already
                == away=no connections=2
                -> ping
                second <- pong
            """)

    @every_state
    async def test_a_cancel_of_a_trap_that_never_came_does_nothing(self, state):
        async with SessionStage() as stage:
            await stage.play(STATES[state])
            await stage.play("-> cancel 99")

    @every_state
    async def test_a_reply_that_nobody_waits_for_is_dropped(self, state):
        async with SessionStage() as stage:
            await stage.play(STATES[state])
            await stage.play('-> memory 99 "late"')


class TestALostConnection:
    async def test_a_trap_that_is_with_its_handler_is_answered_over_the_next_one(self):
        await SessionStage().run("""
            -> trap 1
            ** takes 1
            !! lost
            == away=yes open=1
            !! answers 1 rax=7       # kept: there is nobody to send it to
            == open=0
            !! connects
            -> trap 1
            <- answer 1 rax=7
            == repeated=1 late=0
        """)

    async def test_a_trap_that_comes_again_while_its_handler_is_at_it_runs_once(self):
        await SessionStage().run("""
            -> trap 1
            ** takes 1
            !! lost
            !! connects
            -> trap 1
            !! answers 1 rax=7
            <- answer 1 rax=7
            == repeated=1 open=0
        """)

    async def test_an_answer_that_may_be_lost_is_sent_again(self):
        await SessionStage().run("""
            -> trap 1
            ** takes 1
            !! answers 1 rax=7
            <- answer 1 rax=7
            !! lost
            !! connects
            -> trap 1
            <- answer 1 rax=7
            -> trap 2
            ** takes 2
        """)

    async def test_so_is_that_the_instruction_is_to_run(self):
        await SessionStage().run("""
            -> trap 1
            ** takes 1
            !! native 1
            <- native 1
            !! lost
            !! connects
            -> trap 1
            <- native 1
        """)

    async def test_and_the_fallback_of_one_that_was_refused(self):
        await SessionStage().run("""
            -> trap 1 elsewhere=yes
            <- answer 1 rax=0xbad
            !! lost
            !! connects
            -> trap 1 elsewhere=yes
            <- answer 1 rax=0xbad
            == refused=1 repeated=1
        """)

    async def test_a_trap_that_was_given_back_is_a_new_one_when_it_comes_again(self):
        await SessionStage().run("""
            -> trap 1
            ** takes 1
            !! gives-back 1
            <- returned 1
            == returned=1 open=0
            !! lost
            !! connects
            -> trap 1
            ** takes 1
            == repeated=0
        """)

    async def test_an_access_is_asked_for_over_the_next_one(self):
        await SessionStage().run("""
            -> trap 1
            ** takes 1
            !! reads 1 0x5000 4
            ** allows 4
            <- read 1 1 0x5000 4
            !! lost
            !! connects
            ** allows 4
            <- read 1 1 0x5000 4
            -> memory 1 "abcd"
            ** has "abcd"
            -> memory 1 "late"       # that of the first connection
        """)

    async def test_an_access_that_begins_while_the_agent_is_away_is_asked_for_then(self):
        await SessionStage().run("""
            -> trap 1
            ** takes 1
            !! lost
            !! writes 1 0x5000 "abcd"
            !! connects
            <- write 1 1 0x5000 "abcd"
            -> memory 1
            ** wrote
        """)

    async def test_an_access_that_nobody_waits_for_any_more_is_not_asked_for(self):
        await SessionStage().run("""
            -> trap 1
            ** takes 1
            !! writes 1 0x5000 "abcd"
            <- write 1 1 0x5000 "abcd"
            !! lost
            !! gives-up 1
            !! connects
            -> memory 1
        """)

    async def test_the_end_may_be_said_again_over_the_next_one(self):
        await SessionStage().run("""
            -> end
            <- ended
            ** over halted
            !! lost
            !! connects
            -> end
            <- ended
            == ended_by_itself=yes
        """)

    async def test_a_session_is_given_up_whose_agent_does_not_come_back(self):
        await SessionStage().run("""
            -> trap 1
            ** takes 1
            !! lost
            !! forsaken "away for 30 s"
            ** abandons 1
            ** over lost
            == ended_by_itself=no
        """)


class TestALateAnswer:
    async def test_of_a_trap_whose_vcpu_has_sent_the_next_goes_nowhere(self):
        await SessionStage().run("""
            -> trap 1
            ** takes 1
            -> trap 2
            ** abandons 1
            ** takes 2
            !! answers 1 rax=7
            == late=1 open=1
            !! answers 2 rax=8
            <- answer 2 rax=8
        """)

    async def test_of_a_trap_that_was_answered_goes_nowhere(self):
        await SessionStage().run("""
            -> trap 1
            ** takes 1
            !! answers 1 rax=7
            <- answer 1 rax=7
            !! answers 1 rax=8
            == late=1
            -> trap 1
            <- answer 1 rax=7
        """)

    async def test_of_a_trap_that_was_given_back_goes_nowhere(self):
        await SessionStage().run("""
            -> trap 1
            ** takes 1
            !! gives-back 1
            <- returned 1
            !! answers 1 rax=7
            == late=1
        """)

    async def test_of_a_trap_that_was_cancelled_is_sent_for_the_agent_to_drop(self):
        await SessionStage().run("""
            -> trap 1
            ** takes 1
            -> cancel 1
            ** abandons 1
            !! answers 1 rax=7
            <- answer 1 rax=7
            == late=0
        """)

    async def test_of_a_trap_that_was_overdue_is_sent_for_the_agent_to_drop(self):
        await SessionStage().run("""
            -> trap 1 left=50
            ** takes 1
            !! passes 0.04
            !! passes 0.02
            ** abandons 1
            !! passes 10           # told once
            !! answers 1 rax=7
            <- answer 1 rax=7
        """)

    async def test_a_give_back_of_what_was_answered_does_nothing(self):
        await SessionStage().run("""
            -> trap 1
            ** takes 1
            !! answers 1 rax=7
            <- answer 1 rax=7
            !! gives-back 1
            == returned=0
        """)


class TestACancel:
    @pytest.mark.parametrize("state", ["answered", "let run", "refused", "given back"])
    async def test_of_a_trap_that_is_not_open_does_nothing_and_keeps_its_answer(self, state):
        async with SessionStage() as stage:
            await stage.play(STATES[state])
            await stage.play("-> cancel 1")
            again = {
                "answered": "<- answer 1 rax=7",
                "let run": "<- native 1",
                "refused": "<- answer 1 rax=0xbad",
                "given back": "<- returned 1",
            }[state]
            await stage.play(f"""
                -> trap 1
                {again}
            """)

    async def test_abandons_the_trap_and_no_other(self):
        await SessionStage().run("""
            -> trap 1
            ** takes 1
            -> trap 2 vcpu=1
            ** takes 2
            -> cancel 2
            ** abandons 2
            == open=2              # until the engine has answered it
            !! answers 1 rax=7
            <- answer 1 rax=7
        """)


class TestTheOrderOfTraps:
    async def test_each_vcpu_has_numbers_of_its_own(self):
        await SessionStage().run("""
            -> trap 7 vcpu=1
            ** takes 7
            -> trap 3
            ** takes 3
            -> trap 6 vcpu=1       # its vCPU has gone on
            == repeated=0 open=2
        """)

    async def test_a_vcpu_too_many_is_garbage_and_the_others_are_served(self):
        await SessionStage(vcpus=1).run("""
            -> trap 1
            ** takes 1
            -> trap 2 vcpu=1
            ** garbage "more than 1 vCPUs"
            !! answers 1 rax=7
            <- answer 1 rax=7
        """)

    async def test_one_that_may_have_run_elsewhere_is_run_where_that_is_wanted(self):
        await SessionStage(repeated="run").run("""
            -> trap 1 elsewhere=yes
            ** takes 1
            == refused=0
        """)

    async def test_one_that_comes_again_has_the_deadline_that_it_came_with_last(self):
        await SessionStage().run("""
            -> trap 1 left=50
            ** takes 1
            -> trap 1 left=5000
            !! passes 1
            !! passes 5
            ** abandons 1
        """)


class TestMemory:
    async def test_what_came_along_is_not_asked_for_until_something_is_written(self):
        await SessionStage().run("""
            -> trap 1 memory="0123456789"
            ** takes 1
            !! reads 1 0x5002 4
            ** has "2345"
            !! writes 1 0x5002 "abcd"
            <- write 1 1 0x5002 "abcd"
            -> memory 1
            ** wrote
            !! reads 1 0x5002 4
            ** allows 4
            <- read 2 1 0x5002 4
            -> memory 2 "abcd"
            ** has "abcd"
        """)

    async def test_what_came_along_with_the_last_trap_is_not_that_of_the_next(self):
        await SessionStage().run("""
            -> trap 1 memory="0123456789"
            ** takes 1
            -> trap 2
            ** abandons 1
            ** takes 2
            !! reads 2 0x5002 4
            ** allows 4
            <- read 1 2 0x5002 4
        """)

    async def test_an_error_and_a_reply_of_another_size_are_errors_of_the_handler(self):
        await SessionStage().run("""
            -> trap 1
            ** takes 1
            !! reads 1 0x5000 4
            ** allows 4
            <- read 1 1 0x5000 4
            -> memory 1 error="not mapped"
            ** fails "not mapped"
            !! reads 1 0x5000 4
            ** allows 4
            <- read 2 1 0x5000 4
            -> memory 2 "abc"
            ** fails "3 bytes came, not 4"
        """)


class TestTheEnd:
    async def test_handlers_that_are_at_work_are_abandoned_and_their_answers_sent(self):
        await SessionStage().run("""
            -> trap 1
            ** takes 1
            -> trap 2 vcpu=1
            ** takes 2
            !! answers 2 rax=8
            <- answer 2 rax=8
            -> end
            ** abandons 1
            <- ended
            ** over halted
            !! answers 1 rax=7
            <- answer 1 rax=7
        """)

    async def test_the_first_one_that_is_said_counts(self):
        await SessionStage().run("""
            -> end
            <- ended
            ** over halted
            -> end failed
            <- ended
            !! forsaken "began anew"
        """)

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

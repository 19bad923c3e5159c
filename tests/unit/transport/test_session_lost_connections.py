"""What a session remembers when its connection is lost, and what it knows of guest memory."""

import pytest
from session_stage import SessionStage

pytestmark = pytest.mark.anyio


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

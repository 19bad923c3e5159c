"""How a playbook is read, what its steps are held against, and what it says when they are not."""

from typing import ClassVar

import msgspec
import pytest
from playbook import PlaybookError, Stage, parse

pytestmark = pytest.mark.anyio


class Word(msgspec.Struct):
    text: str
    number: int = 0
    data: bytes = b""
    loud: bool = False


class Parrot(Stage):
    """Says what it is told; counts."""

    frames: ClassVar = {"word": Word}
    usual: ClassVar = {"word": {"loud": True}}

    def __init__(self):
        super().__init__()
        self.count = 0

    def state(self):
        return {"count": self.count}

    async def send(self, frame, step):
        self.count += 1
        frame.loud = True
        self.frame_out(frame, step.who)

    async def when_startled(self):
        self.does("starts")
        self.does("blinks", loose=True)
        self.does("flies")

    async def when_fed(self, what, twice=False):
        for _ in range(1 + twice):
            self.does("eats", what)


async def failure(script):
    with pytest.raises(PlaybookError) as raised:
        await Parrot().run(script)
    return str(raised.value).splitlines()


class TestReading:
    def test_a_step_is_its_end_its_mark_its_name_and_its_values(self):
        steps = parse("""
            # nothing
            web -> trap 0x10 ~1 "two words" no name=none more="a b" ...   # so it is
            == count=1
        """)
        assert len(steps) == 2
        first, second = steps
        assert (first.who, first.mark, first.name, first.rest) == ("web", "->", "trap", True)
        assert first.values == (16, (1 << 64) - 2, "two words", False)
        assert first.fields == {"name": None, "more": "a b"}
        assert (second.mark, second.name, second.fields) == ("==", "", {"count": 1})

    @pytest.mark.parametrize(
        ("line", "why"),
        [
            ("trap 1", "begins with one of"),
            ("->", "without a name"),
            ("a b -> trap", "begins with one of"),
            ('-> trap "1', "cannot be read"),
            ("-> trap ... 1", "cannot be read"),
            ("-> trap a=1 2", "behind one that has one"),
        ],
    )
    def test_a_line_that_is_no_step_is_shown(self, line, why):
        with pytest.raises(PlaybookError, match=why):
            parse(line)


class TestPlaying:
    async def test_what_comes_out_is_as_the_steps_say(self):
        await Parrot().run("""
            -> word hello 7
            <- word hello 7
            we -> word hi loud=no
            we <- word hi
            !! fed bread twice=yes
            ** eats bread
            ** eats "rea"
            == count=2
        """)

    @pytest.mark.parametrize(
        "step",
        [
            "<- word hi",
            "<- word hello",
            "<- word hello 8",
            "<- word hello 7 loud=no",
            "<- word hello 7 more=1",
            "<- word hello 7 0 yes 1",
            "<- other hello 7",
            "we <- word hello 7",
            "** word hello 7",
            "<- word hello yes",
        ],
    )
    async def test_any_other_step_fails(self, step):
        assert "came:     <- word hello number=7" in await failure(f"-> word hello 7\n{step}")

    @pytest.mark.parametrize("place", range(3))
    async def test_what_comes_when_the_loop_says_may_come_anywhere(self, place):
        steps = ["** starts", "** flies"]
        steps.insert(place, "** blinks")
        await Parrot().run("\n".join(["!! startled", *steps]))

    async def test_and_the_others_in_their_order(self):
        assert "came:     ** starts" in await failure("!! startled\n** flies")
        assert (await failure("!! startled\n** blinks\n** flies"))[-1] == "and then: ** flies"

    async def test_what_is_not_named_may_be_anything_behind_dots(self):
        await Parrot().run("""
            -> word hello 7
            <- word hello ...
        """)

    async def test_what_came_and_has_no_step_fails_before_the_next_goes_in(self):
        assert await failure("-> word a\n-> word b\n<- word b") == [
            "a step is not what came",
            "    -> word a",
            ">>> -> word b",
            "expected: nothing, before -> word b",
            "came:     <- word a",
        ]

    async def test_and_at_the_end(self):
        assert "expected: nothing more" in await failure("-> word a")

    async def test_nothing_is_said_where_nothing_came(self):
        assert await failure("<- word a") == [
            "a step is not what came",
            ">>> <- word a",
            "expected: <- word a",
            "came:     nothing",
        ]

    async def test_what_follows_is_shown(self):
        assert (await failure("!! fed bread twice=yes\n** eats bees"))[-1] == (
            "and then: ** eats bread"
        )

    async def test_a_state_is_shown_as_it_is(self):
        told = await failure("== count=1 other=2")
        assert told[-1] == 'came:     == count=0 other="not there"'

    @pytest.mark.parametrize(
        ("step", "why"),
        [
            ("!! sung", "!! sung; fed startled do"),
            ("-> song la", "no frame that can be sent here"),
            ("-> word la no=1", "no"),
        ],
    )
    async def test_what_the_stage_does_not_know_is_said(self, step, why):
        assert why in "\n".join(await failure(step))

    async def test_the_error_of_a_block_comes_out_as_it_is(self):
        with pytest.raises(KeyError):
            async with Parrot():
                raise KeyError

"""When the next trap is looked for: while it pays, and never for long."""

import pytest

from vmibridge.aio import lookahead
from vmibridge.aio.lookahead import Lookahead

MOMENT, WITHOUT_TURN = 0.000_15, 0.000_5


class Looks:
    """A `Lookahead` with a clock of its own, whose time goes on by each vain try."""

    def __init__(self):
        self.now, self.tries, self.yields = 100.0, 0, 0
        self.comes_after = 0
        """Tries in vain."""
        self.ahead = Lookahead()
        self.ahead.turned()

    def sched_yield(self):
        self.yields += 1
        self.now += 0.000_01

    def take(self):
        self.tries += 1
        return self.tries > self.comes_after

    def look(self, comes_after=0):
        """Whether it looked, and how often it tried."""
        self.tries, self.comes_after = 0, comes_after
        return self.ahead.look(self.take), self.tries


@pytest.fixture
def looks(monkeypatch):
    made = []
    monkeypatch.setattr(lookahead, "monotonic", lambda: made[0].now if made else 100.0)
    made.append(Looks())
    monkeypatch.setattr(lookahead.os, "sched_yield", made[0].sched_yield)
    return made[0]


def test_what_is_there_is_taken_at_the_first_try(looks):
    assert [looks.look() for _ in range(5)] == [(True, 1)] * 5
    assert looks.yields == 0


def test_who_is_about_to_send_it_has_the_core_meanwhile(looks):
    assert looks.look(comes_after=7) == (True, 8)
    assert looks.yields == 7
    assert looks.look(comes_after=1) == (True, 2), "that was not in vain"


def test_it_ends_after_a_moment(looks):
    before = looks.now
    looked, tries = looks.look(comes_after=1000)
    assert looked
    assert tries == pytest.approx(MOMENT / 0.000_01, abs=2)
    assert looks.now - before < MOMENT + 0.000_02


def test_after_looks_in_vain_more_and_more_are_left_out(looks):
    looked = []
    for number in range(300):
        looks.ahead.turned()
        if looks.look(comes_after=1000)[0]:
            looked.append(number)
    # 1, 3, 7, ... are left out, and at last 64.
    assert looked == [0, 2, 6, 14, 30, 62, 126, 191, 256]


def test_one_that_was_not_in_vain_ends_that(looks):
    for number in range(7):
        looks.ahead.turned()
        looks.look(comes_after=0 if number == 6 else 1000)
    assert [looks.look() for _ in range(3)] == [(True, 1)] * 3


def test_the_loop_turns_after_half_a_millisecond_whatever_comes(looks):
    count = 0
    while looks.look(comes_after=2)[0]:
        count += 1
    assert count == pytest.approx(WITHOUT_TURN / 0.000_02, abs=2)
    looks.ahead.turned()
    assert looks.look() == (True, 1)


def test_what_is_raised_is_the_callers(looks):
    def take():
        raise LookupError("gone")

    with pytest.raises(LookupError, match="gone"):
        looks.ahead.look(take)

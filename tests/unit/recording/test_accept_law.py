"""A law: what was accepted of a changed handler replays the same, and to accept it again changes
nothing, whatever the handler awaits now, and in which order."""

import pytest
from changed_parts import CODES, EVERY_LOOP, Case, assert_accesses_are_of_open_traps
from hypothesis import example, given, settings
from hypothesis import strategies as st
from laws import examples

pytestmark = pytest.mark.no_cover

VIRTUAL = ["asyncio", "trio"]
"""Where the machine stands still while it is recorded on a real clock, no clock says what came
first."""


def hold(folder, seed, then, now):
    first, second, third = (folder / f"{name}.mcap" for name in "abc")
    is_one = seed % 2 == 0 and then in (now, "asyncio" if now == "uvloop" else now)
    case = Case(seed, codes=CODES if is_one else EVERY_LOOP)
    case.record(first, then)
    case.accept(first, second, now)
    assert_accesses_are_of_open_traps(second)
    for loop in [now] if is_one else sorted({now, *VIRTUAL}):
        differences = []
        case.replay(second, loop, differences)
        assert differences == [], loop
    assert case.accept(second, third, now) == 0
    assert third.read_bytes() == second.read_bytes()


# An answer that comes later than its recorded reply, and a handler that begins before its turn.
@example(seed=4185676, then="asyncio", now="asyncio")
@example(seed=1072, then="asyncio", now="asyncio")
# Where trio hears of a cancellation, in two steps; a step, and the cut-off behind it.
@example(seed=209, then="asyncio", now="trio")
@example(seed=977, then="asyncio", now="asyncio")
# Requests that get WAIT, or are cut off, before their handlers have begun.
@example(seed=322, then="trio", now="asyncio")
@example(seed=1127, then="trio", now="trio")
# A call of `vmi.outside` behind another one; an access in the midst of which a retry came; a retry
# that is given while something is waited for.
@example(seed=1365, then="asyncio", now="trio")
@example(seed=1188, then="asyncio", now="trio")
@example(seed=2207, then="trio", now="trio")
# One that has the only place, and waits for what is behind in the file.
@example(seed=1163, then="trio", now="asyncio")
@example(seed=1189, then="asyncio", now="trio")
@settings(max_examples=examples(40), derandomize=True)
@given(
    seed=st.integers(0, 1 << 32),
    then=st.sampled_from(VIRTUAL),
    now=st.sampled_from(["asyncio", "asyncio", "trio", "trio", "uvloop"]),
)
def test_what_was_accepted_replays_the_same(tmp_path_factory, seed, then, now):
    hold(tmp_path_factory.mktemp("law"), seed, then, now)


@pytest.mark.slow
@pytest.mark.parametrize("now", ["asyncio", "trio", "uvloop"])
def test_hundreds_of_accepted_recordings_replay_the_same(tmp_path, now):
    for seed in range(50 if now == "uvloop" else 300):
        hold(tmp_path, seed, VIRTUAL[seed // 2 % 2], now)
        for path in tmp_path.iterdir():
            path.unlink()

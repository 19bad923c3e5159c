"""A law: what was accepted of a changed handler replays the same, and to accept it again changes
nothing, whatever the handler awaits now, and in which order."""

import pytest
from changed_parts import CODES, EVERY_LOOP, Case, accept, replay
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
    names = list(case.plans)
    case.record(first, then)
    changed = case.bridges(changed=True)
    accept(first, second, names, changed, now)
    for loop in {now} if is_one else {now, *VIRTUAL}:
        differences = []
        replay(second, names, case.bridges(changed=True), loop, differences=differences)
        assert differences == [], loop
    assert accept(second, third, names, case.bridges(changed=True), now)[0] == 0
    assert third.read_bytes() == second.read_bytes()


# An answer that comes later than its recorded reply, and a handler that begins before its turn.
@example(seed=4185676, then="asyncio", now="asyncio")
@example(seed=1072, then="asyncio", now="asyncio")
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

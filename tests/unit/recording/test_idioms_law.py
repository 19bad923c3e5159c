"""A law: handlers that await what handlers await in practice replay the same, and what is accepted
of changed ones replays the same."""

import pytest
from changed_parts import CODES, EVERY_LOOP
from hypothesis import example, given, settings
from hypothesis import strategies as st
from idiom_parts import IDIOMS, WITHOUT_DEADLINES, IdiomCase
from laws import examples

pytestmark = pytest.mark.no_cover

LOOPS = ["asyncio", "trio"]
SEEDS = st.integers(0, 1 << 32)


def case(seed, then, now):
    """Whatever ends in the moment of a deadline may do so in another order on the other loop."""
    if then == now:
        return IdiomCase(seed, codes=CODES, idioms=IDIOMS)
    return IdiomCase(seed, codes=EVERY_LOOP, idioms=WITHOUT_DEADLINES)


# A group whose tasks have ended by the time at which its cancellation was heard; a cut-off as a
# nursery ends; and one step of trio that are two on asyncio.
@example(seed=51, then="asyncio", now="asyncio")
@example(seed=143, then="trio", now="trio")
@example(seed=95, then="trio", now="asyncio")
@settings(max_examples=examples(400), derandomize=True)
@given(seed=SEEDS, then=st.sampled_from(LOOPS), now=st.sampled_from(LOOPS))
def test_unchanged_handlers_are_the_same(tmp_path_factory, seed, then, now):
    path, differences = tmp_path_factory.mktemp("law") / "run.mcap", []
    what = case(seed, then, now)
    what.record(path, then)
    what.replay(path, now, differences, changed=False)
    assert differences == []


@settings(max_examples=examples(160), derandomize=True)
@given(seed=SEEDS, then=st.sampled_from(LOOPS))
def test_what_was_accepted_on_trio_replays_the_same(tmp_path_factory, seed, then):
    folder = tmp_path_factory.mktemp("law")
    first, second, third = (folder / f"{name}.mcap" for name in "abc")
    what = IdiomCase(seed, codes=EVERY_LOOP, idioms=WITHOUT_DEADLINES)
    what.record(first, then)
    what.accept(first, second, "trio")
    for loop in LOOPS:
        differences = []
        what.replay(second, loop, differences)
        assert differences == [], loop
    assert what.accept(second, third, "trio") == 0
    assert third.read_bytes() == second.read_bytes()

"""Laws: an unchanged handler replays the same, whatever it awaits; a changed one is found."""

from collections import Counter

import pytest
from determinism_parts import (
    assert_same,
    bridges,
    changed_bridges,
    random_guests,
    random_settings,
    record,
    replay,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import examples

from vmibridge import BridgeResponse
from vmibridge.bridge.outcome import OutcomeKind
from vmibridge.recording.file.reader import RecordingReader
from vmibridge.recording.messages import REPLY

pytestmark = pytest.mark.no_cover

EVERY_LOOP = frozenset({1, 2, 3, 4, 6, 7, 10, 13, 14, 15, 16})
"""Methods of `Counts` that no loop does in another order. On trio a scope that is cancelled while a
sleep in it ends takes the sleep's place."""
NOT_TRIO = EVERY_LOOP | {5}
"""The others start tasks, whose steps are not recorded, or end a sleep in the moment of a deadline
of their own. Where the machine stands still while they are recorded, no clock says what came first:
they are recorded on virtual time."""
LOOPS = st.sampled_from(["asyncio", "uvloop", "trio"])
NO_ANSWER = {"the policy denied it", "the recording ends before its answer"}
"""Why a request is not compared. Where there are few places, results that wait for a retry go."""


def recorded(path, seed, then, now, *, alike=False):
    """Record what the seed says, and return the names of the VMs."""
    virtual = then == now == "asyncio" and seed % 2 == 0
    codes = None if virtual else EVERY_LOOP if "trio" in (then, now) else NOT_TRIO
    guests = random_guests(seed, codes, alike=alike)
    record(path, guests, bridges(), then, virtual=virtual, **random_settings(seed))
    return list(guests)


def replies_in(path):
    with RecordingReader(path) as reader:
        return [reply for _, reply in reader.messages(REPLY)]


def hold(path, seed, then, now):
    names = recorded(path, seed, then, now, alike=seed % 3 == 0)
    how = {"loop": now, "virtual": now != "uvloop", "unchecked": NO_ANSWER}
    compared = assert_same(path, names, bridges(), **how)
    kinds = Counter(reply.kind for reply in replies_in(path))
    answered = kinds.total() - kinds[OutcomeKind.WAITING] - kinds[OutcomeKind.DENIED]
    assert compared >= answered > 0


@settings(max_examples=examples(6))
@given(seed=st.integers(0, 1 << 32), then=LOOPS, now=LOOPS)
def test_whatever_was_recorded_replays_the_same(tmp_path_factory, seed, then, now):
    hold(tmp_path_factory.mktemp("law") / "run.mcap", seed, then, now)


@pytest.mark.slow
@pytest.mark.parametrize("then", ["asyncio", "uvloop", "trio"])
def test_a_thousand_recordings_replay_the_same(tmp_path, then):
    for seed in range(334):
        path = tmp_path / f"{seed}.mcap"
        hold(path, seed, then, ["asyncio", "uvloop", "trio"][seed % 3])
        path.unlink()


def raises(found):
    raise RuntimeError("as it does now")


CHANGES = {
    "value": lambda found: BridgeResponse(value1=0x7777, output=found.output),
    "output": lambda found: BridgeResponse(value1=found.value1, output=["changed"]),
    "nothing": lambda _: None,
    "error": raises,
}


@settings(max_examples=examples(6))
@given(
    seed=st.integers(0, 1 << 32),
    loops=st.tuples(LOOPS, st.sampled_from(["asyncio", "trio"])),
    change=st.sampled_from(sorted(CHANGES)),
    data=st.data(),
)
def test_a_changed_handler_is_found_at_its_trap(tmp_path_factory, seed, loops, change, data):
    path = tmp_path_factory.mktemp("law") / "run.mcap"
    names = recorded(path, seed, *loops)
    answers = [reply for reply in replies_in(path) if reply.kind is OutcomeKind.HANDLED]
    reply = answers[data.draw(st.integers(0, len(answers) - 1))]
    changed = changed_bridges(reply.vm, reply.packet, CHANGES[change])
    results = replay(path, names, changed, loop=loops[1])
    found = [result.first for result in results if result.first is not None]
    first = reply.seq if reply.retry_of is None else reply.retry_of
    assert [(each.vm, each.seq, each.packet) for each in found] == [(reply.vm, first, reply.packet)]
    assert sum(result.different for result in results) == 1

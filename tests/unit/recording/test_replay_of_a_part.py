"""A replay of a part of a recording: an unchanged handler is the same in any of them."""

from contextlib import suppress

import anyio
import pytest
from determinism_parts import (
    Counts,
    Pool,
    Serial,
    Shared,
    ask,
    call,
    loop_of,
    random_guests,
    record,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import examples
from outside_parts import CutOff, Outer, guest_of, random_guest

from vmibridge import Bridge, BridgeServer, method
from vmibridge.errors import NotReplayedError
from vmibridge.recording import Replay
from vmibridge.recording.replay.backend import ReplayBackend
from vmibridge.recording.replay.verdict import Verdict

pytestmark = pytest.mark.no_cover

EVERY_LOOP = frozenset({1, 2, 3, 4, 6, 7, 10})
"""Methods of `Counts` whose steps have one order."""
SEQS = st.none() | st.integers(0, 30)
TIMES = st.none() | st.integers(0, 60).map(lambda milliseconds: milliseconds / 1e3)


@st.composite
def parts(draw, vms=()):
    """What of a recording is compared."""
    return {
        "first": draw(SEQS),
        "last": draw(SEQS),
        "since": draw(TIMES),
        "until": draw(TIMES),
        "vcpus": draw(st.sets(st.integers(0, 3), max_size=2)),
        "vms": draw(st.sets(st.sampled_from(vms), max_size=2)) if vms else (),
    }


def played(path, *handlers, **how):
    """Replay it, and return the result; a part may be empty."""
    replay = Replay(path, *handlers, **how)
    replay.begin()
    try:
        with suppress(NotReplayedError):
            replay.play()
    finally:
        replay.end()
    result = replay.result
    assert (result.different, result.unchecked, result.outside) == (0, {}, {}), replay.report()
    return result


@settings(max_examples=examples(10), deadline=None)
@given(seed=st.integers(0, 1 << 32), data=st.data())
def test_of_several_vms_that_share_a_handler(tmp_path_factory, seed, data):
    path = tmp_path_factory.mktemp("part") / "run.mcap"
    guests = random_guests(seed, EVERY_LOOP)
    shared = Shared()
    record(path, guests, lambda _: Bridge(Counts(), Serial(), Pool(), shared), virtual=True)
    part = data.draw(parts([*guests]))
    played(path, Counts, Serial, Pool, data.draw(st.sampled_from([Shared, Shared()])), **part)


@settings(max_examples=examples(15), deadline=None)
@given(seed=st.integers(0, 1 << 32), part=parts())
def test_of_one_vm_calls_nothing_outside(tmp_path_factory, seed, part):
    path = tmp_path_factory.mktemp("part") / "run.mcap"
    record(path, {"vm": random_guest(seed)}, lambda _: Bridge(Outer()), virtual=True)
    played(path, CutOff, **part)


class TestWhatIsBehind:
    def test_is_asked_while_a_request_that_is_compared_waits(self, tmp_path):
        """Its answer counts those that came meanwhile."""

        async def guest(vm):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(call, vm, ask(2, 20), 0)
                await anyio.sleep(0.005)
                for _ in range(3):
                    await call(vm, ask(1), 1)

        path = tmp_path / "run.mcap"
        record(path, {"vm": guest}, lambda _: Bridge(Counts()), virtual=True)
        for part in ({"last": 1}, {"until": 0.001}, {"vcpus": 0, "last": 1}):
            assert played(path, Counts, **part).compared == 1

    def test_is_asked_where_it_is_a_retry_of_one_that_is_compared(self, tmp_path):
        path = tmp_path / "run.mcap"
        record(path, {"vm": guest_of(ask(4, 30))}, lambda _: Bridge(Outer()), virtual=True)
        assert played(path, CutOff, last=1).compared == 1

    @pytest.mark.parametrize("how", [{"limit": 1}, {"fail_fast": True}], ids=str)
    def test_calls_nothing_outside_when_the_replay_has_ended(self, tmp_path, how):
        class Wrong(CutOff):
            @method(2)
            async def at_once(self, vmi, packet):
                return self.answer("wrong")

        async def guest(vm):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(call, vm, ask(1, 20), 0)
                await anyio.sleep(0.005)
                await call(vm, ask(2), 1)

        path = tmp_path / "run.mcap"
        record(path, {"vm": guest}, lambda _: Bridge(Outer()), virtual=True)
        result = replayed_by(path, Wrong(), Verdict(**how))
        assert (result.compared, result.outside) == (1, {})


def replayed_by(path, handler, verdict):
    async def main():
        async with ReplayBackend(path, verdict=verdict) as backend:
            async for _ in BridgeServer(backend, Bridge(handler)).run():
                pass
        return backend.result

    return anyio.run(main, **loop_of("asyncio", virtual=True))

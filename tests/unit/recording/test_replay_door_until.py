"""What `Replay.until` is asked for: what is wrong, what was played, what never comes."""

import pytest
from replay_parts import Probe, Shared, everything, record

from vmibridge.errors import NotReplayedError
from vmibridge.recording import Replay
from vmibridge.recording.edit.editing import EditOptions, edit

pytestmark = pytest.mark.anyio
TRAPS = 28
"""Of `everything`."""


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """One recording of two VMs."""
    folder = tmp_path_factory.mktemp("until")
    parts = [folder / "a.mcap", folder / "b.mcap"]
    for part in parts:
        record(part, everything, vm=part.stem)
    edit(parts, folder / "both.mcap", EditOptions())
    return folder / "both.mcap"


@pytest.fixture
def path(merged):
    return merged.with_name("a.mcap")


async def test_what_is_true_of_no_request_is_refused(path):
    wrong = (
        (TypeError, "what is the number of a trap or a function, not", ("2", True, 2.0)),
        (ValueError, "the number of a trap is 1 or more, not", (0, -1)),
    )
    keywords = {"vm": 1, "vcpu": "0", "handler": Probe(), "request": "1", "method": 1.0}
    async with Replay(path, Probe, Shared) as replay:
        for error, why, values in wrong:
            for value in values:
                with pytest.raises(error, match=why):
                    await replay.until(value)
        for name, value in [*keywords.items(), ("handler", int)]:
            with pytest.raises(TypeError, match=f"^{name} is "):
                await replay.until(**{name: value})
        assert replay.result.compared == 0
        assert (await replay.until(1)).seq == 1


async def test_what_was_played_is_told_and_nothing_is_played(path):
    async with Replay(path, Probe, Shared) as replay:
        await replay.until(2)
        for vm in (None, "a"):
            for seq in (1, 2):
                with pytest.raises(ValueError, match=f"trap {seq} has been played already"):
                    await replay.until(seq, vm=vm)
        assert replay.result.compared == 2
        assert (await replay.until(3)).seq == 3
        assert (await replay.run()).compared == TRAPS
        with pytest.raises(ValueError, match="trap 1 has been played already"):
            await replay.until(1)


async def test_each_vm_has_numbers_of_its_own(merged):
    async with Replay(merged, Probe, Shared, rename={"b": "web"}) as replay:
        with pytest.raises(ValueError, match=r"^trap 1: each VM has one; say .* of a, web$"):
            await replay.until(1)
        assert replay.result.compared == 0
        assert {(await replay.until(1, vm=vm)).vm for vm in ("a", "web")} == {"a", "web"}
        for vm in ("a", "web"):
            with pytest.raises(ValueError, match="trap 1 has been played already"):
                await replay.until(1, vm=vm)
        assert (await replay.until(2, vm="web")).vm == "web"


async def test_a_number_is_of_the_one_vm_that_is_compared(merged):
    async with Replay(merged, Probe, Shared, vms="b", rename={"b": "web"}) as replay:
        assert (await replay.until(1)).vm == "web"
        with pytest.raises(NotReplayedError, match=r"is waited for: trap 999, vm 'web'$"):
            await replay.until(999)


async def test_what_never_came_is_named(path):
    async with Replay(path, Probe, Shared) as replay:
        for asked, name in (
            ({"handler": "nope"}, "handler 'nope'"),
            ({"vm": "x", "vcpu": 3, "method": "look_up"}, "vm 'x', vcpu 3, method 'look_up'"),
            ({"handler": Probe, "request": 9}, "handler 'probe', request 9"),
        ):
            with pytest.raises(NotReplayedError, match=f"is waited for: {name}$"):
                await replay.until(**asked)
        with pytest.raises(NotReplayedError, match=r"is waited for: trap 999, vm 'a'$"):
            await replay.until(999, vm="a")
        with pytest.raises(NotReplayedError, match=r"is waited for: one as the function says$"):
            await replay.until(lambda each: each.seq > 999)
        with pytest.raises(NotReplayedError, match=r"is waited for: any$"):
            await replay.until()

"""`Replay`, as a test in Python has it: played in steps, looked at while it stands still."""

import threading
from functools import partial

import anyio
import pytest
from replay_parts import LOOPS, MAGIC, Probe, Shared, ask, everything, record

from vmibridge import Bridge, BridgeHandler, BridgeResponse, Gate, method
from vmibridge.bridge.outcome import OutcomeKind
from vmibridge.engine.settings import ServerSettings
from vmibridge.errors import (
    BackendSpecError,
    ConfigError,
    HandlerLifeError,
    NotReplayedError,
    RecordingReadError,
    ServerStateError,
)
from vmibridge.recording import Replay
from vmibridge.recording.edit.editing import EditOptions, edit
from vmibridge.recording.replay.options import SettingChanges

anyio_loops = pytest.mark.anyio
TRAPS = 28
"""Of `everything`."""


class Changed(Probe):
    """Answers differently from the second time on."""

    name = "probe"

    @method(1)
    async def add(self, vmi, packet):
        self.asked.append(packet.value1)
        wrong = len(self.asked) > 1
        return BridgeResponse(value1=packet.value1 + 1 + wrong).with_output(
            {"sum": packet.value1 + 1}
        )


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    made = tmp_path_factory.mktemp("door") / "run.mcap"
    record(made, everything)
    return made


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert [each.name for each in threading.enumerate() if each.name == "vmibridge replay"] == []


class TestRun:
    pytestmark = anyio_loops

    async def test_an_unchanged_handler_answers_the_same(self, path):
        async with Replay(path, Probe(), Shared()) as replay:
            result = await replay.run()
            assert (result.compared, result.different) == (TRAPS, 0)
            assert replay.difference is None
            assert replay.differences == ()

    async def test_a_changed_handler_differs_at_the_right_trap(self, path):
        async with Replay(path, Changed, Shared) as replay:
            result = await replay.run()
            assert result.different == 2
            assert [each.seq for each in replay.differences] == [2, 3]
            assert replay.difference == result.first == replay.differences[0]
            (field,) = replay.difference.fields
            assert (field.field, field.expected, field.got) == ("value1", "0x2", "0x3")
            assert "probe/add value1: 2 requests, from trap 2 of vm vm" in replay.report()

    async def test_run_again_tells_the_same(self, path):
        async with Replay(path, Probe, Shared) as replay:
            assert await replay.run() == await replay.run()

    async def test_what_rules_ignore_is_no_difference(self, path):
        async with Replay(path, Changed, Shared, ignore="probe:value1") as replay:
            result = await replay.run()
            assert (result.different, result.ignored) == (0, 2)

    async def test_some_requests_are_compared(self, path):
        async with Replay(path, Changed, Shared, requests=1, methods=["add", 2]) as replay:
            assert (await replay.run()).compared == 4
        async with Replay(path, Changed, Shared, requests="shared", vcpus=[1, 2]) as replay:
            assert (await replay.run()).compared == 10
        async with Replay(path, Changed, Shared, first=3, last=4) as replay:
            assert (await replay.run()).compared == 2
            assert [each.seq for each in replay.differences] == [3]
        async with Replay(path, Changed, Shared, since=0.0, until=3600) as replay:
            assert (await replay.run()).compared == TRAPS

    async def test_nothing_compared_is_an_error(self, path):
        async with Replay(path, Probe, Shared, requests=0x55) as replay:
            with pytest.raises(NotReplayedError, match="no trap matches request 0x0055; there"):
                await replay.run()
        with pytest.raises(NotReplayedError, match="no request was compared"):
            async with Replay(path, Probe, Shared):
                pass

    async def test_an_hour_takes_no_time(self, tmp_path):
        """Virtual time, on whatever loop the test runs: the recorded waits are not waited for."""
        made = tmp_path / "slow.mcap"
        await anyio.to_thread.run_sync(partial(record, made, _slowly, Bridge(Sleeper())))
        async with Replay(made, Hours) as replay:
            await replay.run()
            assert replay.difference is None
            assert replay.handler(Hours).slept == 3


class Sleeper(BridgeHandler[int]):
    MAGIC = MAGIC
    REQUEST = 3
    name = "sleeper"
    timeout = 1e6
    seconds = 0.001

    def __init__(self):
        self.slept = 0

    async def handle(self, vmi, packet):
        await anyio.sleep(self.seconds)
        self.slept += 1
        return BridgeResponse(value1=self.slept)


class Hours(Sleeper):
    name = "sleeper"
    seconds = 3600


async def _slowly(vm):
    for _ in range(3):
        await vm.call(ask(0, request=3))


class TestUntil:
    pytestmark = anyio_loops

    async def test_stands_still_behind_the_answer_and_goes_on(self, path):
        probe = Probe()
        async with Replay(path, probe, Shared()) as replay:
            at = await replay.until(2)
            assert probe.asked == [0, 1]
            assert (at.seq, at.vm, at.vcpu, at.handler, at.method) == (2, "vm", 0, "probe", "add")
            assert at.packet == ask(1, 1)
            assert at.given.kind is at.expected.kind is OutcomeKind.HANDLED
            assert at.output == {"sum": 2}
            assert replay.result.compared == 2
            await anyio.lowlevel.checkpoint()
            assert probe.asked == [0, 1]
            await replay.run()
            assert probe.asked == [0, 1, 2]

    async def test_nothing_of_the_replay_goes_on_meanwhile(self, path):
        """Not a task that a handler started, either: it counts as fast as its loop turns."""
        ticking = Ticking()
        async with Replay(path, ticking, Shared()) as replay:
            await replay.until(2)
            before = ticking.ticks
            for _ in range(100):
                await anyio.lowlevel.checkpoint()
            assert ticking.ticks == before
            await replay.until(lambda _: ticking.ticks > before)

    async def test_by_what_a_request_is(self, path):
        async with Replay(path, Probe, Shared) as replay:
            assert (await replay.until(handler=Probe, method="copy")).seq == 4
            assert (await replay.until(method=4)).seq == 6
            found = await replay.until(handler="shared", vcpu=2, vm="vm")
            assert (found.vcpu, found.packet.request) == (2, 2)
            assert (await replay.until(request=2)).seq != found.seq

    async def test_by_a_function(self, path):
        async with Replay(path, Changed, Shared) as replay:
            found = await replay.until(lambda each: each.difference is not None)
            assert found.seq == 2
            assert found.difference == replay.difference

    async def test_what_the_function_raises_is_raised(self, path):
        async with Replay(path, Probe, Shared) as replay:
            with pytest.raises(ZeroDivisionError):
                await replay.until(lambda each: each.seq / 0)
            # It stands still there, and may go on.
            assert replay.result.compared == 1
            assert (await replay.run()).compared == TRAPS

    async def test_that_never_comes_is_an_error(self, path):
        async with Replay(path, Probe, Shared) as replay:
            for _ in range(2):
                with pytest.raises(NotReplayedError, match="ends before the request"):
                    await replay.until(999)
            assert (await replay.run()).compared == TRAPS


class Ticking(Probe):
    """A task of it turns and turns."""

    name = "probe"

    def __init__(self):
        super().__init__()
        self.ticks = 0

    async def __aenter__(self):
        self._tasks = anyio.create_task_group()
        await self._tasks.__aenter__()
        self._tasks.start_soon(self._tick)
        return self

    async def __aexit__(self, *error):
        self._tasks.cancel_scope.cancel()
        return await self._tasks.__aexit__(*error)

    async def _tick(self):
        while True:
            self.ticks += 1
            await anyio.sleep(1e-6)


class TestIteration:
    pytestmark = anyio_loops

    async def test_gives_every_request_and_stands_still_behind_each(self, path):
        probe, seen = Probe(), []
        async with Replay(path, probe, Shared()) as replay:
            async for request in replay:
                assert request.difference is request.unchecked is None
                assert probe.asked == list(range(min(3, request.seq)))
                seen.append(request.seq)
        assert sorted(seen) == list(range(1, TRAPS + 1))

    async def test_goes_on_where_it_was_left(self, path):
        async with Replay(path, Probe, Shared) as replay:
            async for request in replay:
                if request.method == "fail":
                    break
            assert (await anext(replay)).method == "unmapped"
            assert (await replay.run()).compared == TRAPS
            assert [each async for each in replay] == []

    async def test_tells_what_is_not_compared(self, path):
        async with Replay(path, Probe, Shared, last=5, methods="copy") as replay:
            told = {each.seq: each.unchecked async for each in replay}
        assert told[4] is None
        assert set(told) == {1, 2, 3, 4, 5}
        assert told[1] == "it is not among those that are compared"

    async def test_tells_what_was_left_out_and_what_was_not_asked(self, tmp_path):
        made = tmp_path / "redacted.mcap"
        rules = {"redact": ["0x0002:value1", "0x0001:memory"]}
        await anyio.to_thread.run_sync(partial(record, made, everything, **rules))
        async with Replay(made, Probe, Shared) as replay:
            told = [each async for each in replay]
        unasked = [
            each for each in told if each.unchecked == "value1 was left out of the recording"
        ]
        assert {each.packet.request for each in unasked} == {2}
        assert [each.given for each in unasked] == [None] * 20
        (copied,) = (each for each in told if each.seq == 4)
        assert copied.unchecked == "memory was left out of the recording"
        assert sum(replay.result.unchecked.values()) == 21
        assert replay.result.compared == TRAPS - 21

    async def test_a_request_with_its_retries_is_one(self, tmp_path):
        made = tmp_path / "retried.mcap"
        await anyio.to_thread.run_sync(partial(record, made, _patient, Bridge(Probe(0.1))))
        async with Replay(made, lambda _: Probe(0.1)) as replay:
            found = await replay.until(2)
            assert found.seq == 1
            assert found.retries[0] == 2
            assert found.given.kind is OutcomeKind.HANDLED
            assert found.expected.retry_of == 1
            assert [each async for each in replay] == []


async def _patient(vm):
    while (await vm.call(ask(5))).rax == Gate.WAIT:
        await anyio.sleep(0.001)


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vms")
    parts = [folder / "a.mcap", folder / "b.mcap"]
    for part in parts:
        record(part, everything, vm=part.stem)
    made = folder / "both.mcap"
    edit(parts, made, EditOptions())
    return made


class TestSeveralVms:
    pytestmark = anyio_loops

    async def test_each_has_handlers_of_its_own(self, merged):
        async with Replay(merged, Probe, Shared, rename={"b": "web"}) as replay:
            await replay.until(2, vm="web")
            assert replay.handler(Probe, "web").asked == [0, 1]
            assert replay.handler(Probe, "a") is replay.handler(Probe)
            assert (await replay.run()).compared == 2 * TRAPS
            with pytest.raises(LookupError, match="no handler Probe of b"):
                replay.handler(Probe, "b")

    async def test_one_of_them(self, merged):
        async with Replay(merged, Probe(), Shared(), vms="b") as replay:
            assert {each.vm async for each in replay} == {"b"}
            assert replay.result.compared == TRAPS

    async def test_an_instance_is_for_one(self, merged):
        with pytest.raises(ConfigError, match="would serve several VMs"):
            async with Replay(merged, Probe(), Shared):
                raise AssertionError("not entered")

    async def test_a_function_makes_one_for_each(self, merged):
        made = []

        def make(vm):
            made.append(vm)
            return Probe()

        async with Replay(merged, make, lambda _: Shared()) as replay:
            assert sorted(made) == ["a", "b"]
            assert (await replay.run()).different == 0

    async def test_a_class_that_is_shared_is_made_once(self, merged):
        made = []

        class Counted(Shared):
            name = "shared"
            shared = True

            def __init__(self):
                super().__init__()
                made.append(self)

        async with Replay(merged, Probe, Counted) as replay:
            await replay.run()
            assert replay.handler(Counted, "a") is replay.handler(Counted, "b") is made[0]
        assert len(made) == 1

    async def test_several_replays_at_a_time(self, merged, path):
        async with Replay(merged, Probe, Shared) as one, Replay(path, Probe, Shared) as other:
            await one.until(3, vm="a")
            await other.until(5)
            assert (await one.run()).compared == 2 * TRAPS
            assert (await other.run()).compared == TRAPS


def test_settings_are_those_of_the_server():
    assert list(SettingChanges.__annotations__) == list(ServerSettings.__struct_fields__)


@pytest.mark.parametrize("loop", LOOPS, ids=["asyncio", "uvloop", "trio"])
def test_settings_are_as_recorded_but_for_what_is_given(tmp_path, loop):
    made = tmp_path / "run.mcap"
    record(made, _unmatched, fallback=BridgeResponse(value1=0x77))

    async def main():
        async with Replay(made, Probe) as replay:
            assert (await replay.run()).different == 0
        async with Replay(made, Probe, fallback=BridgeResponse(value1=0x78)) as replay:
            await replay.run()
            (field,) = replay.difference.fields
            assert (field.expected, field.got) == ("0x77", "0x78")

    anyio.run(main, backend=loop[0], backend_options=loop[1])


async def _unmatched(vm):
    await vm.call(ask(3))


@anyio_loops
class TestWhatIsWrong:
    async def test_values_that_are_none(self, path):
        for wrong in (
            {"ignore": "nonsense"},
            {"since": "tomorrow"},
            {"requests": 0x1_0000},
            {"outcomes": "fine"},
        ):
            with pytest.raises(ConfigError):
                Replay(path, Probe, **wrong)
        with pytest.raises(ConfigError, match="at least one handler"):
            Replay(path)
        with pytest.raises(TypeError, match="'colour'"):
            Replay(path, Probe, colour="red")

    async def test_a_file_a_vm_a_setting_a_handler(self, path, tmp_path):
        bad = tmp_path / "bad.mcap"
        bad.write_bytes(b"no recording")
        for made, error in (
            (Replay(bad, Probe), RecordingReadError),
            (Replay(tmp_path / "none.mcap", Probe), RecordingReadError),
            (Replay(path, Probe, vms="web"), BackendSpecError),
            (Replay(path, Probe, rename={"web": "b"}), ConfigError),
            (Replay(path, lambda _: 1 / 0), ZeroDivisionError),
            (Replay(path, Unwilling), HandlerLifeError),
        ):
            with pytest.raises(error):
                async with made:
                    await made.run()

    async def test_it_is_entered_once_and_before_it_is_played(self, path):
        replay = Replay(path, Probe, Shared)
        with pytest.raises(ServerStateError):
            await replay.run()
        with pytest.raises(ServerStateError):
            replay.handler(Probe)
        async with replay:
            await replay.run()
        with pytest.raises(ServerStateError):
            async with replay:
                raise AssertionError("not entered")


class Unwilling(Probe):
    name = "probe"

    async def __aenter__(self):
        raise OSError("no room")

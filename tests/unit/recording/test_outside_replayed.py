"""What came from outside by `vmi.outside` is given again in a replay, and nothing is called."""

import time
from contextlib import AsyncExitStack
from functools import partial

import anyio
import msgspec
import pytest
from determinism_parts import ask, call, loop_of, record, replay
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import examples
from outside_parts import LAST, CutOff, OtherKeys, Outer, guest_of, random_guest

from vmibridge import Bridge, BridgeResponse, BridgeServer, method
from vmibridge.errors import OutsideError
from vmibridge.recording import NewRecording
from vmibridge.recording.file.reader import RecordingReader
from vmibridge.recording.messages import OUTSIDE, Outside
from vmibridge.recording.recorder import Recorder
from vmibridge.recording.replay import outside
from vmibridge.recording.replay.accept import Accepted, write_accepted
from vmibridge.recording.replay.backend import ReplayBackend
from vmibridge.recording.replay.ignore import IgnoreRule
from vmibridge.recording.replay.options import ReplayOptions, replay_settings
from vmibridge.recording.replay.verdict import Verdict
from vmibridge.testing import FakeGuest

LOOPS = ["asyncio", "uvloop", "trio"]
EACH = range(1, LAST + 1)


def recorded(path, guest, handler=Outer, loop="asyncio", **more):
    record(path, {"vm": guest}, lambda _: Bridge(handler()), loop, **more)
    return path


def replayed(path, handler, loop="asyncio", *, to=None, verdict=None, virtual=True, **options):
    """Replay it; returns the result. `to`: where that is recorded."""

    async def main():
        backend = ReplayBackend(path, ReplayOptions(**options), verdict=verdict)
        async with AsyncExitStack() as stack:
            taps = [] if to is None else [await stack.enter_async_context(Recorder(to))]
            await stack.enter_async_context(backend)
            timeout = replay_settings(backend.session.settings).timeout
            server = BridgeServer(backend, Bridge(handler), timeout=timeout, taps=taps)
            async for _ in server.run():
                pass
        return backend.result

    return anyio.run(main, **loop_of(loop, virtual=virtual))


def calls_of(path):
    with RecordingReader(path) as reader:
        return [each.message for each in reader.messages(OUTSIDE)]


def assert_same(result):
    assert (result.first, result.unchecked, result.outside) == (None, {}, {})
    assert result.compared > 0


class TestAnUnchangedHandler:
    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def however_long_it_stood_still(cls):
        """A handler whose timeout passes more than a second before is taken for a changed one; this
        process may have stood still for longer while it was recorded."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(outside, "_SLACK", 3600)
            yield

    @pytest.mark.parametrize("loop", LOOPS)
    @pytest.mark.parametrize("code", EACH)
    def test_gets_what_it_got(self, tmp_path, loop, code):
        guest = guest_of(*(ask(code, pause, 0, pause) for pause in (4, 9, 2)))
        path = recorded(tmp_path / "run.mcap", guest, loop=loop)
        for other in ("asyncio", "trio"):
            assert_same(replayed(path, CutOff(), other, outside="refuse"))

    @given(st.integers(0, 2**32), st.sampled_from(LOOPS), st.sampled_from(["asyncio", "trio"]))
    @settings(max_examples=examples(12), deadline=None)
    def test_law_over_random_guests(self, tmp_path_factory, seed, loop, other):
        path = recorded(tmp_path_factory.mktemp("law") / "run.mcap", random_guest(seed), loop=loop)
        assert_same(replayed(path, CutOff(), other, outside="refuse"))

    @pytest.mark.parametrize(
        "how",
        [{}, {"order": "vcpu"}, {"speed": 50.0}, {"loop": "trio"}],
        ids=["default", "vcpu", "paced", "trio"],
    )
    def test_that_is_shared_by_several_vms_sees_their_order(self, tmp_path, how):
        class Shared(Outer):
            shared = True

        class SharedCutOff(CutOff, Shared):
            shared = True

        def of(kind):
            handler = kind()
            return lambda _: Bridge(handler)

        guests = {name: random_guest(seed) for seed, name in enumerate(("one", "two", "three"))}
        path = tmp_path / "run.mcap"
        record(path, guests, of(Shared))
        for result in replay(path, guests, of(SharedCutOff), **how):
            assert_same(result)

    @pytest.mark.parametrize("loop", LOOPS)
    def test_that_was_held_up_then_is_cut_off_when_it_was(self, tmp_path, loop):
        class HeldUp(Outer):
            @method(1)
            async def waits(self, vmi, packet):
                time.sleep(0.7)
                return self.answer()

        class NotHeldUp(CutOff):
            @method(1)
            async def waits(self, vmi, packet):
                return self.answer()

        async def guest(vm):
            async with anyio.create_task_group() as tasks:
                for vcpu, packet in enumerate((ask(7, 11, 0, 1), ask(7, 11), ask(1), ask(2))):
                    tasks.start_soon(partial(vm.call, packet, vcpu=vcpu))

        path = recorded(tmp_path / "run.mcap", guest, HeldUp, loop)
        for other in ("asyncio", "trio"):
            assert_same(replayed(path, NotHeldUp(), other, outside="refuse"))

    @pytest.mark.parametrize("loop", LOOPS)
    def test_whose_value_came_with_its_deadline_is_cut_off_behind_it(self, tmp_path, loop):
        class HeldUp(Outer):
            @method(1)
            async def waits(self, vmi, packet):
                time.sleep(0.2)
                return self.answer()

            @method(5, timeout=0.05)
            async def too_late(self, vmi, packet):
                await vmi.outside("late", lambda: self.fetch(1, 0.06))
                next(self.numbers)
                await anyio.sleep(0.001)
                await anyio.sleep(0.001)
                return self.answer()

        class NotHeldUp(CutOff, HeldUp):
            @method(1)
            async def waits(self, vmi, packet):
                return self.answer()

        async def guest(vm):
            async with anyio.create_task_group() as tasks:
                for vcpu, packet in enumerate((ask(5), ask(1))):
                    tasks.start_soon(partial(vm.call, packet, vcpu=vcpu))
            await vm.call(ask(1))

        path = recorded(tmp_path / "run.mcap", guest, HeldUp, loop)
        for other in ("asyncio", "trio"):
            assert_same(replayed(path, NotHeldUp(), other, outside="refuse"))

    @pytest.mark.parametrize("loop", LOOPS)
    def test_that_gives_no_function_gets_the_same_error(self, tmp_path, loop):
        class Misuses(Outer):
            @method(1)
            async def waits(self, vmi, packet):
                errors = []
                for wrong in (None, self.fetch(1)):
                    try:
                        await vmi.outside("one", wrong)
                    except TypeError as error:
                        errors.append(str(error))
                return self.answer(errors, await vmi.outside("one", lambda: self.fetch(2)))

        class MisusesCutOff(CutOff, Misuses):
            pass

        path = recorded(tmp_path / "run.mcap", guest_of(ask(1, 5), ask(2, 5)), Misuses, loop)
        assert [(each.key, each.number) for each in calls_of(path)] == 2 * [("one", 0)]
        for other in ("asyncio", "trio"):
            assert_same(replayed(path, MisusesCutOff(), other, outside="refuse", strict=True))

    def test_gets_it_in_real_time_too(self, tmp_path):
        path = recorded(tmp_path / "run.mcap", random_guest(5))
        assert_same(replayed(path, CutOff(), "uvloop", virtual=False))

    def test_does_not_wait_an_hour_for_what_took_an_hour(self, tmp_path):
        class Slow(Outer):
            @method(1)
            async def waits(self, vmi, packet):
                return self.answer(await vmi.outside("one", lambda: self.fetch(7, 3600)))

        class SlowCutOff(CutOff, Slow):
            pass

        path = recorded(tmp_path / "run.mcap", guest_of(ask(1)), Slow, virtual=True, timeout=7200)
        began = time.monotonic()
        assert_same(replayed(path, SlowCutOff(), outside="refuse"))
        assert time.monotonic() - began < 300

    def test_that_is_recorded_again_has_the_same_calls(self, tmp_path):
        path = recorded(tmp_path / "run.mcap", guest_of(*(ask(code, 4) for code in EACH)))
        again = tmp_path / "again.mcap"
        assert_same(replayed(path, CutOff(), to=again))
        assert calls_of(again) == calls_of(path) != []
        assert_same(replayed(again, CutOff(), "trio", outside="refuse"))


class OtherKey(CutOff):
    """Asks for something else."""

    async def fetch(self, value, pause=0.0):
        self.fetched += 1
        return value

    @method(1)
    async def waits(self, vmi, packet):
        return self.answer(await vmi.outside("another", lambda: self.fetch(packet.value1)))


class TestAChangedHandler:
    def test_is_called_for_what_is_not_in_the_recording(self, tmp_path):
        path = recorded(tmp_path / "run.mcap", guest_of(ask(1, 5), ask(2, 6), ask(1, 7)))
        handler = OtherKey()
        result = replayed(path, handler)
        assert (result.compared, result.different, result.outside) == (3, 2, {"another": 2})
        assert handler.fetched == 2
        (field,) = result.first.fields
        assert field.expected == "'one': in the recording, and not called"
        assert field.got == "'another': it is not in the recording, and was called"

    def test_that_makes_further_calls_is_the_same_but_in_a_strict_replay(self, tmp_path):
        class More(Outer):
            @method(1)
            async def waits(self, vmi, packet):
                got = await vmi.outside("one", lambda: self.fetch(0))
                await vmi.outside("more", lambda: self.fetch(0))
                return self.answer(got)

        path = recorded(tmp_path / "run.mcap", guest_of(ask(1, 5)))
        result = replayed(path, More())
        assert (result.different, result.outside) == (0, {"more": 1})
        assert replayed(path, More(), strict=True).different == 1

    def test_is_refused_that_where_nothing_is_to_be_called(self, tmp_path):
        path = recorded(tmp_path / "run.mcap", guest_of(ask(2, 6), ask(1, 5)))
        handler = OtherKey()
        result = replayed(path, handler, outside="refuse")
        assert (result.compared, result.different, result.outside) == (2, 1, {})
        assert handler.fetched == 0
        fields = {each.field: each.got for each in result.first.fields}
        assert "another" in fields["outside"]
        assert result.first.fields[0].expected == "'one': in the recording, and not called"
        assert "OutsideRefusedError" in fields["error"]

    def test_that_catches_the_refusal_differs_all_the_same(self, tmp_path):
        class Catches(Outer):
            @method(1)
            async def waits(self, vmi, packet):
                try:
                    await vmi.outside("x", lambda: self.fetch(1))
                except OutsideError:
                    return self.answer(packet.value1)

        path = recorded(tmp_path / "run.mcap", guest_of(ask(1, 5)))
        result = replayed(path, Catches(), outside="refuse")
        assert [each.field for each in result.first.fields] == ["outside"]

    def test_whose_answer_differs_is_shown_what_was_called(self, tmp_path):
        class Other(OtherKey):
            async def fetch(self, value, pause=0.0):
                return value + 1

        path = recorded(tmp_path / "run.mcap", guest_of(ask(1, 5)))
        result = replayed(path, Other())
        assert [each.field for each in result.first.fields] == ["outside", "output"]
        assert "another" in result.first.fields[0].got
        assert "'one': in the recording" in result.first.fields[0].expected

    @pytest.mark.parametrize("loop", ["asyncio", "trio"])
    def test_that_does_not_call_any_more_differs_whatever_it_answers(self, tmp_path, loop):
        class Knows(Outer):
            @method(8)
            async def among_steps(self, vmi, packet):
                return self.answer(1, 2, 3)

        path = recorded(tmp_path / "run.mcap", guest_of(ask(8, 5), ask(1, 2)))
        for strict in (False, True):
            result = replayed(path, Knows(), loop, strict=strict)
            assert (result.compared, result.different, result.first.seq) == (2, 1, 1)
            field = result.first.fields[0]
            assert (field.field, field.got) == ("outside", "no call")
            assert field.expected == "'step' (3 times): in the recording, and not called"

    @pytest.mark.parametrize("loop", ["asyncio", "trio"])
    def test_that_calls_less_often_differs(self, tmp_path, loop):
        class Once(Outer):
            @method(8)
            async def among_steps(self, vmi, packet):
                one = await vmi.outside("step", lambda: self.fetch(1))
                return self.answer(one, 2, 3)

        path = recorded(tmp_path / "run.mcap", guest_of(ask(8, 5)))
        (field,) = replayed(path, Once(), loop).first.fields
        assert field.expected == "'step' (2 times): in the recording, and not called"

    def test_that_leaves_out_what_was_cut_off_then_differs(self, tmp_path):
        class Sleeps(CutOff):
            @method(7)
            async def no_longer_than(self, vmi, packet):
                with anyio.move_on_after(packet.value1 / 1e3) as scope:
                    await anyio.sleep(60)
                return self.answer(scope.cancelled_caught)

        path = recorded(tmp_path / "run.mcap", guest_of(ask(7, 9, 1)))
        assert [each.is_cut_off for each in calls_of(path)] == [True]
        assert [each.field for each in replayed(path, Sleeps()).first.fields] == ["outside"]

    def test_rules_may_leave_that_out(self, tmp_path):
        class Knows(Outer):
            @method(1)
            async def waits(self, vmi, packet):
                return self.answer(packet.value1)

        path = recorded(tmp_path / "run.mcap", guest_of(ask(1, 5)))
        result = replayed(path, Knows(), verdict=Verdict(ignore=[IgnoreRule.parse("outside")]))
        assert (result.different, result.ignored) == (0, 1)

    def test_that_calls_oftener_is_called_for_the_further_calls(self, tmp_path):
        class Twice(Outer):
            @method(1)
            async def waits(self, vmi, packet):
                got = [await vmi.outside("one", lambda: self.fetch(0)) for _ in range(2)]
                return self.answer(got[0])

        path = recorded(tmp_path / "run.mcap", guest_of(ask(1, 5)))
        result = replayed(path, Twice())
        assert (result.different, result.outside) == (0, {"one": 1})

    def test_is_found_at_the_right_trap(self, tmp_path):
        class Doubles(CutOff):
            @method(1)
            async def waits(self, vmi, packet):
                got = await vmi.outside("one", lambda: self.fetch(0))
                return self.answer(got if packet.value1 != 7 else 2 * got)

        path = recorded(tmp_path / "run.mcap", guest_of(*(ask(1, pause) for pause in range(12))))
        result = replayed(path, Doubles())
        assert (result.compared, result.different, result.first.seq) == (12, 1, 8)


class TestTheRecording:
    def test_says_what_came_of_each_call(self, tmp_path):
        path = recorded(tmp_path / "run.mcap", guest_of(ask(2, 6), ask(6, 2), ask(5, 1), ask(3, 2)))
        value, failure, cut_off, *both = calls_of(path)
        assert value == Outside("vm", 1, "one", 0, b"\x06", at_once=True)
        assert (failure.error, failure.types[0]) == ("gone", "ConnectionResetError")
        assert "OSError" in failure.types
        assert cut_off.is_cut_off
        # The one that was called last had it first.
        assert [(each.key, each.number) for each in both] == [("same", 1), ("same", 0)]

    def test_without_a_value_is_not_compared(self, tmp_path):
        path = tmp_path / "run.mcap"

        async def main():
            async with (
                Recorder(path, redact=["outside"]) as recorder,
                FakeGuest(guest_of(ask(1, 3), ask(2, 3))) as vm,
            ):
                async for _ in BridgeServer(vm, Bridge(Outer()), taps=[recorder]).run():
                    pass

        anyio.run(main)
        result = replayed(path, Outer())
        assert result.different == 0
        assert result.unchecked == {"what came from outside was left out of the recording": 2}
        assert replayed(path, CutOff(), outside="refuse").unchecked == result.unchecked

    def test_that_says_anything_is_replayed_to_its_end(self, tmp_path, monkeypatch):
        monkeypatch.setattr("vmibridge.recording.replay.outside._MAX_HELD", 4000)
        path = recorded(tmp_path / "run.mcap", guest_of(ask(1, 3), ask(1, 4)))
        odd = tmp_path / "odd.mcap"
        with RecordingReader(path) as reader, NewRecording(odd) as made:
            for time_, message in reader.messages():
                if isinstance(message, Outside):
                    for each in (
                        *(Outside("vm", seq, "one", 0, b"\x09") for seq in (0, 9, 1 << 63)),
                        *(Outside("vm", message.seq, f"{n}", 0, bytes(90)) for n in range(40)),
                        Outside("vm", message.seq, "k" * 9999),
                        msgspec.structs.replace(message, data=b"\xc1"),
                        message,
                        Outside("vm", message.seq, "two", -1, None, "e", ("t",) * 50),
                    ):
                        made.copy(time_, each)
                else:
                    made.copy(time_, message)
        for loop in ("asyncio", "trio"):
            result = replayed(odd, Outer(), loop)
            assert result.compared + sum(result.unchecked.values()) == 2


class TestAnAcceptedRecording:
    @pytest.mark.parametrize("loop", ["asyncio", "trio"])
    def test_has_new_calls_where_they_came_to_something(self, tmp_path, loop):
        """One is slow, and others count meanwhile; one is cut off."""

        async def guest(vm):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(call, vm, ask(1, 20), 0)
                tasks.start_soon(call, vm, ask(7, 9, 1), 1)
                for _ in range(4):
                    await anyio.sleep(0.004)
                    await call(vm, ask(2), 2)

        path, target = tmp_path / "run.mcap", tmp_path / "new.mcap"
        recorded(path, guest, virtual=True)
        verdict = Verdict()
        verdict.accepted = Accepted()
        assert replayed(path, OtherKeys(Outer()), loop, verdict=verdict).different == 6
        write_accepted(path, target, verdict.accepted)
        assert [each.key for each in calls_of(target)].index("new one") < 5
        assert [each.key for each in calls_of(target) if each.is_cut_off] == ["new timed"]
        for other in ("asyncio", "trio"):
            assert_same(replayed(target, OtherKeys(CutOff()), other, outside="refuse"))

    def test_of_a_handler_that_does_not_call_any_more_has_no_calls(self, tmp_path):
        class Knows(Outer):
            @method(8)
            async def among_steps(self, vmi, packet):
                await anyio.sleep(packet.value1 / 1e3)
                return self.answer(1, 2, 3)

        path = recorded(tmp_path / "run.mcap", guest_of(ask(1, 2), ask(8, 4), ask(2, 1)))
        target = tmp_path / "new.mcap"
        verdict = Verdict()
        verdict.accepted = Accepted()
        assert replayed(path, Knows(), verdict=verdict).different == 1
        write_accepted(path, target, verdict.accepted)
        assert [(each.seq, each.key) for each in calls_of(target)] == [(1, "one"), (3, "one")]
        for loop in ("asyncio", "trio"):
            assert_same(replayed(target, Knows(), loop, outside="refuse", strict=True))

    def test_has_the_calls_of_now(self, tmp_path):
        class Other(Outer):
            @method(8)
            async def among_steps(self, vmi, packet):
                first = await vmi.outside("step", lambda: self.fetch(0))
                return BridgeResponse(5).with_output([first, await vmi.outside("new", self.new)])

            async def new(self):
                await anyio.sleep(0.001)
                return "new"

        class OtherCutOff(CutOff, Other):
            async def new(self):
                raise AssertionError("a replay must not call it")

        path = recorded(tmp_path / "run.mcap", guest_of(ask(1, 2), ask(8, 4)))
        target = tmp_path / "new.mcap"
        verdict = Verdict()
        verdict.accepted = Accepted()
        assert replayed(path, Other(), verdict=verdict).different == 1
        write_accepted(path, target, verdict.accepted)
        assert [(each.key, each.number) for each in calls_of(target)] == [
            ("one", 0),
            ("step", 0),
            ("new", 0),
        ]
        for loop in ("asyncio", "trio"):
            assert_same(replayed(target, OtherCutOff(), loop, outside="refuse"))

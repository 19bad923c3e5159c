"""Recordings played again: what cannot be compared, damaged files, and the replay as a backend."""

import math
from pathlib import Path

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import examples
from replay_parts import IDS, LOOPS, Probe, Shared, ask, everything, record, replay, run

from vmibridge import (
    Bridge,
    BridgeResponse,
    BridgeServer,
    Gate,
    Policy,
    Quota,
    Rate,
    RegisterWrites,
    method,
)
from vmibridge.backends import open_backend
from vmibridge.engine.settings import ServerSettings
from vmibridge.errors import BackendError, BackendSpecError, RecordingReadError
from vmibridge.recording.file.reader import RecordingReader
from vmibridge.recording.messages import TRAP
from vmibridge.recording.recorder import Recorder
from vmibridge.recording.replay.backend import ReplayBackend
from vmibridge.recording.replay.options import ReplayOptions, replay_settings
from vmibridge.testing import FakeGuest


class TestWhatCannotBeCompared:
    def test_a_request_that_the_server_stopped(self, path):
        async def main():
            async def guest(vm):
                await vm.call(ask(1))
                await vm.call(ask(6))

            async with Recorder(path) as recorder, FakeGuest(guest) as backend:
                server = BridgeServer(backend, Bridge(Probe()), taps=[recorder], grace=0)
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(stop_soon, server)
                    async for _ in server.run():
                        pass

        async def stop_soon(server):
            await anyio.sleep(0.1)
            server.stop(now=True)

        run(main)

        class Quick(Probe):
            name = "probe"

            @method(6)
            async def hang(self, vmi, packet):
                return BridgeResponse()

        result = replay(path, Quick())
        assert (result.compared, result.different) == (1, 0)
        assert result.unchecked == {"the server stopped before its answer": 1}

    def test_a_request_of_which_a_value_was_left_out(self, path):
        async def guest(vm):
            await vm.call(ask(1, 41))
            await vm.call(ask(0, 0, request=2))

        record(path, guest, redact=["0x0001:value1"])
        assert (41).to_bytes(8, "little") not in path.read_bytes()
        probe = Probe()
        result = replay(path, probe, Shared())
        assert probe.asked == []
        assert (result.compared, result.different) == (1, 0)
        assert result.unchecked == {"value1 was left out of the recording": 1}

    def test_a_request_of_which_a_value_was_left_out_is_counted_once_with_its_retries(self, path):
        async def guest(vm):
            for _ in range(2):
                while (await vm.call(ask(5, 7))).rax == Gate.WAIT:
                    await anyio.sleep(0.01)

        class Slow(Probe):
            name = "probe"

            @method(5, soft_timeout=0.02)
            async def slow(self, vmi, packet):
                await anyio.sleep(0.1)
                return BridgeResponse(5)

        record(path, guest, bridge=Bridge(Slow()), redact=["0x0001:value2"])
        with RecordingReader(path) as reader:
            assert sum(1 for _ in reader.messages(TRAP)) > 3
        assert replay(path, Slow()).unchecked == {"value2 was left out of the recording": 2}

    def test_a_request_that_reads_memory_that_was_left_out(self, path):
        async def guest(vm):
            await vm.call(ask(2))
            await vm.call(ask(1))

        record(path, guest, redact=["memory"])
        result = replay(path)
        assert (result.compared, result.different) == (1, 0)
        assert result.unchecked == {"memory was left out of the recording": 1}

    def test_a_request_whose_reply_the_file_lacks(self, path):
        async def guest(vm):
            for value in range(2000):
                await vm.call(ask(1, value))

        record(path, guest)
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
        result = replay(path)
        assert 0 < result.compared < 2000
        assert result.different == 0


class TestTheBackend:
    def test_is_named_by_a_spec(self, path):
        record(path, lambda vm: vm.call(ask(1, 5)))

        async def main():
            async with open_backend(f"replay:{path}?speed=0&order=vcpu&strict=true") as backend:
                return [o.output async for o in BridgeServer(backend, Bridge(Probe())).run()]

        assert run(main) == [{"sum": 6}]

    @pytest.mark.parametrize(
        ("spec", "told"),
        [
            ("replay:", "needs the path"),
            ("replay:x?speed=-1", "speed=-1"),
            ("replay:x?speed=fast", "speed=fast is not a number"),
            ("replay:x?order=random", "order"),
            ("replay:x?pace=1", "no option 'pace'"),
        ],
    )
    def test_refuses_a_spec_that_makes_no_sense(self, spec, told):
        with pytest.raises(BackendSpecError, match=told):
            open_backend(spec)

    @pytest.mark.parametrize(
        ("content", "told"),
        [(b"", "is empty"), (b"no recording", "is not an MCAP file"), (None, "No such file")],
    )
    def test_refuses_a_file_that_is_no_recording(self, path, content, told):
        if content is not None:
            path.write_bytes(content)

        async def main():
            async with ReplayBackend(path):
                pass

        with pytest.raises(RecordingReadError, match=told):
            run(main)

    def test_names_the_vms_that_there_are(self, path):
        record(path, lambda vm: vm.call(ask(1)), vm="sandbox")

        async def main():
            async with ReplayBackend(path, ReplayOptions(vm="other")):
                pass

        with pytest.raises(BackendSpecError, match="there are sandbox"):
            run(main)

    @pytest.mark.parametrize("loop", LOOPS, ids=IDS)
    def test_stops_in_the_middle(self, path, loop):
        async def guest(vm):
            for value in range(3000):
                await vm.call(ask(1, value))

        record(path, guest)

        async def main():
            async with ReplayBackend(path) as backend:
                server = BridgeServer(backend, Bridge(Probe()))
                async for outcome in server.run():
                    if outcome.event.seq == 100:
                        break
                server.stop()
            return backend.result.compared

        assert 100 <= run(main, loop) < 3000

    @pytest.mark.parametrize("loop", LOOPS, ids=IDS)
    def test_can_be_cancelled_while_a_handler_hangs(self, path, loop):
        record(path, lambda vm: vm.call(ask(1)))

        class Hangs(Probe):
            async def handle(self, vmi, packet):
                await anyio.sleep_forever()

        async def main():
            with anyio.move_on_after(0.1) as scope:
                async with ReplayBackend(path) as backend:
                    async for _ in BridgeServer(backend, Bridge(Hangs()), timeout=60).run():
                        pass
            return scope.cancelled_caught

        assert run(main, loop)

    def test_takes_each_answer_once(self, path):
        record(path, lambda vm: vm.call(ask(1)))

        async def main():
            async with ReplayBackend(path) as backend:
                async for outcome in BridgeServer(backend, Bridge(Probe())).run():
                    event = outcome.event
                with pytest.raises(BackendError, match="was answered before"):
                    await backend.resume(event, RegisterWrites(0))

        run(main)

    def test_can_be_recorded_again(self, path):
        record(path, everything)
        second = path.with_name("second.mcap")

        async def main():
            async with Recorder(second) as recorder, ReplayBackend(path) as backend:
                server = BridgeServer(backend, Bridge(Probe(), Shared()), taps=[recorder])
                async for _ in server.run():
                    pass

        run(main)
        result = replay(second, strict=True)
        assert (result.compared, result.different, result.unchecked) == (28, 0, {})


def test_quotas_are_lifted_and_still_there():
    policy = Policy(rings=frozenset({3}), vm=Quota(requests=Rate(1, 1)))
    lifted = replay_settings(ServerSettings(policy=policy)).policy
    assert lifted.rings == {3}
    assert lifted.has_quota
    assert lifted.vm.requests.burst > 1e9
    assert lifted.vm.bytes is None
    assert replay_settings(ServerSettings()) == ServerSettings()


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    path = tmp_path_factory.mktemp("replay") / "run.mcap"
    record(path, everything)
    return path.read_bytes()


@settings(max_examples=examples(60))
@given(data=st.data(), order=st.sampled_from(["recorded", "vcpu"]))
def test_a_damaged_recording_ends_its_replay_and_nothing_else(
    recording, tmp_path_factory, data, order
):
    damaged = bytearray(recording)
    for _ in range(data.draw(st.integers(1, 8))):
        at = data.draw(st.integers(8, len(damaged) - 1))
        damaged[at] = data.draw(st.integers(0, 255))
    path = Path(tmp_path_factory.mktemp("damaged")) / "run.mcap"
    path.write_bytes(damaged)

    async def main():
        with anyio.fail_after(30):
            async with ReplayBackend(path, ReplayOptions(order=order)) as backend:
                server = BridgeServer(backend, Bridge(Probe(), Shared()), timeout=1)
                async for _ in server.run():
                    pass
            return backend.result

    try:
        result = run(main)
    except RecordingReadError:
        return
    assert result.compared <= 28
    assert math.isfinite(sum(result.unchecked.values()))

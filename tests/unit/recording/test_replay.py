"""Recordings played again: what is the same, what differs, and what cannot be told.

Everything is recorded on one loop and replayed on each of the others.
"""

import math
from pathlib import Path

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import examples

from vmibridge import (
    Bridge,
    BridgeHandler,
    BridgePacket,
    BridgeResponse,
    BridgeServer,
    Gate,
    GuestMemoryError,
    Policy,
    Quota,
    Rate,
    RegisterWrites,
    method,
)
from vmibridge.backends import open_backend
from vmibridge.engine.settings import ServerSettings
from vmibridge.errors import BackendError, BackendSpecError, RecordingReadError
from vmibridge.recording.recorder import Recorder
from vmibridge.recording.replay.backend import ReplayBackend
from vmibridge.recording.replay.options import ReplayOptions, replay_settings
from vmibridge.testing import FakeGuest

MAGIC = 0x1234_5678
LOOPS = [("asyncio", {}), ("asyncio", {"use_uvloop": True}), ("trio", {})]
IDS = ["asyncio", "uvloop", "trio"]
MEMORY = {0x1000: b"hello\0", 0x2000: bytes(range(64)), 0x3000: bytes(64)}


class Probe(BridgeHandler[object]):
    """What was recorded; the tests change it in one place at a time."""

    MAGIC = MAGIC
    REQUEST = 1
    VERIFY_VALUE4 = 0x5747
    name = "probe"

    def __init__(self, pause=0.0):
        self.pause = pause
        self.asked = []

    @method(1)
    async def add(self, vmi, packet):
        self.asked.append(packet.value1)
        return BridgeResponse(value1=packet.value1 + 1).with_output({"sum": packet.value1 + 1})

    @method(2)
    async def copy(self, vmi, packet):
        text = await vmi.memory.read_string(0x1000)
        data = await vmi.memory.read(0x2000, 8)
        await vmi.memory.write(0x3000, data)
        await vmi.memory.write(0x3008, text.encode())
        return BridgeResponse(value1=sum(data)).with_output(text)

    @method(3)
    async def fail(self, vmi, packet):
        raise RuntimeError("as it was told to")

    @method(4)
    async def unmapped(self, vmi, packet):
        try:
            await vmi.memory.read(0x9000, 8)
        except GuestMemoryError as error:
            return BridgeResponse(value1=error.address)
        return None

    @method(5, soft_timeout=0.02)
    async def slow(self, vmi, packet):
        self.asked.append(packet.value1)
        await anyio.sleep(self.pause)
        data = await vmi.memory.read(0x2000, 4)
        return BridgeResponse(value1=int.from_bytes(data, "little"))

    @method(6)
    async def hang(self, vmi, packet):
        await anyio.sleep_forever()


class Shared(BridgeHandler[int]):
    """Its answers depend on the order of all that it was asked."""

    MAGIC = MAGIC
    REQUEST = 2
    name = "shared"

    def __init__(self):
        self.count = 0

    async def handle(self, vmi, packet):
        self.count += 1
        number = self.count
        if packet.value1:
            await anyio.sleep(packet.value1 / 1000)
        return BridgeResponse(value1=number)


def ask(code, value1=0, request=1, magic=MAGIC, **more):
    return BridgePacket(magic, request, code, value1, **more)


async def poll(vm, packet, **how):
    while (answer := await vm.call(packet, **how)).rax == Gate.WAIT:
        await anyio.sleep(0.005)
    return answer


def run(main, loop=LOOPS[0]):
    return anyio.run(main, backend=loop[0], backend_options=loop[1])


def record(path, guest, bridge=None, loop=LOOPS[0], vm="vm", redact=(), **server_options):
    """Run a guest, recorded; returns what it got."""

    async def main():
        got = []

        async def run_guest(vm):
            got.append(await guest(vm))

        async with (
            Recorder(path, redact=redact) as recorder,
            FakeGuest(run_guest, memory=MEMORY, vm=vm) as backend,
        ):
            server = BridgeServer(
                backend, bridge or Bridge(Probe(), Shared()), taps=[recorder], **server_options
            )
            async for _ in server.run():
                pass
        return got[0] if got else None

    return run(main, loop)


def replay(path, *handlers, loop=LOOPS[0], vm="vm", differences=None, **options):
    """Replay it; returns the result."""

    async def main():
        notes = [] if differences is None else differences
        backend = ReplayBackend(path, ReplayOptions(**options), vm, notes.append)
        async with backend:
            assert backend.session is not None
            given = replay_settings(backend.session.settings)
            server = BridgeServer(
                backend,
                Bridge(*(handlers or (Probe(), Shared()))),
                timeout=given.timeout,
                wait=given.wait,
                fallback=given.fallback,
                policy=given.policy,
            )
            async for _ in server.run():
                pass
        return backend.result

    return run(main, loop)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.mcap"


async def everything(vm):
    for value in range(3):
        await vm.call(ask(1, value))
    await vm.call(ask(2))
    await vm.call(ask(3))
    await vm.call(ask(4))
    await vm.call(ask(9))
    await vm.call(ask(1, request=0x77))
    async with anyio.create_task_group() as tasks:
        for vcpu in range(4):
            tasks.start_soon(_order_matters, vm, vcpu)


async def _order_matters(vm, vcpu):
    for round_ in range(5):
        await vm.call(ask(0, (vcpu * 7 + round_ * 3) % 5, request=2), vcpu=vcpu)


class TestTheSameHandlers:
    @pytest.mark.parametrize("then", LOOPS, ids=IDS)
    @pytest.mark.parametrize("now", LOOPS, ids=IDS)
    @pytest.mark.parametrize("strict", [False, True], ids=["relaxed", "strict"])
    def test_answer_as_they_did_on_any_loop(self, path, then, now, strict):
        record(path, everything, loop=then)
        result = replay(path, loop=now, strict=strict)
        assert result.first is None
        assert (result.compared, result.different, result.unchecked) == (28, 0, {})

    @pytest.mark.parametrize("loop", LOOPS, ids=IDS)
    def test_are_asked_in_the_order_of_each_vcpu_at_least(self, path, loop):
        async def guest(vm):
            async with anyio.create_task_group() as tasks:
                for vcpu in range(4):
                    tasks.start_soon(ask_all, vm, vcpu)

        async def ask_all(vm, vcpu):
            for number in range(20):
                await vm.call(ask(1, vcpu << 16 | number), vcpu=vcpu)

        record(path, guest)
        probe = Probe()
        result = replay(path, probe, loop=loop, order="vcpu")
        assert (result.compared, result.different) == (80, 0)
        for vcpu in range(4):
            mine = [value & 0xFFFF for value in probe.asked if value >> 16 == vcpu]
            assert mine == list(range(20))

    @pytest.mark.parametrize("then", LOOPS, ids=IDS)
    @pytest.mark.parametrize("now", LOOPS, ids=IDS)
    @pytest.mark.parametrize("pause", [0.0, 0.1], ids=["at-once", "as-slow-as-then"])
    def test_may_be_faster_or_slower_than_then(self, path, then, now, pause):
        async def guest(vm):
            async with anyio.create_task_group() as tasks:
                for vcpu in range(3):
                    tasks.start_soon(poll_one, vm, vcpu)

        async def poll_one(vm, vcpu):
            for number in range(2):
                answer = await poll(vm, ask(5, vcpu << 8 | number), vcpu=vcpu)
                assert answer.rax == 0x03020100

        record(path, guest, Bridge(Probe(pause=0.1)), loop=then)
        probe = Probe(pause=pause)
        result = replay(path, probe, loop=now)
        assert result.first is None
        assert (result.compared, result.different, result.unchecked) == (6, 0, {})
        assert sorted(probe.asked) == [0, 1, 0x100, 0x101, 0x200, 0x201], "each was run once"

    def test_may_be_slower_than_all_retries_of_then(self, path):
        record(path, lambda vm: poll(vm, ask(5)), Bridge(Probe(pause=0.03)))
        result = replay(path, Probe(pause=0.3))
        assert (result.compared, result.different, result.unchecked) == (1, 0, {})

    def test_are_asked_by_each_vm_what_that_vm_asked(self, path):
        async def main():
            async def guest(vm):
                for value in range(5):
                    await vm.call(ask(1, value + (100 if vm.vm == "b" else 0)))

            async with (
                Recorder(path) as recorder,
                FakeGuest(guest, vm="a") as first,
                FakeGuest(guest, vm="b") as second,
            ):
                server = BridgeServer([first, second], lambda vm: Bridge(Probe()), taps=[recorder])
                async for _ in server.run():
                    pass

        run(main)
        for name, values in (("a", [0, 1, 2, 3, 4]), ("b", [100, 101, 102, 103, 104])):
            probe = Probe()

            async def main(name=name, probe=probe):
                backend = ReplayBackend(path, ReplayOptions(vm=name), "box")
                async with backend:
                    async for outcome in BridgeServer(backend, Bridge(probe)).run():
                        assert outcome.event.vm == "box"
                return backend.result

            assert run(main).compared == 5
            assert probe.asked == values

    def test_get_their_traps_at_the_pace_of_then(self, path):
        async def guest(vm):
            await vm.call(ask(1, 1))
            await anyio.sleep(0.2)
            await vm.call(ask(1, 2))

        record(path, guest)

        async def main():
            async with ReplayBackend(path, ReplayOptions(speed=2.0)) as backend:
                before = anyio.current_time()
                async for _ in BridgeServer(backend, Bridge(Probe())).run():
                    pass
                return anyio.current_time() - before

        assert run(main) >= 0.1

    def test_under_quotas_get_what_was_let_through(self, path):
        policy = Policy(vm=Quota(requests=Rate(3, 0)))

        async def guest(vm):
            return [await vm.call(ask(1, value)) for value in range(5)]

        got = record(path, guest, policy=policy)
        assert got[3:] == [None, None]
        probe = Probe()
        result = replay(path, probe)
        assert probe.asked == [0, 1, 2]
        assert (result.compared, result.different) == (3, 0)
        assert result.unchecked == {"the policy denied it": 2}


class TestAChangedHandler:
    """Each change is found at its trap, and only there."""

    def differ(self, path, guest, changed, *, strict=False):
        record(path, guest)
        differences = []
        result = replay(path, changed, Shared(), differences=differences, strict=strict)
        assert result.different == len(differences)
        assert result.first == (differences[0] if differences else None)
        return differences

    def test_of_its_answer(self, path):
        class Changed(Probe):
            name = "probe"

            @method(1)
            async def add(self, vmi, packet):
                extra = packet.value1 == 7
                return BridgeResponse(value1=packet.value1 + 1 + extra).with_output(
                    {"sum": packet.value1 + 1}
                )

        async def guest(vm):
            for value in range(20):
                await vm.call(ask(1, value))

        (found,) = self.differ(path, guest, Changed())
        assert (found.seq, found.packet) == (8, ask(1, 7))
        assert [(each.field, each.expected, each.got) for each in found.fields] == [
            ("value1", "0x8", "0x9")
        ]

    @pytest.mark.parametrize(
        ("code", "change", "fields"),
        [
            pytest.param(
                1,
                lambda: BridgeResponse(value1=1).with_output({"sum": 2}),
                {"output": ('{"sum":1}', '{"sum":2}')},
                id="output",
            ),
            pytest.param(1, lambda: None, {"outcome": ("handled", "rejected")}, id="rejects"),
            pytest.param(
                1,
                lambda: 1 / 0,
                {
                    "outcome": ("handled", "failed"),
                    "error": ("none", "ZeroDivisionError: division by zero"),
                },
                id="raises",
            ),
            pytest.param(
                3,
                BridgeResponse,
                {
                    "outcome": ("failed", "handled"),
                    "value4": ("left alone", "0x5747"),
                    "error": ("RuntimeError: as it was told to", "none"),
                },
                id="raises-no-more",
            ),
        ],
    )
    def test_of_what_becomes_of_a_request(self, path, code, change, fields):
        class Changed(Probe):
            name = "probe"

            async def handle(self, vmi, packet):
                return change()

        (found,) = self.differ(path, lambda vm: vm.call(ask(code)), Changed())
        told = {each.field: (each.expected, each.got) for each in found.fields}
        assert fields.items() <= told.items()

    @pytest.mark.parametrize(
        ("accesses", "relaxed", "strict"),
        [
            pytest.param("text read write note", [], [], id="the-same"),
            pytest.param("read text write note", [], ["read"], id="another-order"),
            pytest.param("text read read write note", [], ["read"], id="a-read-twice"),
            pytest.param("text half half2 write note", [], ["read"] * 3, id="in-two-parts"),
            pytest.param("text write8 note", [], ["read"], id="a-read-less"),
            pytest.param("text read far write note", ["read"], ["read"], id="unknown-memory"),
            pytest.param("text read write", ["write"], ["write"], id="a-write-less"),
            pytest.param("text read other note", ["write"] * 2, ["write"] * 2, id="other-bytes"),
            pytest.param("text read back write note", ["read"], ["read"], id="not-written-yet"),
            pytest.param("text read write note back", [], ["read"], id="what-it-wrote"),
        ],
    )
    def test_of_its_memory_accesses(self, path, accesses, relaxed, strict):
        class Changed(Probe):
            name = "probe"

            @method(2)
            async def copy(self, vmi, packet):
                memory, got = vmi.memory, {}

                async def read(name, address, size):
                    try:
                        got[name] = await memory.read(address, size)
                    except GuestMemoryError:
                        got[name] = b""

                for what in accesses.split():
                    match what:
                        case "text":
                            assert await memory.read_string(0x1000) == "hello"
                        case "read":
                            await read(what, 0x2000, 8)
                        case "half":
                            await read(what, 0x2000, 4)
                        case "half2":
                            await read(what, 0x2004, 4)
                            assert got[what] == bytes([4, 5, 6, 7])
                        case "far":
                            await read(what, 0x2000, 9)
                        case "back":
                            await read(what, 0x3000, 4)
                            assert got[what] in (b"", bytes([0, 1, 2, 3]))
                        case "write" | "write8":
                            await memory.write(0x3000, bytes(range(8)))
                        case "other":
                            await memory.write(0x3000, bytes(range(1, 9)))
                        case "note":
                            await memory.write(0x3008, b"hello")
                return BridgeResponse(value1=28).with_output("hello")

        for is_strict, expected in ((False, relaxed), (True, strict)):
            where = path.with_suffix(f".{is_strict}")
            found = self.differ(where, lambda vm: vm.call(ask(2)), Changed(), strict=is_strict)
            fields = [each.field for one in found for each in one.fields]
            assert fields == expected, [one.fields for one in found]

    def test_shows_the_accesses_that_led_to_it(self, path):
        class Changed(Probe):
            name = "probe"

            @method(2)
            async def copy(self, vmi, packet):
                await vmi.memory.read_string(0x1000)
                return BridgeResponse(value1=(await vmi.memory.read(0x2000, 8))[0])

        (found,) = self.differ(path, lambda vm: vm.call(ask(2)), Changed())
        assert [(each.address, each.write) for each in found.accesses][-1] == (0x2000, False)
        assert found.accesses[-1].data == bytes(range(8))
        assert [each.field for each in found.fields] == ["value1", "output", "write", "write"]

    def test_that_is_not_there_leaves_its_requests_unanswered(self, path):
        record(path, lambda vm: vm.call(ask(1)))
        result = replay(path, Shared())
        assert result.different == 1
        assert next(each.field for each in result.first.fields) == "outcome"

    def test_for_another_magic_lets_them_run_natively(self, path):
        class Other(Probe):
            name = "probe"

            MAGIC = 0x4444

        record(path, lambda vm: vm.call(ask(1)))
        result = replay(path, Other())
        assert [each.got for each in result.first.fields] == ["not ours: it ran natively"]


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
            ("replay:x?speed=fast", "float"),
            ("replay:x?order=random", "order"),
            ("replay:x?pace=1", "no option 'pace'"),
        ],
    )
    def test_refuses_a_spec_that_makes_no_sense(self, spec, told):
        with pytest.raises(BackendSpecError, match=told):
            open_backend(spec)

    @pytest.mark.parametrize(
        ("content", "told"),
        [(b"", "is empty"), (b"no recording", "no MCAP file"), (None, "No such file")],
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

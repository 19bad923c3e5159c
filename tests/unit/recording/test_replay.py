"""Recordings played again: what is the same, and what a changed handler makes of it."""

import anyio
import pytest
from replay_parts import IDS, LOOPS, Probe, Shared, ask, everything, record, replay, run

from vmibridge import (
    Bridge,
    BridgeResponse,
    BridgeServer,
    Gate,
    GuestMemoryError,
    Policy,
    Quota,
    Rate,
    method,
)
from vmibridge.recording.recorder import Recorder
from vmibridge.recording.replay.backend import ReplayBackend
from vmibridge.recording.replay.options import ReplayOptions
from vmibridge.testing import FakeGuest


async def poll(vm, packet, **how):
    while (answer := await vm.call(packet, **how)).rax == Gate.WAIT:
        await anyio.sleep(0.005)
    return answer


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
            pytest.param("text half half2 write note", [], ["read"] * 2, id="in-two-parts"),
            pytest.param("text write8 note", [], ["read"], id="a-read-less"),
            pytest.param("text read far write note", ["read"], ["read"], id="unknown-memory"),
            pytest.param("text read write", ["write"], ["write"], id="a-write-less"),
            pytest.param("text read other note", ["write"], ["write"], id="other-bytes"),
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

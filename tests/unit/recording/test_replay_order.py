"""Handlers that wait and have state: unchanged, they replay the same, on virtual time."""

import time
from functools import partial

import anyio
import pytest
from determinism_parts import (
    MAGIC,
    Counts,
    Pool,
    Serial,
    Shared,
    ask,
    assert_same,
    call,
    record,
)

from vmibridge import Bridge, BridgeHandler, BridgeResponse, method
from vmibridge.aio.clock import virtual_time
from vmibridge.recording.file.reader import RecordingReader
from vmibridge.recording.messages import STEP, TRAP, Step
from vmibridge.recording.replay.walk import Walk
from vmibridge.testing import FakeGuest

HOWS = [
    pytest.param({}, id="default"),
    pytest.param({"order": "vcpu"}, id="vcpu"),
    pytest.param({"speed": 50.0}, id="paced"),
    pytest.param({"virtual": False}, id="real-time"),
    pytest.param({"loop": "trio"}, id="trio"),
]


async def one_that_ends_before_its_retry(vm):
    first = ask(4, 12)
    while (await vm.call(first)).rax == 1:
        await anyio.sleep(0.03)
        await vm.call(ask(1))


async def two_vcpus(vm):
    async def cpu(vcpu, pause):
        for _ in range(4):
            await vm.call(ask(2, pause), vcpu=vcpu)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(cpu, 0, 3)
        tasks.start_soon(cpu, 1, 5)


async def four_in_line(vm):
    async def cpu(vcpu):
        for number in range(2):
            await call(vm, ask(1, 8, vcpu, number, request=2), vcpu, 0.002 * (vcpu + 1))

    async with anyio.create_task_group() as tasks:
        for vcpu in range(4):
            tasks.start_soon(cpu, vcpu)


async def six_for_three(vm):
    async def cpu(vcpu):
        for number in range(5):
            pause = (vcpu * 31 + number * 17) % 5
            await vm.call(ask(1, pause, request=3), vcpu=vcpu)

    async with anyio.create_task_group() as tasks:
        for vcpu in range(6):
            tasks.start_soon(cpu, vcpu)


CASES = [
    pytest.param(one_that_ends_before_its_retry, Counts, id="wait"),
    pytest.param(two_vcpus, Counts, id="vcpus"),
    pytest.param(four_in_line, Serial, id="serial"),
    pytest.param(six_for_three, Pool, id="pool"),
]


@pytest.mark.parametrize(("guest", "handler"), CASES)
def test_an_unchanged_handler_replays_the_same(tmp_path, guest, handler):
    path = tmp_path / "run.mcap"
    record(path, {"vm": guest}, lambda _: Bridge(handler()))
    for how in HOWS:
        assert assert_same(path, ["vm"], lambda _: Bridge(handler()), **how.values[0])


@pytest.mark.parametrize("how", HOWS)
def test_a_shared_handler_gets_what_all_vms_asked_in_their_order(tmp_path, how):
    async def guest(vm):
        for _ in range(4):
            await vm.call(ask(1, request=4))
            await anyio.sleep(0.002 if vm.vm == "a" else 0.003)

    def make():
        shared = Shared()
        return lambda _: Bridge(shared)

    path = tmp_path / "run.mcap"
    record(path, {"a": guest, "b": guest}, make())
    assert assert_same(path, ["a", "b"], make(), **how) == 8


@pytest.mark.parametrize("loop", ["asyncio", "trio"])
def test_an_hour_takes_no_time(tmp_path, loop):
    class Sleeps(BridgeHandler[float]):
        MAGIC, REQUEST = MAGIC, 1

        async def handle(self, vmi, packet):
            before = anyio.current_time()
            await anyio.sleep(packet.value1)
            return BridgeResponse().with_output(round(anyio.current_time() - before))

    async def guest(vm):
        await vm.call(ask(1, 3600))
        await anyio.sleep(1800)
        await vm.call(ask(1, 5))

    path = tmp_path / "run.mcap"
    record(path, {"vm": guest}, lambda _: Bridge(Sleeps()), loop, virtual=True, timeout=7200)
    # It would take an hour.
    assert assert_same(path, ["vm"], lambda _: Bridge(Sleeps()), loop=loop) == 2


def test_it_waits_without_spinning(tmp_path, monkeypatch):
    rounds = []
    plays = Walk._round

    async def counted(walk, player):
        rounds.append(player)
        await plays(walk, player)

    monkeypatch.setattr(Walk, "_round", counted)

    async def guest(vm):
        for _ in range(3):
            await vm.call(ask(1))
            await anyio.sleep(20)

    path = tmp_path / "run.mcap"
    record(path, {"vm": guest}, lambda _: Bridge(Counts()), virtual=True)
    for virtual in (True, False):
        before = time.monotonic()
        how = {"virtual": virtual, "speed": 200.0}
        assert assert_same(path, ["vm"], lambda _: Bridge(Counts()), **how) == 3
        assert time.monotonic() - before >= 0.2
    assert len(rounds) < 100


@pytest.mark.parametrize("loop", ["asyncio", "trio"])
def test_reads_of_tasks_beside_a_handler_hide_no_step_of_it(tmp_path, monkeypatch, loop):
    read_at_once = FakeGuest.read_physical

    async def read_later(vm, *arguments):
        await anyio.sleep(0.05)
        return await read_at_once(vm, *arguments)

    class ReadsBeside(BridgeHandler[object]):
        MAGIC, REQUEST = MAGIC, 1

        async def handle(self, vmi, packet):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(vmi.memory.read, 0x1000, 4)
                for _ in range(3):
                    await anyio.sleep(0.001)
            await vmi.memory.read(0x1000, 4)

    async def guest(vm):
        await vm.call(ask(1))

    monkeypatch.setattr(FakeGuest, "read_physical", read_later)
    path = tmp_path / "run.mcap"
    record(path, {"vm": guest}, lambda _: Bridge(ReadsBeside()), loop, virtual=True)
    with RecordingReader(path) as reader:
        steps = [message.kind for _, message in reader.messages(STEP)]
    assert steps == ["resumed"] * 4 + ["ended"], "three sleeps, and the end of the task"


class ReadsSlowly(BridgeHandler[object]):
    """Is told to wait between its reads. `held_up`: whether another one holds up the loop."""

    MAGIC, REQUEST = MAGIC, 1

    def __init__(self, held_up):
        self.held_up = held_up

    @method(1, soft_timeout=0.002)
    async def in_pauses(self, vmi, packet):
        got = 0
        for number in range(6):
            await anyio.sleep(0.001)
            got += (await vmi.memory.read(0x1000 + packet.value1 + number, 1))[0]
        return BridgeResponse(value1=0x100 + got)

    @method(2)
    async def holds_up(self, vmi, packet):
        for _ in range(2):
            await anyio.sleep(0.0005)
            if self.held_up:
                virtual_time().pass_by(1.5)
        return BridgeResponse(value1=0x100)


@pytest.mark.parametrize("order", ["recorded", "vcpu"])
@pytest.mark.parametrize(("then", "now"), [(True, False), (False, True)])
def test_deadlines_pass_as_they_did_where_a_loop_stood_still(tmp_path, then, now, order):
    async def guest(vm):
        async with anyio.create_task_group() as tasks:
            for vcpu, code in enumerate([1, 2, 1]):
                tasks.start_soon(call, vm, ask(code, vcpu), vcpu, 0.001)

    path = tmp_path / "run.mcap"
    record(path, {"vm": guest}, lambda _: Bridge(ReadsSlowly(then)), virtual=True)
    for loop in ("asyncio", "trio"):
        how = {"loop": loop, "order": order}
        assert assert_same(path, ["vm"], lambda _: Bridge(ReadsSlowly(now)), **how) == 3
        if not now:
            how["virtual"] = False
            assert assert_same(path, ["vm"], lambda _: Bridge(ReadsSlowly(now)), **how) == 3


@pytest.mark.parametrize("now", ["asyncio", "trio"])
def test_handlers_get_the_time_and_the_random_numbers_of_then(tmp_path, now):
    async def guest(vm):
        return [await vm.call(ask(7, 2)) for _ in range(3)]

    path = tmp_path / "run.mcap"
    record(path, {"vm": guest}, lambda _: Bridge(Counts()))
    with RecordingReader(path) as reader:
        traps = [time for time, _ in reader.messages(TRAP)]
    given = []

    class Kept(Counts):
        name = "counts"

        def answer(self, *more):
            given.append(more)
            return super().answer(*more)

    assert assert_same(path, ["vm"], lambda _: Bridge(Kept()), loop=now) == 3
    # The server's clock and the recorder's are set a moment apart.
    assert all(abs(when - trap) < 1e9 for (when, *_), trap in zip(given, traps, strict=True))
    assert len({number for _, number, _ in given}) == 3


def test_when_a_handler_went_on_and_ended_is_recorded(tmp_path):
    async def guest(vm):
        await vm.call(ask(1))
        await vm.call(ask(2, 1))
        await call(vm, ask(4, 12))

    path = tmp_path / "run.mcap"
    record(path, {"vm": guest}, lambda _: Bridge(Counts()))
    with RecordingReader(path) as reader:
        steps = [message for _, message in reader.messages(STEP)]
    assert Step("vm", 2, "resumed") in steps
    assert Step("vm", 2, "ended") in steps
    assert [each.kind for each in steps if each.seq == 3] == ["parked", "resumed", "ended"]
    assert all(each.seq != 1 for each in steps), "it never waited"


@pytest.mark.parametrize("loop", ["asyncio", "uvloop", "trio"])
def test_that_a_handler_went_on_as_it_was_cut_off_is_recorded(tmp_path, loop):
    async def guest(vm):
        await vm.call(ask(5, 2))
        await vm.call(ask(5, 1))

    path = tmp_path / "run.mcap"
    record(path, {"vm": guest}, lambda _: Bridge(Counts()), loop, virtual=loop != "uvloop")
    with RecordingReader(path) as reader:
        steps = [message for _, message in reader.messages(STEP)]
    assert [each.kind for each in steps if each.seq == 1] == ["resumed", "ended"]
    assert [each.kind for each in steps if each.seq == 2] == ["cut off", "thrown", "ended"]


class HoldsUpTheLoop(Counts):
    """What came first then does so by real time, too, where it is waited for."""

    name = "counts"

    def __init__(self, seconds, other):
        super().__init__()
        self.seconds, self.other = seconds, other

    @method(1)
    async def at_once(self, vmi, packet):
        await anyio.sleep(0.05)
        time.sleep(self.seconds)
        await anyio.sleep(0.05)
        return self.answer()

    @method(2)
    async def later(self, vmi, packet):
        await anyio.sleep(self.other)
        return self.answer()


@pytest.mark.parametrize("loop", ["asyncio", "uvloop", "trio"])
def test_a_process_that_stands_still_lets_nobody_overtake(tmp_path, loop):
    async def guest(vm):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(vm.call, ask(1))
            tasks.start_soon(partial(vm.call, ask(2), vcpu=1))

    path = tmp_path / "run.mcap"
    record(path, {"vm": guest}, lambda _: Bridge(HoldsUpTheLoop(0, 0.2)), virtual=True)
    # The second one is held, and nobody is patient for longer than half a second.
    early = HoldsUpTheLoop(0.7, 0.01)
    assert assert_same(path, ["vm"], lambda _: Bridge(early), loop=loop, virtual=False) == 2

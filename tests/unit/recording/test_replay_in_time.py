"""A handler that was cut off then, and is changed so that it answers in time now: it is found."""

import math
from functools import partial

import anyio
import pytest
from determinism_parts import MAGIC, Counts, ask, assert_same, call, record, replay

from vmibridge import Bridge, BridgeHandler, BridgeResponse, OutcomeKind, method
from vmibridge.aio.clock import virtual_time
from vmibridge.recording.file.reader import RecordingReader
from vmibridge.recording.messages import REPLY
from vmibridge.recording.replay import delivery

LOOPS = ["asyncio", "trio"]
TIMEOUT = 0.2


async def sleep(handler, vmi, seconds):
    await anyio.sleep(seconds)


async def take_the_lock(handler, vmi, seconds):
    async with handler.lock:
        await anyio.sleep(seconds)


async def acquire_the_lock(handler, vmi, seconds):
    await handler.lock.acquire()
    try:
        await anyio.sleep(seconds)
    finally:
        handler.lock.release()


async def ask_outside(handler, vmi, seconds):
    await vmi.outside("key", lambda: anyio.sleep(seconds))


class Awaits(BridgeHandler[object]):
    MAGIC, REQUEST = MAGIC, 1

    def __init__(self, what, seconds):
        self.what, self.seconds = what, seconds

    async def __aenter__(self):
        self.lock = anyio.Lock()
        return self

    async def __aexit__(self, *_):
        return None

    @method(1, timeout=TIMEOUT)
    async def ask(self, vmi, packet):
        await self.what(self, vmi, self.seconds)
        return BridgeResponse(value1=7)


class HasLonger(Awaits):
    @method(1, timeout=5)
    async def ask(self, vmi, packet):
        await self.what(self, vmi, self.seconds)
        return BridgeResponse(value1=7)


async def guest(vm):
    for number in range(2):
        await vm.call(ask(1, number))


@pytest.fixture(params=LOOPS)
def path(request, tmp_path):
    file = tmp_path / "run.mcap"
    first = {"vm": guest}
    record(file, first, lambda _: Bridge(Awaits(sleep, 10)), request.param, virtual=True)
    return file


def differences(path, loop, handler, prefix=""):
    (result,) = replay(path, ["vm"], lambda _: Bridge(handler), loop, prefix=prefix)
    assert result.compared == 2
    fields = () if result.first is None else result.first.fields
    return result.different, [each.got for each in fields if each.field == "outcome"]


@pytest.mark.parametrize("loop", LOOPS)
class TestACutOffHandler:
    @pytest.mark.parametrize("seconds", [0, 0.01, 0.1])
    @pytest.mark.parametrize("what", [sleep, take_the_lock, acquire_the_lock, ask_outside])
    def test_that_answers_in_time_now_is_found(self, path, loop, what, seconds):
        assert differences(path, loop, Awaits(what, seconds)) == (2, ["handled"])

    @pytest.mark.parametrize("seconds", [0.3, 0.9, 10])
    @pytest.mark.parametrize("what", [sleep, take_the_lock, acquire_the_lock, ask_outside])
    def test_that_is_too_late_now_is_the_same(self, path, loop, what, seconds):
        assert differences(path, loop, Awaits(what, seconds)) == (0, [])

    def test_that_answers_in_time_now_is_found_by_another_name_of_its_vm(self, path, loop):
        assert differences(path, loop, Awaits(sleep, 0.01), "renamed-") == (2, ["handled"])

    def test_that_has_longer_now_is_found(self, path, loop):
        assert differences(path, loop, HasLonger(sleep, 1)) == (2, ["handled"])
        assert differences(path, loop, HasLonger(sleep, 10)) == (2, [])


class StandsStill(BridgeHandler[object]):
    """Where one call holds up the loop, another one is cut off that had waited long enough."""

    MAGIC, REQUEST = MAGIC, 1
    pause, stands = 0.035, 0.032

    @method(1, timeout=0.03)
    async def sleeps(self, vmi, packet):
        await anyio.sleep(self.pause)
        return BridgeResponse(value1=7)

    @method(2)
    async def holds_up(self, vmi, packet):
        await anyio.sleep(0.001)
        virtual_time().pass_by(self.stands)
        return BridgeResponse(value1=7)


@pytest.mark.parametrize("loop", LOOPS)
def test_one_that_is_not_changed_is_cut_off_where_the_loop_stood_still_until_then(
    tmp_path, loop, monkeypatch
):
    async def guest(vm):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(vm.call, ask(1))
            tasks.start_soon(partial(vm.call, ask(2), vcpu=1))

    path = tmp_path / "run.mcap"
    record(path, {"vm": guest}, lambda _: Bridge(StandsStill()), loop, virtual=True)
    with RecordingReader(path) as reader:
        kinds = {reply.packet.method: reply.kind for _, reply in reader.messages(REPLY)}
    assert kinds == {1: OutcomeKind.TIMEOUT, 2: OutcomeKind.HANDLED}
    # It had waited long enough, which the loop saw only then; it does not stand still again.
    monkeypatch.setattr(StandsStill, "pause", 0.002)
    monkeypatch.setattr(StandsStill, "stands", 0)
    assert assert_same(path, ["vm"], lambda _: Bridge(StandsStill()), loop=loop) == 2


class Queues(BridgeHandler[object]):
    """With `serial` its requests are answered WAIT before their turn, and asked for once more."""

    MAGIC, REQUEST = MAGIC, 1

    @method(1, soft_timeout=0.01, timeout=2)
    async def sleeps(self, vmi, packet):
        for _ in range(8):
            await anyio.sleep(0.013)
        return BridgeResponse(value1=7)


class IsSerial(Queues):
    serial = True


@pytest.mark.parametrize("loop", LOOPS)
def test_one_that_is_serial_now_ends(tmp_path, loop):
    async def guest(vm):
        async with anyio.create_task_group() as tasks:
            for vcpu in range(3):
                tasks.start_soon(call, vm, ask(1), vcpu)

    path = tmp_path / "run.mcap"
    record(path, {"vm": guest}, lambda _: Bridge(Queues()), loop, virtual=True)
    (result,) = replay(path, ["vm"], lambda _: Bridge(IsSerial()), loop)
    assert result.compared == 3


async def spin(handler, vmi, seconds):
    while True:
        await anyio.sleep(0)


@pytest.mark.parametrize("loop", LOOPS)
def test_one_that_only_lets_the_loop_turn_comes_to_its_deadline(tmp_path, loop):
    path = tmp_path / "run.mcap"
    record(path, {"vm": guest}, lambda _: Bridge(Awaits(sleep, 0)), loop, virtual=True)
    assert differences(path, loop, Awaits(spin, 0)) == (2, ["timeout"])


@pytest.mark.parametrize("prefix", ["", "renamed-"])
@pytest.mark.parametrize("now", LOOPS)
@pytest.mark.parametrize("then", LOOPS)
def test_retries_of_other_vcpus_that_are_told_to_wait_at_once(tmp_path, then, now, prefix):
    """As one waits with the handler: which needs a trap to read memory."""

    async def guest(vm):
        async with anyio.create_task_group() as tasks:
            for vcpu, pause in enumerate([0, 0.001, 0.03]):
                await anyio.sleep(pause)
                tasks.start_soon(call, vm, ask(13, 20), vcpu, 0.002)

    path = tmp_path / "run.mcap"
    record(path, {"vm": guest}, lambda _: Bridge(Counts()), then, virtual=True)
    how = {"loop": now, "prefix": prefix}
    assert assert_same(path, ["vm"], lambda _: Bridge(Counts()), **how) == 3


class NeverAnswers(Awaits):
    @method(1, soft_timeout=0.01, timeout=math.inf)
    async def ask(self, vmi, packet):
        await anyio.sleep_forever()


@pytest.mark.parametrize("loop", LOOPS)
def test_one_that_is_told_to_wait_for_ever_is_different(tmp_path, monkeypatch, loop):
    monkeypatch.setattr(delivery, "_MAX_ASKED_ON", 50)
    path = tmp_path / "run.mcap"
    record(path, {"vm": guest}, lambda _: Bridge(Awaits(sleep, 0.01)), loop, virtual=True)
    assert differences(path, loop, NeverAnswers(sleep, 0)) == (2, ["waiting"])

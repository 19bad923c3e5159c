"""Handlers that are cut off, by a deadline or as their VM ends: when then, and what others see."""

from functools import partial

import anyio
import pytest
from determinism_parts import MAGIC, Counts, ask, assert_same, record, replay

from vmibridge import Bridge, BridgeHandler, BridgeResponse, Gate, method
from vmibridge.aio.clock import virtual_time
from vmibridge.recording.file.reader import RecordingReader
from vmibridge.recording.messages import STEP


class EndsAtItsDeadline(BridgeHandler[object]):
    """Its sleep has ended when its deadline passes, though it has not gone on yet."""

    MAGIC, REQUEST = MAGIC, 1

    def __init__(self, pause, stands):
        self.pause, self.stands, self.count = pause, stands, 0

    @method(1, timeout=0.03)
    async def sleeps(self, vmi, packet):
        await anyio.sleep(self.pause)
        self.count += 1

    @method(2)
    async def holds_up(self, vmi, packet):
        await anyio.sleep(0.02)
        virtual_time().pass_by(self.stands)
        return BridgeResponse(value1=0x100)

    @method(3)
    async def counts(self, vmi, packet):
        return BridgeResponse(value1=0x100 + self.count)


def test_what_went_on_after_its_deadline_does_so_by_a_clock_that_is_late(tmp_path):
    """uvloop's timers are early where its loop has looked at its clock long ago: what ended there
    before a deadline may end after it by the clock of a replay."""

    async def guest(vm):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(vm.call, ask(1))
            tasks.start_soon(partial(vm.call, ask(2), vcpu=1))
        await anyio.sleep(0.5)
        assert (await vm.call(ask(3))).rax == 0x101

    path = tmp_path / "run.mcap"

    def ends_after(pause):
        return lambda _: Bridge(EndsAtItsDeadline(pause, 0.05))

    record(path, {"vm": guest}, ends_after(0.035), virtual=True)
    with RecordingReader(path) as reader:
        steps = [step.kind for _, step in reader.messages(STEP) if step.seq == 1]
    assert steps[-3:] == ["cut off", "resumed", "ended"]
    assert assert_same(path, ["vm"], ends_after(0.08)) == 3
    # One that does not end any more is not waited for.
    (result,) = replay(path, ["vm"], ends_after(3600))
    assert (result.compared, result.first.packet) == (3, ask(3))


class WaitsForARetry(Counts):
    name = "counts"

    async def __aenter__(self):
        self.event = anyio.Event()
        return self

    async def __aexit__(self, *_):
        return None

    @method(1)
    async def at_once(self, vmi, packet):
        self.event.set()
        return self.answer()

    @method(2)
    async def later(self, vmi, packet):
        with anyio.move_on_after(0.08) as scope:
            await self.event.wait()
        return self.answer(scope.cancelled_caught)

    @method(5, soft_timeout=0.005, timeout=0.05)
    async def too_late(self, vmi, packet):
        await anyio.sleep(0.01)
        return self.answer(await vmi.memory.read(0x1000, 1))


@pytest.mark.parametrize("now", ["asyncio", "trio"])
@pytest.mark.parametrize("then", ["asyncio", "trio"])
def test_one_that_waits_for_a_retry_is_cut_off_in_time(tmp_path, then, now):
    async def guest(vm):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(vm.call, ask(5))
            tasks.start_soon(partial(vm.call, ask(2), vcpu=1))
            await anyio.sleep(0.06)
            await vm.call(ask(1), vcpu=2)

    path = tmp_path / "run.mcap"
    record(path, {"vm": guest}, lambda _: Bridge(WaitsForARetry()), then, virtual=True)
    never = {"the recording ends before its answer"}
    how = {"loop": now, "unchecked": never}
    assert assert_same(path, ["vm"], lambda _: Bridge(WaitsForARetry()), **how) == 2


class SharedLock(BridgeHandler[object]):
    """What waits for its lock adds to its log when it has it."""

    MAGIC, REQUEST, shared = MAGIC, 1, True

    async def __aenter__(self):
        self.lock, self.log = anyio.Lock(), []
        return self

    async def __aexit__(self, *_):
        return None

    @method(1)
    async def work(self, vmi, packet):
        async with self.lock:
            self.log.append("in")
            await anyio.sleep(0.15)
        return BridgeResponse(value1=0x100 + len(self.log))

    @method(2, soft_timeout=0.03)
    async def waits(self, vmi, packet):
        async with self.lock:
            self.log.append("soft")
        return BridgeResponse(value1=0x100 + len(self.log))

    @method(3)
    async def look(self, vmi, packet):
        return BridgeResponse(value1=0x100 + len(self.log))


@pytest.mark.parametrize("now", ["asyncio", "trio"])
@pytest.mark.parametrize("then", ["asyncio", "trio"])
def test_handlers_end_with_a_vm_that_did_not_ask_again(tmp_path, then, now):
    async def stays(vm):
        await vm.call(ask(1))
        await anyio.sleep(0.1)
        assert (await vm.call(ask(3))).rax == 0x101

    async def ends(vm):
        await anyio.sleep(0.02)
        assert (await vm.call(ask(2))).rax == Gate.WAIT

    def make():
        shared = SharedLock()
        return lambda _: Bridge(shared)

    path = tmp_path / "run.mcap"
    record(path, {"stays": stays, "ends": ends}, make(), then, virtual=True)
    how = {"loop": now, "unchecked": {"the recording ends before its answer"}}
    assert assert_same(path, ["stays", "ends"], make(), **how) == 2

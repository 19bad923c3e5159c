"""A law: however requests overlap when a file is full, no part is too large and nothing is lost."""

from collections import Counter
from pathlib import Path

import anyio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import examples
from replay_parts import LOOPS, run

from vmibridge import Bridge, BridgeHandler, BridgePacket, BridgeResponse, BridgeServer, method
from vmibridge.recording import (
    MemoryAccess,
    Recorder,
    RecordingReader,
    ReplayBackend,
    ReplayOptions,
    Reply,
    Session,
)
from vmibridge.recording.rotation import MIN_SIZE
from vmibridge.testing import FakeGuest
from vmibridge.vm.trap import TrapEvent

pytestmark = pytest.mark.no_cover

MAGIC, PAGE = 0x1234, 4096
PAGES = bytes((number * number >> 3) * 97 & 0xFF for number in range(64 * PAGE))
WAIT = 0x77


class Mixed(BridgeHandler[None]):
    """Reads pages, at once, with pauses, or longer than its guest waits."""

    MAGIC, REQUEST = MAGIC, 1
    name = "mixed"

    @method(1)
    async def at_once(self, vmi, packet):
        return await self.read(vmi, packet, 0)

    @method(2)
    async def with_pauses(self, vmi, packet):
        return await self.read(vmi, packet, 0.0005)

    @method(3, soft_timeout=0.002)
    async def slowly(self, vmi, packet):
        await anyio.sleep(0.004)
        return await self.read(vmi, packet, 0.001)

    async def read(self, vmi, packet, pause):
        for number in range(packet.value1):
            await vmi.memory.read(number * PAGE, PAGE)
            if pause:
                await anyio.sleep(pause)
        return BridgeResponse(packet.value1)


requests = st.lists(st.tuples(st.integers(1, 3), st.integers(0, 40)), max_size=12)


ANY = {"vcpus": st.lists(requests, min_size=1, max_size=4), "loop": st.sampled_from(LOOPS)}


@settings(max_examples=examples(60), deadline=None)
@given(**ANY)
def test_parts_have_all_that_happened(vcpus, loop, tmp_path_factory):
    hold(vcpus, loop, tmp_path_factory, replays=False)


@settings(max_examples=examples(60), deadline=None)
@given(**ANY)
def test_parts_are_replayed_without_a_difference(vcpus, loop, tmp_path_factory):
    hold(vcpus, loop, tmp_path_factory, replays=True)


def hold(vcpus, loop, tmp_path_factory, *, replays):
    folder = Path(tmp_path_factory.mktemp("parts"))
    taken, answered = [], []

    async def ask(vm, vcpu, asked):
        for number, (code, pages) in enumerate(asked):
            # Each its own: so a retry is of the request that was told to wait.
            packet = BridgePacket(MAGIC, 1, code, pages, vcpu, number)
            while (await vm.call(packet, vcpu=vcpu)).rax == WAIT:
                await anyio.sleep(0.001)

    async def guest(vm):
        async with anyio.create_task_group() as tasks:
            for vcpu, asked in enumerate(vcpus):
                tasks.start_soon(ask, vm, vcpu, asked)

    async def record():
        async with (
            Recorder(folder, max_size=MIN_SIZE) as recorder,
            FakeGuest(guest, memory={0: PAGES}) as vm,
        ):
            server = BridgeServer(
                vm, Bridge(Mixed()), taps=[recorder], wait=BridgeResponse(WAIT), timeout=60
            )
            async for outcome in server.run():
                answered.append(outcome.event.seq)
            taken.extend(event.seq for event in vm.events)

    async def replay(part):
        async with ReplayBackend(part, ReplayOptions(order="vcpu")) as backend:
            async for _ in BridgeServer(
                backend, Bridge(Mixed()), wait=BridgeResponse(WAIT), timeout=60
            ).run():
                pass
        return backend.result

    run(record, loop)
    parts = sorted(folder.iterdir(), key=lambda path: int(path.stem.split("-")[1]))
    traps, replies, accesses = Counter(), Counter(), 0
    for number, part in enumerate(parts, 1):
        assert part.stat().st_size <= MIN_SIZE
        with RecordingReader(part) as reader:
            messages = [message for _, message in reader.messages()]
            assert (reader.complete, reader.problem_count) == (True, 0)
        assert isinstance(messages[0], Session)
        assert messages[0].part == number
        traps.update(each.seq for each in messages if isinstance(each, TrapEvent))
        replies.update(each.seq for each in messages if isinstance(each, Reply))
        accesses += sum(isinstance(each, MemoryAccess) for each in messages)
    assert sorted(traps) == sorted(taken)
    assert sorted(replies.elements()) == sorted(answered) == sorted(taken), "each reply once"
    assert accesses == sum(pages for asked in vcpus for _, pages in asked)
    if not replays:
        return
    results = [run(lambda part=part: replay(part), loop) for part in parts if taken]
    assert not any(result.different for result in results)
    assert sum(result.compared for result in results) <= sum(map(len, vcpus))

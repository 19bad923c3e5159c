"""A recording that goes on in another file after a time, and how many files are kept."""

import anyio
import pytest
from recorder_parts import Probe, ask, calls, read, serve
from waiting import until

from vmibridge import Bridge, BridgeServer, Registers
from vmibridge.recording import Recorder, Reply
from vmibridge.recording.rotation import Rotation
from vmibridge.testing import FakeGuest
from vmibridge.vm.trap import TrapEvent, TrapReason

HOUR = 3600


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_a_file_is_split_at_its_time_between_requests_and_a_little_later_with_some_open():
    clock = Clock()
    rotation = Rotation(None, HOUR, clock)
    rotation.begun(0)
    event = TrapEvent(1, TrapReason.VMCALL, Registers())
    due = []
    for now in (0, HOUR, HOUR + 1):
        clock.now = now
        due.append(rotation.is_due(1000))
    assert due == [False, False, True]
    rotation.trap(event)
    assert not rotation.is_due(1000)
    clock.now = HOUR * 9 / 8 + 1
    assert rotation.is_due(1000)
    assert not rotation.is_due(0), "nothing is in it"
    rotation.next_part()
    rotation.begun(0)
    assert not rotation.is_due(1000), "the next one has its own time"


@pytest.mark.anyio
async def test_a_guest_that_asks_nothing_has_its_file_finished_in_time(tmp_path):
    clock, go_on = Clock(), anyio.Event()

    async def guest(vm):
        await vm.call(ask(1, 1))
        await go_on.wait()
        await vm.call(ask(1, 2))

    recorder = Recorder(tmp_path, max_age=HOUR, flush_interval=0.01)
    recorder._rotation._clock = clock
    recorder._rotation._began = 0.0
    async with recorder, FakeGuest(guest) as vm, anyio.create_task_group() as tasks:

        async def run():
            async for _ in BridgeServer(vm, Bridge(Probe()), taps=[recorder]).run():
                pass

        tasks.start_soon(run)
        await until(lambda: recorder._files.traps == 1)
        clock.now = HOUR + 1
        await until(lambda: recorder.path.name == "run-2.mcap")
        assert len(read(tmp_path / "run-1.mcap", Reply)) == 1
        go_on.set()
    assert len(read(tmp_path / "run-2.mcap", Reply)) == 1


@pytest.mark.anyio
async def test_so_many_files_are_kept(tmp_path):
    for _ in range(5):
        async with Recorder(tmp_path, max_files=3) as recorder, FakeGuest(calls(3)) as vm:
            await serve(vm, recorder)
    assert sorted(each.name for each in tmp_path.iterdir()) == [
        f"run-{number}.mcap" for number in (3, 4, 5)
    ]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"max_age": 0.5}, "max_age is at least 1 second, got 0.5"),
        ({"max_age": float("nan")}, "max_age is at least 1 second, got nan"),
        ({"max_files": 0}, "max_files is at least 1, got 0"),
    ],
)
def test_bounds_make_sense(tmp_path, options, told):
    with pytest.raises(ValueError, match=told):
        Recorder(tmp_path, **options)


def test_a_number_of_files_is_of_a_folder(tmp_path):
    with pytest.raises(ValueError, match="max_files is for recordings in a folder, and"):
        Recorder(tmp_path / "run.mcap", max_files=3)

"""A guest that calls again and again: its next call is taken without a turn of the loop."""

import anyio
import pytest
from ivshmem_guest import ivshmem_guest
from served_device import Served, beside, called, serving
from vfio_client import message

from vmibridge import open_backend
from vmibridge.aio import lookahead
from vmibridge.backends.device import slots, vfio_user
from vmibridge.backends.device.connection import Connection
from vmibridge.vm.trap import RegisterWrites

pytestmark = pytest.mark.anyio


@pytest.fixture
def looks(monkeypatch):
    """For each reception outside of the loop's callback: whether something had come."""
    seen = []
    take_now = Connection._take_now

    def counted(self):
        seen.append(take_now(self))
        return seen[-1]

    monkeypatch.setattr(Connection, "_take_now", counted)
    # However long this process stood still.
    monkeypatch.setattr(lookahead, "_WITHOUT_TURN", 3600)
    return seen


@pytest.fixture
def looks_once(monkeypatch):
    """A look that finds nothing ends then."""
    monkeypatch.setattr(lookahead, "_MOMENT", 0)


def answer(served, event):
    """Write the answer, which never waits: no turn of the loop is between."""
    body = served.backend.resume(event, RegisterWrites(0, 5)).__await__()
    with pytest.raises(StopIteration):
        next(body)


async def test_is_taken_with_the_answer_before_it(tmp_path, looks, looks_once):
    async with serving(tmp_path) as served:
        with await served.connect() as client:
            client.ring(3)
            event = await called(served)
            client.ring(4, message_number=101)
            answer(served, event)
            assert [each.vcpu for each in served.sink.events] == [3, 4]
            assert looks == [True]
            answer(served, served.sink.events[1])
            assert looks == [True, False]
            assert [(await beside(client.receive)).number for _ in range(2)] == [100, 101]


async def test_is_waited_for_for_a_moment(tmp_path, looks, monkeypatch):
    monkeypatch.setattr(lookahead, "_MOMENT", 3600)
    async with serving(tmp_path) as served:
        with await served.connect() as client:
            client.ring(3)
            event = await called(served)
            # QEMU runs while the look goes on, on the same core, too.
            monkeypatch.setattr(lookahead.os, "sched_yield", lambda: client.ring(4))
            answer(served, event)
            assert [each.vcpu for each in served.sink.events] == [3, 4]
            assert looks == [False, True]


async def test_the_loop_turns_however_many_calls_there_are(tmp_path, looks, monkeypatch):
    monkeypatch.setattr(lookahead, "_WITHOUT_TURN", -1)
    async with serving(tmp_path) as served:
        with await served.connect() as client:
            client.ring(3)
            event = await called(served)
            client.ring(4)
            answer(served, event)
            assert looks == []
            await called(served)


async def test_nobody_looks_while_another_vcpu_waits_for_its_answer(tmp_path, looks):
    async with serving(tmp_path) as served:
        with await served.connect() as client:
            client.ring(3)
            event = await called(served)
            client.ring(4)
            await called(served)
            client.ring(5)
            answer(served, event)
            assert looks == []
            await called(served)


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"", "QEMU has hung up"),
        (message(vfio_user.VERSION, b"", size=5), "it broke the protocol: "),
    ],
    ids=["hangs up", "breaks the protocol"],
)
async def test_what_ends_the_connection_then_ends_it_as_ever(tmp_path, looks, sent, reason):
    async with serving(tmp_path) as served:
        with await served.connect() as client:
            client.ring(3)
            event = await called(served)
            client.send(sent)
            client.socket.shutdown(1)
            answer(served, event)
            while served.end is None:
                await anyio.sleep(0)
    (end,) = served.end.vcpus
    assert (end.vcpu, end.reason) == (3, "halted")
    assert end.detail.startswith(reason)


async def test_a_doorbell_of_ivshmem_is_looked_for_as_well(tmp_path, looks, looks_once):
    async with open_backend(f"ivshmem:unix:{tmp_path / 's'}?slots=2") as backend:
        served = Served(backend)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(served.run)
            async with ivshmem_guest(served.backend.path, 2) as guest:
                guest.write(0, 7)
                guest.ring(0)
                event = await called(served)
                guest.write(1, 7)
                guest.ring(1)
                answer(served, event)
                assert [each.vcpu for each in served.sink.events] == [0, 1]
                answer(served, served.sink.events[1])
                assert await guest.reaches(1, slots.STATE_ANSWERED)
    assert looks == [True, False]

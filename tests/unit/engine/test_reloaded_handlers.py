"""Handlers take the place of others while the guest runs: `BridgeServer.reload`."""

import anyio
import pytest

from vmibridge import (
    Bridge,
    BridgeHandler,
    BridgePacket,
    BridgeResponse,
    BridgeServer,
    Gate,
    OutcomeKind,
)
from vmibridge.errors import HandlerLifeError, ServerStateError
from vmibridge.recording import Recorder
from vmibridge.recording.file.reader import RecordingReader
from vmibridge.recording.messages import NOTE, SESSION
from vmibridge.testing import FakeGuest

pytestmark = pytest.mark.anyio

ASK = BridgePacket(0x1234, 1, 1)


class Numbered(BridgeHandler[int]):
    """Answers its number, when it may."""

    MAGIC, REQUEST = 0x1234, 1

    def __init__(self, number, told, may=None):
        self.number, self.told, self.may = number, told, may

    async def handle(self, vmi, packet):
        if self.may is not None and packet.value1:
            self.told.append(f"{self.number} waits")
            await self.may.wait()
        return BridgeResponse(value1=self.number).with_output(self.number)

    async def __aenter__(self):
        self.told.append(f"{self.number} entered")
        return self

    async def __aexit__(self, *_):
        self.told.append(f"{self.number} left")


class Shared(Numbered):
    shared = True


class Fails(Numbered):
    async def __aenter__(self):
        raise OSError("address in use")


async def outcomes_of(server):
    return [outcome async for outcome in server.run()]


async def until(told, what):
    while what not in told:
        await anyio.lowlevel.checkpoint()


async def test_new_traps_go_to_the_new_and_what_was_begun_stays():
    told, may, got = [], anyio.Event(), []

    async def slow(vm):
        got.append((await vm.call(BridgePacket(0x1234, 1, 1, 1), vcpu=1)).rax)

    async def guest(vm):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(slow, vm)
            await until(told, "1 waits")
            assert await server.reload(Numbered(2, told)) == 1
            got.append((await vm.call(ASK)).rax)
            assert await server.reload(Numbered(3, told)) == 1
            got.append((await vm.call(ASK)).rax)
            # Its turn is over, but the request that was begun before it is not.
            assert "2 left" not in told
            may.set()
            await until(told, "2 left")
        got.append((await vm.call(ASK)).rax)

    async with FakeGuest(guest) as backend:
        server = BridgeServer(backend, Numbered(1, told, may))
        await outcomes_of(server)
    assert got == [2, 3, 1, 3]
    assert told == [
        *("1 entered", "1 waits", "2 entered", "3 entered", "2 left", "3 left", "1 left"),
    ]


async def test_a_request_that_was_told_to_wait_gets_its_result_of_the_old_one():
    told, may, got = [], anyio.Event(), []

    class Slow(Numbered):
        soft_timeout = 0.01

    async def guest(vm):
        packet = BridgePacket(0x1234, 1, 1, 1)
        assert (await vm.call(packet)).rax == Gate.WAIT
        await server.reload(Numbered(5, told))
        may.set()
        while (answer := (await vm.call(packet)).rax) == Gate.WAIT:
            await anyio.lowlevel.checkpoint()
        got.extend((answer, (await vm.call(packet)).rax))

    async with FakeGuest(guest) as backend:
        server = BridgeServer(backend, Slow(4, told, may))
        await outcomes_of(server)
    assert got == [4, 5]


async def test_one_that_cannot_be_entered_changes_nothing(caplog):
    told = []

    async def guest(vm):
        assert await server.reload(Fails(2, told)) == 0
        assert (await vm.call(ASK)).rax == 1

    async with FakeGuest(guest) as backend:
        server = BridgeServer(backend, Numbered(1, told))
        await outcomes_of(server)
    assert "keeps its current handlers: handler fails did not start: OSError" in caplog.text
    assert told == ["1 entered", "1 left"]


async def test_a_shared_one_is_entered_once_and_left_when_no_vm_has_it():
    told, there = [], []

    async def guest(vm):
        there.append(vm)
        while len(there) < 2:
            await anyio.lowlevel.checkpoint()
        if vm.vm == "a":
            for number in (2, 3):
                shared = Shared(number, told)
                assert await server.reload(lambda _, shared=shared: Bridge(shared)) == 2
            await until(told, "2 left")
        else:
            await until(told, "2 left")
        assert (await vm.call(ASK)).rax == 3

    async with FakeGuest(guest, vm="a") as a, FakeGuest(guest, vm="b") as b:
        first = Shared(1, told)
        server = BridgeServer([a, b], lambda _: Bridge(first))
        await outcomes_of(server)
    assert told == ["1 entered", "2 entered", "3 entered", "2 left", "3 left", "1 left"]


async def test_a_shared_one_that_cannot_be_entered_changes_nothing():
    class FailsShared(Fails):
        shared = True

    async def guest(vm):
        with pytest.raises(HandlerLifeError, match="address in use"):
            await server.reload(FailsShared(2, []))
        assert (await vm.call(ASK)).rax == 1

    async with FakeGuest(guest) as backend:
        server = BridgeServer(backend, Numbered(1, []))
        await outcomes_of(server)


async def test_one_that_ends_by_itself_stops_the_run():
    class Ends(Numbered):
        async def __aenter__(self):
            self.tasks = anyio.create_task_group()
            await self.tasks.__aenter__()
            return self

        async def __aexit__(self, *error):
            return await self.tasks.__aexit__(*error)

    ends = Ends(2, [])

    async def guest(vm):
        await server.reload(ends)
        ends.tasks.cancel_scope.cancel()
        await anyio.sleep_forever()

    async with FakeGuest(guest) as backend:
        server = BridgeServer(backend, Numbered(1, []))
        with pytest.raises(HandlerLifeError, match="has ended"):
            await outcomes_of(server)


async def test_before_a_run_there_is_nothing_to_reload():
    async def guest(vm):
        pass

    async with FakeGuest(guest) as backend:
        server = BridgeServer(backend, Numbered(1, []))
        with pytest.raises(ServerStateError, match="has not run yet"):
            await server.reload(Numbered(2, []))


@pytest.mark.parametrize("size", [None, 1 << 40])
async def test_a_recording_says_where_others_answer(tmp_path, size):
    """In a file of its own where it may have several, else by a note."""

    async def guest(vm):
        await vm.call(ASK)
        await server.reload(Numbered(2, []))
        await vm.call(ASK)

    async with (
        FakeGuest(guest) as backend,
        Recorder(tmp_path / "run.mcap", max_size=size) as recorder,
    ):
        server = BridgeServer(backend, Numbered(1, []), taps=[recorder])
        outcomes = await outcomes_of(server)
    assert [outcome.kind for outcome in outcomes] == [OutcomeKind.HANDLED] * 2
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == (["run.mcap"] if size is None else ["run-2.mcap", "run.mcap"])
    with RecordingReader(tmp_path / files[0]) as reader:
        sessions = [message.message for message in reader.messages(SESSION)]
        notes = [message.message.text for message in reader.messages(NOTE)]
    assert len(sessions) == 1
    assert sessions[0].part == (1 if size is None else 2)
    assert any("handlers were reloaded" in note for note in notes) == (size is None)

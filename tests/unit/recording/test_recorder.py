"""What a recorder puts into its file: runs, sessions, and how it holds the vCPUs."""

import hashlib
import platform
from importlib.metadata import version
from pathlib import Path

import anyio
import pytest
import recorder_parts
from recorder_parts import (
    MAGIC,
    MEMORY,
    SECRET_BYTES,
    UNMAPPED,
    Probe,
    Told,
    as_told,
    ask,
    calls,
    read,
    record,
    serve,
)
from waiting import until

from vmibridge import (
    AddressRange,
    Bridge,
    BridgeResponse,
    BridgeServer,
    Gate,
    Policy,
    Quota,
    Rate,
)
from vmibridge.engine.settings import ServerSettings
from vmibridge.errors import RecordingError, ServerStateError
from vmibridge.recording.file.reader import RecordingReader
from vmibridge.recording.messages import Note, RecordedMethod, Reply, Session, Step
from vmibridge.recording.recorder import Recorder
from vmibridge.testing import FakeGuest
from vmibridge.vm.trap import TrapEvent

pytestmark = pytest.mark.anyio


RING_0 = Policy(rings=frozenset({0}))


async def one_of_each(vm):
    await vm.call(ask(1, 10, 20))
    await vm.call(ask(2))
    await vm.call(ask(3))
    await vm.call(ask(4))
    await vm.call(ask(1, request=0x77))
    await vm.call(ask(1), ring=3)
    while (await vm.call(ask(5))).rax == Gate.WAIT:
        await anyio.sleep(0.005)


class TestARun:
    async def test_is_told_to_taps_in_the_documented_order(self):
        told, data = Told(), SECRET_BYTES
        async with FakeGuest(one_of_each, memory=MEMORY) as vm:
            outcomes, _ = await serve(vm, told, policy=RING_0)
        last = len(outcomes)
        assert last > 7, "there were retries"
        between = {seq: [("retried", seq, 7)] for seq in range(8, last + 1)}
        between[2] = [("read", 2, 0x2000, 8, data, None), ("wrote", 2, 0x3000, 8, data, None)]
        between[4] = [(how, 4, UNMAPPED, 8, what, "not mapped")
                      for how, what in (("read", None), ("wrote", data))]  # fmt: skip
        between[last].append(("read", last, 0x2000, 8, data, None))
        assert told.calls == [
            ("begin", "fake"),
            *(
                call
                for seq, (event, outcome) in enumerate(zip(vm.events, outcomes, strict=True), 1)
                for call in (
                    ("trap", event), *between.get(seq, ()), ("answered", seq, outcome.kind)
                )
            ),
            ("end", "fake"),
        ]  # fmt: skip

    async def test_is_in_the_file_as_it_was(self, path):
        told = Told()
        outcomes, server = await record(path, one_of_each, taps=[told], policy=RING_0)
        with RecordingReader(path) as reader:
            times, messages = zip(*reader.messages(), strict=True)
        assert list(times) == sorted(times)
        seen = [as_told(message) for message in messages if not isinstance(message, Step)]
        assert seen == told.calls
        kinds = ["handled", "handled", "failed", "rejected", "unmatched", "denied", "waiting"]
        assert [outcome.kind.value for outcome in outcomes[:7]] == kinds
        replies = read(path, Reply)
        fields = ("kind", "packet", "writes", "handler", "error", "duration", "retry_of")
        for reply, outcome in zip(replies, outcomes, strict=True):
            assert (reply.vm, reply.vcpu, reply.seq) == ("fake", 0, outcome.event.seq)
            assert [getattr(reply, f) for f in fields] == [getattr(outcome, f) for f in fields]
        outputs = ['{"values":[10,20,0,0]}', f'"{SECRET_BYTES.hex()}"', None]
        assert [reply.output for reply in replies[:3]] == outputs
        counts = {kind.value: count for kind, count in server.summary.outcomes.items()}
        assert messages[-1].counts == {**counts, "native": 0}
        assert sum(counts.values()) == len(outcomes) == len(read(path, TrapEvent))

    async def test_of_several_vms_goes_into_one_file(self, path):
        async with (
            Recorder(path) as recorder,
            FakeGuest(calls(3), vm="a") as first,
            FakeGuest(calls(5), vm="b") as second,
        ):
            await serve([first, second], recorder, bridge=lambda vm: Bridge(Probe()))
        ends = {each.vm: each.counts["handled"] for each in read(path, Note)}
        assert ends == {"a": 3, "b": 5}
        for vm, count in ends.items():
            mine = [each.seq for each in read(path, TrapEvent, Reply) if each.vm == vm]
            assert mine == [seq for seq in range(1, count + 1) for _ in ("trap", "reply")]


class TestTheSession:
    async def test_names_what_served_the_vm(self, path, anyio_backend):
        await record(path, calls(1))
        (session,) = read(path, Session)
        name, options = anyio_backend
        assert session.loop == ("uvloop" if options.get("use_uvloop") else name)
        assert session.versions == {
            "python": platform.python_version(),
            **{each: version(each) for each in ("vmibridge", "anyio", "msgspec")},
        }
        probe, other = session.handlers
        assert (probe.name, probe.request, probe.magic) == ("probe", 2, MAGIC)
        assert (other.name, other.request) == ("other", 3)
        assert probe.type == f"{Probe.__module__}.Probe"
        assert probe.verify_values == (None, None, None, 0x5747)
        names = ["mirror", "copy", "fail", "miss", "slow"]
        assert list(probe.methods) == [RecordedMethod(n, name) for n, name in enumerate(names, 1)]
        assert probe.source == "recorder_parts.py"
        assert (
            probe.sha256 == hashlib.sha256(Path(recorder_parts.__file__).read_bytes()).hexdigest()
        )

    @pytest.mark.parametrize("denied", ["native", "skip", BridgeResponse(0xD)], ids=str)
    async def test_has_the_settings(self, path, denied):
        policy = Policy(
            rings=frozenset({0, 3}),
            address_spaces=frozenset({0, 0x1000}),
            instructions=(AddressRange(0, 0xFFFF), AddressRange(1 << 63, (1 << 64) - 1)),
            vm=Quota(requests=Rate(9, 0.5), bytes=Rate(1e6)),
            max_address_spaces=5,
            denied=denied,
        )
        given = {"soft_timeout": 0.5, "wait": BridgeResponse(1, 2), "queue": 7, "policy": policy}
        await record(path, calls(1), **given)
        assert read(path, Session)[0].settings == ServerSettings(**given)


class TestTheRecorder:
    async def test_has_to_be_entered(self, path):
        async with FakeGuest(calls(1)) as vm:
            with pytest.raises(ServerStateError, match="the recorder is not open"):
                await serve(vm, Recorder(path))
        assert not path.exists()

    async def test_finishes_the_file_when_its_block_is_cancelled(self, path):
        with anyio.CancelScope() as scope:
            async with Recorder(path) as recorder, FakeGuest(calls(1000)) as vm:
                async for outcome in BridgeServer(vm, Probe(), taps=[recorder]).run():
                    if outcome.event.seq == 5:
                        scope.cancel()
        assert scope.cancelled_caught
        messages = read(path)
        assert len(read(path, TrapEvent)) == len(read(path, Reply)) >= 5
        assert messages[-1].kind == "end"

    async def test_writes_over_a_file_only_when_told(self, path):
        path.write_text("something dear")
        with pytest.raises(RecordingError, match="already exists"):
            async with Recorder(path):
                pass
        assert path.read_text() == "something dear"
        async with Recorder(path, overwrite=True):
            pass
        assert read(path) == []

    async def test_finds_a_free_name_in_a_folder(self, tmp_path):
        (tmp_path / "run-1.mcap").write_text("something dear")
        async with (
            Recorder(tmp_path) as first,
            Recorder(tmp_path) as second,
            Recorder(tmp_path, stem="web", overwrite=True) as named,
        ):
            pass
        paths = [recorder.path.name for recorder in (first, second, named)]
        assert paths == ["run-2.mcap", "run-3.mcap", "web-1.mcap"]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["run-1.mcap", *paths]
        assert (tmp_path / "run-1.mcap").read_text() == "something dear"


class Holds(Told):
    """A tap that is full after each call of one name, until it is let go."""

    def __init__(self, name):
        super().__init__()
        self.name, self.go_on = name, anyio.Event()
        self.room = self.go_on.wait

    @property
    def full(self):
        return self.names()[-1] == self.name and not self.go_on.is_set()


@pytest.mark.parametrize(("name", "place"), [("read", 2), ("wrote", 3), ("answered", 4)])
async def test_a_tap_that_is_full_holds_the_vcpu(name, place):
    async def guest(vm):
        await vm.call(ask(2))
        await vm.call(ask(2))

    tap, each = Holds(name), ["trap", "read", "wrote", "answered"]
    async with FakeGuest(guest, memory=MEMORY) as vm, anyio.create_task_group() as tasks:
        tasks.start_soon(serve, vm, tap)
        await until(lambda: tap.calls and tap.full)
        await anyio.wait_all_tasks_blocked()
        assert tap.names() == ["begin", *each[:place]]
        tap.go_on.set()
    assert tap.names() == ["begin", *each, *each, "end"]

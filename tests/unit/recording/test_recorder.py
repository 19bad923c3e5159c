"""What a recorder puts into its file, what it leaves out, and what it does when it cannot."""

import errno
import hashlib
import itertools
import logging
import os
import platform
import threading
from functools import partial
from importlib.metadata import version
from pathlib import Path

import anyio
import pytest

from vmibridge import (
    AddressRange,
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
    method,
)
from vmibridge.engine.settings import ServerSettings
from vmibridge.engine.taps import Tap
from vmibridge.errors import ConfigError, RecordingError, RecordingReadError, ServerStateError
from vmibridge.recording.file import writer as writer_module
from vmibridge.recording.file.reader import RecordingReader
from vmibridge.recording.file.recover import recover
from vmibridge.recording.file.writer import RecordingWriter
from vmibridge.recording.messages import MemoryAccess, Note, RecordedMethod, Reply, Session
from vmibridge.recording.recorder import Recorder
from vmibridge.testing import FakeBackend, FakeGuest
from vmibridge.vm.trap import Registers, TrapEvent, TrapReason

pytestmark = pytest.mark.anyio

MAGIC = 0x1234_5678
SECRET = 0x5EC2_E7A1_B2C3_D4F6
SECRET_BYTES = SECRET.to_bytes(8, "little")
MEMORY = {0x2000: SECRET_BYTES, 0x3000: bytes(64)}
UNMAPPED = 0x9000
RING_0 = Policy(rings=frozenset({0}))


class Probe(BridgeHandler[object]):
    MAGIC = MAGIC
    REQUEST = 2
    VERIFY_VALUE4 = 0x5747
    name = "probe"

    @method(1)
    async def mirror(self, vmi, packet):
        return BridgeResponse(*packet.values[:3]).with_output({"values": packet.values})

    @method(2)
    async def copy(self, vmi, packet):
        data = await vmi.memory.read(0x2000, 8)
        await vmi.memory.write(0x3000, data)
        return BridgeResponse(packet.value1).with_output(data.hex())

    @method(3)
    async def fail(self, vmi, packet):
        raise RuntimeError(f"cannot do {packet.values}")

    @method(4)
    async def miss(self, vmi, packet):
        for access in (vmi.memory.read(UNMAPPED, 8), vmi.memory.write(UNMAPPED, SECRET_BYTES)):
            with pytest.raises(GuestMemoryError):
                await access

    @method(5, soft_timeout=0.005)
    async def slow(self, vmi, packet):
        await anyio.sleep(0.03)
        return BridgeResponse(len(await vmi.memory.read(0x2000, 8)))


class Other(Probe):
    REQUEST = 3
    name = "other"


def ask(code, *values, request=2, **more):
    return BridgePacket(MAGIC, request, code, *values, **more)


async def one_of_each(vm):
    await vm.call(ask(1, 10, 20))
    await vm.call(ask(2))
    await vm.call(ask(3))
    await vm.call(ask(4))
    await vm.call(ask(1, request=0x77))
    await vm.call(ask(1), ring=3)
    while (await vm.call(ask(5))).rax == Gate.WAIT:
        await anyio.sleep(0.005)


def calls(count):
    async def guest(vm):
        for number in range(count):
            await vm.call(ask(1, number))

    return guest


def kept(event, *access):
    return (event.seq, *access)


SHAPES = {
    "begin": lambda vm, *_: (vm,),
    "trap": lambda event: (event,),
    "retried": kept,
    "read": kept,
    "wrote": lambda event, address, data, error: kept(event, address, len(data), data, error),
    "answered": lambda outcome: kept(outcome.event, outcome.kind),
    "end": lambda vm, summary: (vm,),
}


class Told(Tap):
    """A tap that keeps what it is told."""

    def __init__(self):
        self.calls = []
        for name in SHAPES:
            setattr(self, name, partial(self._keep, name))

    def _keep(self, name, *told):
        self.calls.append((name, *SHAPES[name](*told)))

    def names(self):
        return [call[0] for call in self.calls]


def as_told(message):
    """A recorded message as `Told` keeps it."""
    match message:
        case Session(vm=vm):
            return ("begin", vm)
        case TrapEvent():
            return ("trap", message)
        case MemoryAccess():
            name = "wrote" if message.write else "read"
            return (
                name,
                *kept(message, message.address, message.size, message.data, message.error),
            )
        case Reply():
            return ("answered", message.seq, message.kind)
        case Note():
            retried = ("retried", message.seq, message.retry_of)
            return retried if message.kind == "retry" else (message.kind, message.vm)


async def serve(backends, *taps, bridge=None, **options):
    """Run to the end: the outcomes, and the server."""
    server = BridgeServer(backends, bridge or Bridge(Probe(), Other()), taps=taps, **options)
    return [outcome async for outcome in server.run()], server


async def record(path, guest, *, redact=(), flush_traps=1000, bridge=None, taps=(), **options):
    """Run a guest, recorded: the outcomes, and the server."""
    async with (
        Recorder(path, redact=redact, flush_traps=flush_traps) as recorder,
        FakeGuest(guest, memory=MEMORY) as vm,
    ):
        return await serve(vm, *taps, recorder, bridge=bridge, **options)


def read(path, *kinds):
    """The messages of a whole file, of these kinds."""
    with RecordingReader(path) as reader:
        found = [message for _, message in reader.messages()]
        assert (reader.problems, reader.complete) == ([], True)
    return [each for each in found if isinstance(each, kinds)] if kinds else found


def read_part(path):
    """What can be read of a file, and what is said of the rest."""
    with RecordingReader(path) as reader:
        return [each for _, each in reader.messages()], [each.text for each in reader.problems]


def traps_in(path):
    return sum(isinstance(each, TrapEvent) for each in read_part(path)[0])


def unpacked(path):
    with RecordingReader(path) as reader:
        return b"".join(data for _, data in reader.chunks())


async def until(condition):
    with anyio.fail_after(60):
        while not condition():
            await anyio.sleep(0.002)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.mcap"


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
        assert [as_told(message) for message in messages] == told.calls
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
        assert probe.type == f"{__name__}.Probe"
        assert probe.verify_values == (None, None, None, 0x5747)
        names = ["mirror", "copy", "fail", "miss", "slow"]
        assert list(probe.methods) == [RecordedMethod(n, name) for n, name in enumerate(names, 1)]
        assert probe.source == "test_recorder.py"
        assert probe.sha256 == hashlib.sha256(Path(__file__).read_bytes()).hexdigest()

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


X64, X86 = ["r8", "r9", "r10", "r11"], ["rsi", "rdi"]
FORMS = {
    (TrapReason.VMCALL, 64): ("rcx", "rdx", *X64),
    (TrapReason.CPUID, 64): ("rax", "rcx", *X64),
    (TrapReason.VMCALL, 32): ("rbp", "rdx", *X86),
    (TrapReason.VMMCALL, 32): ("rbp", "rdx", *X86),
    (TrapReason.CPUID, 32): ("rax", "rcx", "rbx", "rdx", *X86),
}
VALUES = ["value1", "value2", "value3", "value4"]


class TestRedaction:
    def absent(self, path):
        content = unpacked(path)
        texts = (str(SECRET).encode(), SECRET_BYTES.hex().encode())
        assert not any(form in content for form in (SECRET_BYTES, SECRET_BYTES[::-1], *texts))

    async def test_of_memory_leaves_address_and_size(self, path):
        async def guest(vm):
            for code in (2, 4):
                await vm.call(ask(code))

        await record(path, guest, redact=["memory"])
        self.absent(path)
        accesses = read(path, MemoryAccess)
        assert [as_told(access) for access in accesses] == [
            ("read", 1, 0x2000, 8, None, None),
            ("wrote", 1, 0x3000, 8, None, None),
            ("read", 2, UNMAPPED, 8, None, "not mapped"),
            ("wrote", 2, UNMAPPED, 8, None, "not mapped"),
        ]
        assert [reply.output for reply in read(path, Reply)] == [None, None]

    @pytest.mark.parametrize("code", [1, 3], ids=["answer", "error"])
    @pytest.mark.parametrize("what", VALUES)
    async def test_of_a_value_is_of_its_answer_output_and_error_too(self, path, what, code):
        packet = ask(code, **{what: SECRET})
        outcomes, _ = await record(path, lambda vm: vm.call(packet), redact=[what])
        self.absent(path)
        (reply,) = read(path, Reply)
        assert (reply.packet, reply.output) == (ask(code), None)
        assert (reply.handler, reply.kind) == ("probe", outcomes[0].kind)
        assert reply.error == (None if code == 1 else "left out")
        assert outcomes[0].packet == packet, "the consumer of the outcomes gets it all"

    async def test_of_one_request_leaves_the_others(self, path):
        async def guest(vm):
            for request in (2, 3):
                await vm.call(ask(1, 1, 2, 3, 4, request=request))

        await record(path, guest, redact=["0x0002:value3"])
        traps, replies = read(path, TrapEvent), read(path, Reply)
        assert [trap.registers.r10 for trap in traps] == [0, 3]
        assert [trap.registers.r11 for trap in traps] == [4, 4]
        assert [reply.packet.values for reply in replies] == [(1, 2, 0, 4), (1, 2, 3, 4)]
        assert [reply.writes.rcx for reply in replies] == [None, 3]
        assert [reply.output for reply in replies] == [None, '{"values":[1,2,3,4]}']
        (rule,) = read(path, Session)[0].redaction
        assert str(rule) == "0x0002:value3"

    @pytest.mark.parametrize("what", VALUES)
    @pytest.mark.parametrize(("reason", "width"), FORMS, ids=lambda part: str(part).lower())
    async def test_knows_the_registers_of_each_form(self, path, reason, width, what):
        magic, code, *values = FORMS[reason, width]
        secret = SECRET & 0xFFFF_FFFF if width == 32 else SECRET
        given = dict(zip(values, range(101, 105), strict=False))
        register = dict(zip(VALUES, values, strict=False)).get(what)
        held = {**given, register: secret} if register else given
        registers = Registers(**{magic: MAGIC, code: 2 | 1 << 16}, **held)
        event = TrapEvent(1, reason, registers, length=2, width=width)
        async with Recorder(path, redact=[what]) as recorder, FakeBackend([event]) as vm:
            await serve(vm, recorder)
        kept = {**given, register: 0} if register else given
        (trap,) = read(path, TrapEvent)
        assert trap.registers == Registers(**{magic: MAGIC, code: 2 | 1 << 16}, **kept)
        assert secret.to_bytes(width // 8, "big") not in unpacked(path)

    @pytest.mark.parametrize(
        "rule",
        ["", "value5", "value0", "magic", "Memory", "memory ", "0x10000:memory", "2:", "-1:memory"],
    )
    def test_by_a_rule_that_makes_no_sense_is_refused(self, path, rule):
        with pytest.raises(ConfigError, match="is no redaction"):
            Recorder(path, redact=[rule])
        assert not path.exists()


class TestADiskThatIsSlow:
    @pytest.mark.parametrize("most", [2, 3, 10])
    async def test_holds_the_guest_and_loses_nothing(self, path, most, monkeypatch):
        told, permits, begun, ended = Told(), threading.Semaphore(0), [], anyio.Event()
        add = RecordingWriter.add

        def held(writer, chunk):
            begun.append(chunk)
            assert permits.acquire(timeout=60)
            add(writer, chunk)

        async def run():
            await record(path, calls(20), flush_traps=most, taps=[told])
            ended.set()

        monkeypatch.setattr(RecordingWriter, "add", held)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(run)
            await until(lambda: told.names().count("trap") == most)
            try:
                for chunks in itertools.count(1):
                    # This one waits for its permit: those before it have been accounted for.
                    await until(lambda count=chunks: len(begun) == count or ended.is_set())
                    if ended.is_set():
                        break
                    await anyio.wait_all_tasks_blocked()
                    assert told.names().count("trap") - traps_in(path) <= most
                    permits.release()
            finally:
                permits.release(1000)
        assert told.names().count("trap") == 20
        assert [as_told(message) for message in read(path)] == told.calls

    @pytest.mark.parametrize("interval", [0.01, 0.2])
    async def test_gets_what_is_there_at_each_interval(self, path, interval):
        go_on = anyio.Event()

        async def guest(vm):
            await vm.call(ask(1))
            await go_on.wait()

        async with (
            Recorder(path, flush_interval=interval) as recorder,
            FakeGuest(guest) as vm,
            anyio.create_task_group() as tasks,
        ):
            tasks.start_soon(serve, vm, recorder)
            await until(lambda: path.exists() and Reply in map(type, read_part(path)[0]))
            assert traps_in(path) == 1
            go_on.set()


class SmallDisk:
    """Stands for `os` in the writer: after `room` bytes the disk is full."""

    def __init__(self, room=1 << 30):
        self.room = room

    def __getattr__(self, name):
        return getattr(os, name)

    def write(self, fd, data):
        if not self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = os.write(fd, data[: self.room])
        self.room -= written
        return written


@pytest.fixture
def disk(monkeypatch):
    disk = SmallDisk()
    monkeypatch.setattr(writer_module, "os", disk)
    return disk


ROOMS = pytest.mark.parametrize("room", [0, 1, 700, 5000])


class TestADiskThatIsFull:
    async def run(self, path, disk, room, **options):
        """Many calls; there is room for some chunks and a part of one. Returns all we know."""
        told = Told()
        recorder = Recorder(path, flush_traps=8, **options)
        with anyio.fail_after(60):
            async with recorder, FakeGuest(calls(500)) as vm:
                disk.room = room
                try:
                    await serve(vm, told, recorder)
                finally:
                    self.recorder, self.told = recorder, told

    def check_the_file(self, path):
        messages, problems = read_part(path)
        assert problems == ["the file ends here: it is truncated, or was not finished"]
        assert [as_told(message) for message in messages] == self.told.calls[: len(messages)]
        taken = self.told.names().count("trap")
        assert traps_in(path) + self.recorder.lost == taken

    @ROOMS
    async def test_ends_the_run(self, path, disk, room):
        with pytest.raises(RecordingError, match=r"ends here: No space left on device") as error:
            await self.run(path, disk, room)
        assert isinstance(error.value.__cause__, OSError)
        assert self.recorder.error is error.value
        assert self.told.names().count("trap") < 500
        assert self.told.names()[-1] == "end", "the guest is let go in good order"
        self.check_the_file(path)

    @ROOMS
    async def test_or_is_passed_over(self, path, disk, room, caplog):
        with caplog.at_level(logging.ERROR):
            await self.run(path, disk, room, on_error="continue")
        assert self.told.names().count("answered") == 500
        assert self.recorder.lost > 0
        self.check_the_file(path)
        first, last = (record.getMessage() for record in caplog.records)
        assert first.endswith("No space left on device; the run goes on unrecorded")
        assert last.endswith(f"; {self.recorder.lost} traps were not recorded")

    async def test_ends_the_run_of_a_vm_that_begins_later(self, path, disk):
        told = Told()
        with pytest.raises(RecordingError):
            async with Recorder(path) as recorder, FakeGuest(calls(3)) as vm:
                disk.room = 0
                recorder.begin("before", Bridge(Probe()), ServerSettings(), lambda error: None)
                await until(lambda: recorder.error)
                await serve(vm, told, recorder)
        assert told.names() == ["begin", "end"]


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
        with pytest.raises(RecordingError, match="is there already"):
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


class TestRecovery:
    def damage(self, path, how):
        """Damage a file; returns which messages are left of it."""
        with RecordingReader(path) as reader:
            chunks = [at for at, _ in reader.chunks()]
            counts = [len(list(reader._decode(at, data, reader._channels.values())))
                      for at, data in reader.chunks()]  # fmt: skip
        data, messages = bytearray(path.read_bytes()), read(path)
        middle = len(chunks) // 2
        start = sum(counts[:middle])
        if how == "truncated":
            del data[chunks[middle] + 50 :]
            del messages[start:]
        elif how == "without-its-index":
            del data[-100:]
        elif how == "damaged":
            data[chunks[middle] + 80] ^= 0xFF
            del messages[start : start + counts[middle]]
        path.write_bytes(data)
        return messages

    @pytest.mark.parametrize("how", ["truncated", "without-its-index", "damaged", "whole"])
    async def test_keeps_all_that_can_be_read(self, path, how):
        await record(path, calls(40), flush_traps=4)
        left = self.damage(path, how)
        target = path.with_name("clean.mcap")
        result = recover(path, target)
        messages = read(target)
        whole = how == "whole"
        assert (result.complete, result.problem_count) == (whole, 0 if whole else 1)
        assert messages[: len(left)] == left
        assert [each.kind for each in messages[len(left) :]] == ([] if whole else ["lost"])
        if not whole:
            assert messages[-1].text == "; ".join(map(str, result.problems))
        assert result.messages["trap"] == len(read(target, TrapEvent))
        assert sum(result.messages.values()) == len(messages)

    async def test_leaves_a_target_that_is_there(self, path, tmp_path):
        await record(path, calls(1))
        target = tmp_path / "dear.txt"
        target.write_text("something dear")
        with pytest.raises(ConfigError, match="there already"):
            recover(path, target)
        assert target.read_text() == "something dear"

    @pytest.mark.parametrize("content", [b"", b"no recording", b"\x89MCAP1\r\n"])
    def test_of_something_else_makes_no_file(self, tmp_path, content):
        source = tmp_path / "source"
        source.write_bytes(content)
        with pytest.raises(RecordingReadError):
            recover(source, tmp_path / "target")
        assert [each.name for each in tmp_path.iterdir()] == ["source"]

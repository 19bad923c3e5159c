"""The host's end of the QEMU plugin, against a plugin that is played here."""

import socket
import stat
import struct
from contextlib import asynccontextmanager
from functools import partial

import anyio
import pytest
from anyio.streams.buffered import BufferedByteReceiveStream

from vmibridge import Bridge, BridgeHandler, BridgeResponse, BridgeServer, GuestMemoryError
from vmibridge.aio.duplex import Duplex
from vmibridge.backends import open_backend
from vmibridge.backends.qemu.plugin import backend as module
from vmibridge.backends.qemu.plugin.protocol import REGISTER_NAMES
from vmibridge.errors import BackendError, BackendSpecError

pytestmark = pytest.mark.anyio
MAGIC, IP, AT, LARGE = 0x1234_5678, 0x40_1000, 0x5000, 8 << 20
HELLO, TRAP, MEMORY, WELCOME, REFUSED, ANSWER, NATIVE, READ, WRITE = (1, 2, 3, *range(16, 22))
DONE, FAILED = b"\0\0\0\0", b"\1\0\0\0"
ADD, WAIT, COPY, FILL, SWAP = 1, 2, 3, 4, 5


def trap(code, value=0, magic=MAGIC):
    registers = {"rcx": magic, "rdx": 1 | code << 16, "r8": value}
    values = [registers.get(name, 0) for name in REGISTER_NAMES]
    return TRAP, struct.pack("<QBBBBI22Q", IP, 2, 3, 64, 0, 0, *values)


def answer(*values):
    mask = (1 << len(values)) - 1
    return ANSWER, struct.pack("<QII4Q", IP + 3, mask, 0, *values, *[0] * (4 - len(values)))


class FakePlugin:
    """One vCPU, which says what it is told to."""

    def __init__(self, stream):
        self.stream, self.send_bytes, self.hang_up = stream, stream.send, stream.aclose
        self.incoming = BufferedByteReceiveStream(stream)

    async def send(self, kind, body):
        await self.send_bytes(struct.pack("<II", kind, len(body)) + body)

    async def hello(self, body, ram=()):
        head = struct.pack("<II", HELLO, len(body))
        send = partial(self.stream.send_fds, fds=ram) if ram else self.send_bytes
        await send(head + body)

    async def receive(self):
        kind, size = struct.unpack("<II", await self.incoming.receive_exactly(8))
        return kind, await self.incoming.receive_exactly(size)

    async def call(self, *what, **fields):
        await self.send(*trap(*what, **fields))
        return await self.receive()

    async def is_hung_up_on(self):
        with pytest.raises((anyio.IncompleteRead, anyio.BrokenResourceError)):
            await self.incoming.receive_exactly(1)
        await self.hang_up()


class Work(BridgeHandler[None]):
    MAGIC, REQUEST = MAGIC, 1

    def __init__(self):
        self.begun, self.end, self.vcpus, self.errors = anyio.Event(), anyio.Event(), [], []

    async def handle(self, vmi, packet):
        self.vcpus.append(vmi.vcpu)
        try:
            if packet.method == WAIT:
                self.begun.set()
                await self.end.wait()
            elif packet.method == COPY:
                data = await vmi.memory.read_physical(AT, 4)
                await vmi.memory.write_physical(AT + 4, data.upper())
            elif packet.method == SWAP:
                first, second = await self.backend.read_each(vmi.event, [(AT, 2), (AT + 9, 3)])
                await self.backend.write_each(vmi.event, [(AT + 9, first), (AT, second)])
            elif packet.method == FILL:
                await vmi.memory.write_physical(AT, bytes(LARGE))
        except GuestMemoryError as error:
            self.errors.append((error.address, error.reason))
        finally:
            self.end.set()
        return BridgeResponse(packet.value1 + 1, len(self.errors))


class Stage:
    """A server that runs in a block, which plays the guest."""

    def __init__(self, path):
        self.path, self.work = path, Work()

    @asynccontextmanager
    async def run(self, options=""):
        with anyio.fail_after(60):
            async with self.backend(options) as backend, anyio.create_task_group() as tasks:
                self.backend_of_the_run = self.work.backend = backend
                self.server = BridgeServer(backend, Bridge(self.work), timeout=60)
                tasks.start_soon(self.consume)
                yield
        self.ends = [(end.vcpu, end.reason) for end in self.server.summary.guest.vcpus]

    async def consume(self):
        self.outcomes = [outcome.kind.value async for outcome in self.server.run()]

    def backend(self, options=""):
        return open_backend(f"qemu-plugin:unix:{self.path}{options}")

    async def stranger(self):
        return FakePlugin(await anyio.connect_unix(self.path))

    async def plugin(self, vcpu=0, process=1, protocol=3, names=REGISTER_NAMES, ram=()):
        plugin = await self.stranger()
        head = (protocol, 7, process, vcpu, 2, b"x86_64", b"x86", 1)
        body = struct.pack("<IIQII16s12sI", *head)
        await plugin.hello(body + ",".join(names).encode(), ram)
        plugin.greeting = await plugin.receive()
        return plugin


@pytest.fixture
def stage(tmp_path):
    return Stage(tmp_path / "s")


async def test_the_next_trap_is_looked_for_unless_another_vcpu_waits(stage, monkeypatch):
    looks = []
    monkeypatch.setattr(Duplex, "_look", lambda _: looks.append(len(stage.work.vcpus)))
    async with stage.run():
        one, other = await stage.plugin(0), await stage.plugin(1)
        await other.send(*trap(WAIT))
        await stage.work.begun.wait()
        # This lets the other one end, in a turn of the loop.
        await one.call(ADD)
        await other.receive()
        await one.call(ADD)
        for each in (one, other):
            await each.hang_up()
    assert looks == [2, 3], "how many handlers had begun"


async def test_traps_of_ours_are_answered_and_others_run_natively(stage):
    async with stage.run():
        plugin = await stage.plugin()
        assert plugin.greeting == (WELCOME, struct.pack("<IIIII", 3, 0b1110, 0, 1, MAGIC))
        assert await plugin.call(ADD, 41) == answer(42, 0)
        assert await plugin.call(ADD, magic=MAGIC + 1) == (NATIVE, b"")
        await plugin.hang_up()
    assert (stage.ends, stage.outcomes) == ([(0, "halted")], ["handled"])


@pytest.mark.parametrize(
    ("replies", "wrong"),
    [
        ([DONE + b"abcd", DONE], []),
        ([FAILED], [(AT, "the VM has no memory there")]),
        ([DONE + b"abcd", FAILED], [(AT + 4, "the VM has no memory there")]),
        ([DONE + b"abc"], [(AT, "a MEMORY of 3 bytes, and 4 were asked for")]),
        ([DONE + b"abcd", DONE + b"x"], [(AT + 4, "a MEMORY of 1 bytes, and 0 were asked for")]),
        ([b"\0"], [(AT, "a MEMORY without a result")]),
    ],
)
async def test_the_plugin_reads_and_writes_memory(stage, replies, wrong):
    read = READ, struct.pack("<QII", AT, 4, 0)
    write = WRITE, struct.pack("<QII", AT + 4, 4, 0) + b"ABCD"
    async with stage.run():
        plugin = await stage.plugin()
        await plugin.send(*trap(COPY))
        for expected, reply in zip([read, write], replies, strict=False):
            assert await plugin.receive() == expected
            await plugin.send(MEMORY, reply)
        assert await plugin.receive() == answer(1, len(wrong))
        await plugin.hang_up()
    assert stage.work.errors == wrong


@pytest.mark.parametrize(
    ("replies", "wrong"),
    [
        ([DONE + b"ab", DONE + b"cde", DONE, DONE], []),
        ([DONE + b"ab", FAILED], [(AT + 9, "the VM has no memory there")]),
        ([FAILED, FAILED], [(AT, "the VM has no memory there")]),
        ([DONE, DONE + b"cde"], [(AT, "a MEMORY of 0 bytes, and 2 were asked for")]),
        ([DONE + b"ab", DONE + b"cde", DONE, FAILED], [(AT, "the VM has no memory there")]),
    ],
)
async def test_several_accesses_are_asked_for_at_once(stage, replies, wrong):
    reads = [(READ, struct.pack("<QII", AT + at, size, 0)) for at, size in ((0, 2), (9, 3))]
    writes = [
        (WRITE, struct.pack("<QII", AT + at, len(data), 0) + data)
        for at, data in ((9, b"ab"), (0, b"cde"))
    ]
    async with stage.run():
        plugin = await stage.plugin()
        await plugin.send(*trap(SWAP))
        for both, given in zip((reads, writes), (replies[:2], replies[2:]), strict=True):
            if not given:
                break
            # Both come before the reply to the first.
            assert [await plugin.receive() for _ in both] == both
            for reply in given:
                await plugin.send(MEMORY, reply)
        assert await plugin.receive() == answer(1, len(wrong))
        await plugin.hang_up()
    assert stage.work.errors == wrong


async def test_of_several_accesses_those_that_the_file_has_are_not_asked_for(stage, tmp_path):
    (tmp_path / "ram").write_bytes(bytes(AT) + b"abcdefgh")
    async with stage.run():
        with (tmp_path / "ram").open() as ram:
            plugin = await stage.plugin(ram=[ram.fileno()])
        await plugin.send(*trap(SWAP))
        # It ends before the second one.
        assert await plugin.receive() == (READ, struct.pack("<QII", AT + 9, 3, 0))
        await plugin.send(MEMORY, DONE + b"xyz")
        assert await plugin.receive() == (WRITE, struct.pack("<QII", AT + 9, 2, 0) + b"ab")
        assert await plugin.receive() == (WRITE, struct.pack("<QII", AT, 3, 0) + b"xyz")
        for _ in range(2):
            await plugin.send(MEMORY, DONE)
        assert await plugin.receive() == answer(1, 0)
        await plugin.hang_up()
    assert stage.work.errors == []


async def test_a_plugin_that_goes_between_two_replies_loses_the_vcpu(stage):
    async with stage.run():
        plugin = await stage.plugin()
        await plugin.send(*trap(SWAP))
        for _ in range(2):
            await plugin.receive()
        await plugin.send(MEMORY, DONE + b"ab")
        await plugin.hang_up()
    assert stage.ends == [(0, "lost")]


async def test_a_slow_handler_holds_no_other_vcpu_and_each_qemu_has_lanes_of_its_own(stage):
    async with stage.run():
        where = [(0, 70), (1, 70), (0, 9), (1, 9)]
        slow, *others = [await stage.plugin(vcpu, process) for vcpu, process in where]
        await slow.send(*trap(WAIT))
        await stage.work.begun.wait()
        for plugin in others:
            assert await plugin.call(ADD) == answer(1, 0)
            await plugin.hang_up()
        stage.work.end.set()
        assert await slow.receive() == answer(1, 0)
        await slow.hang_up()
    assert stage.work.vcpus == [0, 1, 1024, 1025]
    assert stage.ends == [(lane, "halted") for lane in stage.work.vcpus]


@pytest.mark.parametrize("code", [WAIT, COPY, FILL])
@pytest.mark.parametrize("says_nonsense", [False, True])
async def test_a_vcpu_that_goes_in_a_trap_is_lost(stage, code, says_nonsense):
    async with stage.run():
        plugin = await stage.plugin()
        await plugin.send(*trap(code))
        await (stage.work.begun.wait() if code == WAIT else plugin.incoming.receive_exactly(8))
        await (plugin.send(99, b"") if says_nonsense else plugin.hang_up())
        await stage.work.end.wait()
        await plugin.hang_up()
    assert stage.ends == [(0, "lost")]
    # An access under way fails, or is cancelled before it can.
    assert stage.outcomes in (["cancelled"], ["failed"])
    assert {reason[:14] for _, reason in stage.work.errors} <= {"the VM is gone"}


async def test_memory_that_a_qemu_shares_is_read_from_its_file(stage, tmp_path):
    (tmp_path / "ram").write_bytes(bytes(AT) + b"abcdefgh")
    async with stage.run():
        with (tmp_path / "ram").open() as ram:
            plugin = await stage.plugin(ram=[ram.fileno()])
        await plugin.send(*trap(COPY))
        # What is written goes through the plugin all the same.
        assert await plugin.receive() == (WRITE, struct.pack("<QII", AT + 4, 4, 0) + b"ABCD")
        await plugin.send(MEMORY, DONE)
        assert await plugin.receive() == answer(1, 0)
        await plugin.hang_up()
    assert stage.work.errors == []


async def test_a_qemu_that_shares_what_is_no_file_is_hung_up_on(stage, tmp_path):
    async with stage.run():
        good = await stage.plugin()
        bad = await stage.stranger()
        with socket.socket() as no_file:
            await bad.hello(b"", [no_file.fileno()])
        await bad.is_hung_up_on()
        assert await good.call(ADD) == answer(1, 0)
        await good.hang_up()
    assert stage.ends == [(0, "halted")]


async def test_a_host_that_stays_serves_qemus_one_after_the_other_on_the_same_lanes(stage):
    async with stage.run("?stay=true"):
        for process in range(3):
            plugin = await stage.plugin(process=process)
            assert await plugin.call(ADD) == answer(1, 0)
            await plugin.hang_up()
            while stage.backend_of_the_run._qemus:
                await anyio.sleep(0.001)
        stage.server.stop()
    assert (stage.work.vcpus, stage.ends) == ([0, 0, 0], [(0, "halted")])


async def test_memory_is_not_announced_before_it_was_asked_for(stage):
    async with stage.run():
        good, bad = await stage.plugin(0), await stage.plugin(1)
        await bad.send_bytes(struct.pack("<II", MEMORY, 16 << 20))
        await bad.is_hung_up_on()
        await good.hang_up()
    assert stage.ends == [(0, "halted"), (1, "halted")]


async def test_a_stop_answers_and_then_hangs_up(stage):
    """A frame that was on its way goes out first, all of it."""
    async with stage.run():
        waits, fills = await stage.plugin(0), await stage.plugin(1)
        await waits.send(*trap(WAIT))
        await stage.work.begun.wait()
        await fills.send(*trap(FILL))
        assert await fills.incoming.receive_exactly(8) == struct.pack("<II", WRITE, 16 + LARGE)
        stage.server.stop(now=True)
        await stage.work.end.wait()
        assert await waits.receive() == answer()
        await fills.incoming.receive_exactly(16 + LARGE)
        assert await fills.receive() == answer()
        await waits.is_hung_up_on()
        await fills.is_hung_up_on()
    assert stage.ends == [(0, "stopped"), (1, "stopped")]


@pytest.mark.parametrize(
    ("who", "why"),
    [
        ({"protocol": 1}, b"protocol 1, and this vmibridge 3"),
        ({"names": ["rax"]}, b"other registers"),
        ({"vcpu": 1024}, b"vCPU 1024, and 1024 of a QEMU are served"),
    ],
)
async def test_a_plugin_of_another_version_is_refused(stage, who, why):
    async with stage.run():
        other, good = await stage.plugin(**who), await stage.plugin()
        assert other.greeting[0] == REFUSED
        assert why in other.greeting[1]
        await other.is_hung_up_on()
        await good.hang_up()
    assert stage.ends == [(0, "halted")]


@pytest.mark.parametrize(
    ("said", "reason"),
    [([trap(WAIT)] * 2, "lost"), ([(MEMORY, DONE)], "halted"), ([(TRAP, b"short")], "halted")],
)
async def test_a_plugin_that_says_what_it_must_not_loses_its_own_connection(stage, said, reason):
    async with stage.run():
        good, bad = await stage.plugin(0), await stage.plugin(1)
        for frame in said:
            await bad.send(*frame)
        await bad.is_hung_up_on()
        assert await good.call(ADD) == answer(1, 0)
        await good.hang_up()
    assert stage.ends == [(0, "halted"), (1, reason)]


@pytest.mark.parametrize("said", [b"\1", b"\xff" * 8, struct.pack("<II", TRAP, 0)])
async def test_who_does_not_say_hello_does_not_hold_the_run(stage, said, monkeypatch):
    async with stage.run():
        good = await stage.plugin()
        monkeypatch.setattr(module, "_HANDSHAKE", 0.05)
        stranger = await stage.stranger()
        await stranger.send_bytes(said)
        assert await good.call(ADD) == answer(1, 0)
        await good.hang_up()
        await stranger.is_hung_up_on()
    assert stage.ends == [(0, "halted")]


@pytest.mark.parametrize(("options", "mode"), [("", 0o600), ("?mode=0o660", 0o660)])
async def test_a_path_is_taken_over_only_from_a_host_that_has_gone(stage, options, mode):
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(stage.path))
    async with stage.backend(options):
        assert stat.S_IMODE(stage.path.stat().st_mode) == mode
        with pytest.raises(BackendError, match="address already in use"):
            await stage.backend().__aenter__()
        await (await stage.stranger()).hang_up()
    assert not stage.path.exists()
    stage.path.write_text("mine")
    with pytest.raises(BackendError, match="is not a socket"):
        await stage.backend().__aenter__()
    assert stage.path.read_text() == "mine"


@pytest.mark.parametrize("rest", ["", "unix:", "tcp:1", "unix:/p?mode=x", "unix:/p?mode=-1"])
def test_a_wrong_spec(rest):
    with pytest.raises(BackendSpecError):
        open_backend(f"qemu-plugin:{rest}")


async def test_where_it_listens_is_logged(tmp_path, caplog):
    with caplog.at_level("INFO"):
        async with open_backend(f"qemu-plugin:unix:{tmp_path}/s", vm="web"):
            assert f"vm web: listening at unix:{tmp_path}/s" in caplog.text

"""The host's end of the QEMU plugin, with a plugin that is a script over the real socket."""

import re
import struct
from importlib.resources import files

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vmibridge import Bridge, BridgeHandler, BridgeResponse, BridgeServer, GuestMemoryError, method
from vmibridge.backend import open_backend
from vmibridge.backend.qemu_plugin import backend as backend_module
from vmibridge.backend.qemu_plugin import protocol
from vmibridge.backend.qemu_plugin.protocol import (
    MOST_MAGICS,
    PROTOCOL,
    REGISTER_NAMES,
    FrameReader,
    FrameType,
    parse_hello,
    parse_memory,
    parse_trap,
)
from vmibridge.errors import BackendError, BackendSpecError
from vmibridge.event import RegisterWrites, TrapFilter

MAGIC = 0x1234_5678
SOURCE = (files("vmibridge.backend.qemu_plugin") / "plugin.c").read_text()


class Probe(BridgeHandler[int]):
    MAGIC = MAGIC
    REQUEST = 1

    @method(1)
    async def add(self, vmi, packet):
        return BridgeResponse(value1=packet.value1 + 1)

    @method(2)
    async def swap(self, vmi, packet):
        try:
            data = await vmi.memory.read_physical(packet.value1, 4)
            await vmi.memory.write_physical(packet.value1 + 4, data[::-1])
        except GuestMemoryError as error:
            return BridgeResponse(value1=error.address, value2=0xBAD)
        return BridgeResponse(value1=int.from_bytes(data, "little"))

    @method(3)
    async def hang(self, vmi, packet):
        await anyio.sleep_forever()


def hello(vcpu=0, process=7, protocol=PROTOCOL, names=REGISTER_NAMES):
    head = struct.pack("<IIQII16s", protocol, 7, process, vcpu, 2, b"x86_64")
    return frame(FrameType.HELLO, head + ",".join(names).encode())


def frame(kind, body=b""):
    return struct.pack("<II", kind, len(body)) + body


def trap(code, value=0, magic=MAGIC, kind=2, width=64, ring=0, length=3):
    registers = dict.fromkeys(REGISTER_NAMES, 0)
    registers |= {"rcx": magic, "rdx": 1 | code << 16, "r8": value, "cr3": 0x7000}
    head = struct.pack("<QBBBBI", 0x40_1000, kind, length, width, ring, 0)
    return frame(FrameType.TRAP, head + struct.pack("<22Q", *registers.values()))


class FakePlugin:
    """One vCPU of a QEMU."""

    def __init__(self, stream):
        self.stream = stream
        self.frames = FrameReader()

    async def get(self):
        while (found := self.frames.next()) is None:
            self.frames.feed(await self.stream.receive())
        return found

    async def ask(self, *what, **how):
        """A trap, and the answer: RIP, and the values that are written."""
        await self.stream.send(trap(*what, **how))
        kind, body = await self.get()
        if kind == FrameType.NATIVE:
            return None
        assert kind == FrameType.ANSWER
        rip, mask, _, *values = struct.unpack("<QII4Q", body)
        return rip, [value if mask >> at & 1 else None for at, value in enumerate(values)]


class Stage:
    """A server over the backend, and plugins that come to it."""

    def __init__(self, path):
        self.path = path / "vmi.sock"

    async def connect(self, *, shake=True, **how):
        stream = await anyio.connect_unix(self.path)
        plugin = FakePlugin(stream)
        if shake:
            await stream.send(hello(**how))
            kind, body = await plugin.get()
            assert kind == FrameType.WELCOME
            plugin.welcome = struct.unpack(f"<{len(body) // 4}I", body)
        return plugin

    async def run(self, act, **settings):
        with anyio.fail_after(20):
            async with (
                open_backend(f"qemu-plugin:unix:{self.path}") as vm,
                anyio.create_task_group() as tasks,
            ):
                server = BridgeServer(vm, Bridge(Probe()), **settings)
                tasks.start_soon(act, self, server)
                outcomes = [outcome async for outcome in server.run()]
        assert not self.path.exists()
        return outcomes, server.summary.guest


@pytest.fixture
def stage(tmp_path):
    return Stage(tmp_path)


@pytest.mark.anyio
class TestTheBackend:
    async def test_answers_traps_of_ours_and_runs_others_natively(self, stage):
        async def act(stage, server):
            plugin = await stage.connect()
            assert plugin.welcome == (PROTOCOL, 0b1110, 0, 1, MAGIC)
            assert await plugin.ask(1, 41) == (0x40_1003, [42, None, None, None])
            assert await plugin.ask(1, 41, magic=0x9999) is None
            assert await plugin.ask(9) == (0x40_1003, [None] * 4)
            await plugin.stream.aclose()

        outcomes, end = await stage.run(act)
        assert [outcome.kind.value for outcome in outcomes] == ["handled", "rejected"]
        assert outcomes[0].event.registers.rip == 0x40_1000
        assert outcomes[0].event.address_space == 0x7000
        assert [(each.vcpu, each.reason) for each in end.vcpus] == [(0, "halted")]

    @pytest.mark.parametrize(
        ("replies", "answer"),
        [
            ([b"\0\0\0\0abcd", b"\0\0\0\0"], [0x64636261, None, None, None]),
            ([b"\1\0\0\0"], [0x1000, 0xBAD, None, None]),
            ([b"\0\0\0\0abcd", b"\1\0\0\0"], [0x1004, 0xBAD, None, None]),
            ([b"\0\0\0\0abc"], [0x1000, 0xBAD, None, None]),
        ],
        ids=["both", "no-read", "no-write", "too-short"],
    )
    async def test_asks_the_plugin_for_memory(self, stage, replies, answer):
        async def act(stage, server):
            plugin = await stage.connect()
            await plugin.stream.send(trap(2, 0x1000))
            asked = []
            for reply in replies:
                asked.append(await plugin.get())
                await plugin.stream.send(frame(FrameType.MEMORY, reply))
            _, body = await plugin.get()
            _, mask, _, *values = struct.unpack("<QII4Q", body)
            assert [v if mask >> at & 1 else None for at, v in enumerate(values)] == answer
            assert asked[0] == (FrameType.READ, struct.pack("<QII", 0x1000, 4, 0))
            if len(asked) > 1:
                written = struct.pack("<QII", 0x1004, 4, 0) + b"dcba"
                assert asked[1] == (FrameType.WRITE, written)
            await plugin.stream.aclose()

        await stage.run(act)

    async def test_a_slow_handler_holds_its_own_vcpu_only(self, stage):
        async def act(stage, server):
            slow, fast = await stage.connect(), await stage.connect(vcpu=1)
            other = await stage.connect(process=8)
            await slow.stream.send(trap(3))
            for value in range(10):
                assert (await fast.ask(1, value))[1][0] == value + 1
            await other.ask(1)
            for plugin in (fast, other):
                await plugin.stream.aclose()
            await slow.get()
            await slow.stream.aclose()

        outcomes, end = await stage.run(act, timeout=0.2)
        assert outcomes[-1].kind.value == "timeout"
        assert [each.vcpu for each in end.vcpus] == [0, 1, 1024]

    async def test_a_qemu_that_dies_ends_the_run(self, stage):
        async def act(stage, server):
            plugin = await stage.connect()
            await plugin.stream.send(trap(2, 0x1000))
            await plugin.get()
            await plugin.stream.aclose()

        outcomes, end = await stage.run(act)
        assert [each.reason for each in end.vcpus] == ["lost"]
        assert outcomes[0].error.startswith("not written")

    async def test_a_stop_answers_and_hangs_up(self, stage):
        async def act(stage, server):
            plugin = await stage.connect()
            await plugin.stream.send(trap(3))
            await anyio.sleep(0.05)
            server.stop(now=True)
            assert (await plugin.get())[0] == FrameType.ANSWER
            with pytest.raises((anyio.EndOfStream, anyio.BrokenResourceError)):
                await plugin.get()
            await plugin.stream.aclose()

        outcomes, end = await stage.run(act)
        assert [outcome.kind.value for outcome in outcomes] == ["cancelled"]
        assert [each.reason for each in end.vcpus] == ["stopped"]

    @pytest.mark.parametrize(
        "bad",
        [
            hello() + trap(3) + trap(1),
            hello() + frame(FrameType.MEMORY, b"\0\0\0\0"),
            hello() + frame(99),
            hello() + trap(1, kind=9),
            hello() + struct.pack("<II", FrameType.TRAP, 1 << 31),
            trap(1),
            frame(FrameType.HELLO, b"short"),
            hello(protocol=2),
            hello(names=("rax",)),
            b"",
        ],
    )
    async def test_what_a_peer_must_not_send_costs_its_own_connection(
        self, stage, bad, monkeypatch
    ):
        monkeypatch.setattr(backend_module, "_HANDSHAKE", 0.1)

        async def act(stage, server):
            good, peer = await stage.connect(), await stage.connect(shake=False)
            if bad:
                await peer.stream.send(bad)
            with pytest.raises((anyio.EndOfStream, anyio.BrokenResourceError)):
                while True:
                    await peer.get()
            assert (await good.ask(1, 1))[1][0] == 2
            for plugin in (good, peer):
                await plugin.stream.aclose()

        await stage.run(act, timeout=0.2)

    async def test_takes_the_place_of_a_host_that_is_gone_and_of_nothing_else(self, stage):
        listener = await anyio.create_unix_listener(stage.path)
        with pytest.raises(BackendError, match="another host listens"):
            async with open_backend(f"qemu-plugin:unix:{stage.path}"):
                pass
        await listener.aclose()
        async with open_backend(f"qemu-plugin:unix:{stage.path}"):
            assert stage.path.stat().st_mode & 0o777 == 0o600
        stage.path.write_text("mine")
        with pytest.raises(BackendError, match="is no socket"):
            async with open_backend(f"qemu-plugin:unix:{stage.path}"):
                pass
        assert stage.path.read_text() == "mine"


@pytest.mark.parametrize(
    "spec", ["qemu-plugin:", "qemu-plugin:tcp:1", "qemu-plugin:unix:", "qemu-plugin:unix:x?mode=a"]
)
def test_a_spec_that_makes_no_sense_is_refused(spec):
    with pytest.raises(BackendSpecError):
        open_backend(spec)


class TestTheProtocol:
    @given(st.lists(st.tuples(st.integers(0, 99), st.binary(max_size=40))), st.data())
    def test_frames_come_whole_however_they_are_cut(self, made, data):
        stream = b"".join(frame(kind, body) for kind, body in made)
        reader, found = FrameReader(), []
        while stream:
            size = data.draw(st.integers(1, len(stream)))
            reader.feed(stream[:size])
            stream = stream[size:]
            while (each := reader.next()) is not None:
                found.append(each)
        assert found == made

    @given(st.binary(max_size=300))
    def test_any_bytes_are_an_error_or_a_struct(self, body):
        for parse in (
            parse_hello,
            lambda data: parse_trap(data, 1, "vm", 0),
            lambda data: parse_memory(data, 4),
        ):
            try:
                parse(body)
            except ValueError:
                continue

    def test_there_is_room_for_64_magics(self):
        assert len(protocol.welcome(TrapFilter(frozenset(range(64))))) == 8 + 16 + 4 * 64
        with pytest.raises(ValueError, match="65 magics"):
            protocol.welcome(TrapFilter(frozenset(range(65))))

    def test_an_answer_writes_what_it_says(self):
        sent = protocol.answer(RegisterWrites(0x1003, None, 2, None, 4))
        assert sent == frame(FrameType.ANSWER, struct.pack("<QII4Q", 0x1003, 0b1010, 0, 0, 2, 0, 4))

    def test_is_that_of_the_plugin(self):
        for name, number in re.findall(r"\b([A-Z]+) = (\d+)\b", SOURCE):
            if name in FrameType.__members__:
                assert FrameType[name] == int(number)
        names = re.search(r"NAMES\[\] = \{(.*?)\};", SOURCE, re.DOTALL)[1]
        assert tuple(re.findall(r'"(\w+)"', names)) == REGISTER_NAMES
        assert f"PROTOCOL = {PROTOCOL}, MOST_MAGICS = {MOST_MAGICS}" in SOURCE

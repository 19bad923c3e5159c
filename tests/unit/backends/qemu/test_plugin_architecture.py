"""The architecture that a plugin names in HELLO, and the traps that it then sends."""

import re
import struct
from pathlib import Path

import anyio
import pytest
from toy_architecture import TOY, known_toy

from vmibridge import BridgeHandler, BridgeServer
from vmibridge.backends import open_backend
from vmibridge.backends.qemu.plugin import protocol
from vmibridge.vm.arch.x86.description import X86

SOURCE = Path(protocol.__file__).with_name("plugin").joinpath("protocol.h").read_text()
HELLO, WELCOME, REFUSED = 1, 16, 17


def hello(version=3, architecture=(b"x86", 1), names=protocol.REGISTER_NAMES):
    head = struct.pack("<IIQII16s", version, 7, 1, 0, 1, b"x86_64")
    if architecture is not None:
        head += struct.pack("<12sI", *architecture)
    return head + ",".join(names).encode()


class TestTheSource:
    def test_names_the_architecture_as_the_host_does(self):
        assert re.search(r'#define ARCHITECTURE "(\w+)"', SOURCE)[1] == X86.name
        assert int(re.search(r"ARCHITECTURE_VERSION = (\d+)", SOURCE)[1]) == X86.version

    def test_sends_the_registers_of_the_description_in_its_order(self):
        names = [name for name in X86.names if name != X86.instruction_pointer]
        assert [name.replace("eflags", "rflags") for name in protocol.REGISTER_NAMES] == [
            *names,
            "cs",
        ]


class TestHello:
    def test_names_the_architecture_and_its_version(self):
        told = protocol.parse_hello(hello(architecture=(b"twelve bytes", 0xFFFF_FFFF)))
        assert (told.architecture, told.architecture_version) == ("twelve bytes", 0xFFFF_FFFF)
        assert told.registers == protocol.REGISTER_NAMES

    def test_of_0_2_0_is_of_x86(self):
        told = protocol.parse_hello(hello(2, None))
        assert (told.architecture, told.architecture_version) == ("x86", 1)
        assert protocol.check_hello(told) is None

    @pytest.mark.parametrize(
        ("architecture", "why"),
        [
            ((b"m68k", 1), "'m68k' version 1 is not known here"),
            ((b"x86", 2), "'x86' version 2 is not known here: this vmibridge knows x86 version 1"),
            ((b"", 1), "'' version 1"),
            ((b"a\nb\x1b\xff", 1), r"'a\nb\x1b\ufffd' version 1"),
        ],
    )
    def test_of_another_one_is_refused_in_one_line(self, architecture, why):
        told = protocol.check_hello(protocol.parse_hello(hello(architecture=architecture)))
        assert why in told
        assert told.isprintable()

    def test_of_a_known_one_that_the_plugin_does_not_have_is_refused(self):
        with known_toy():
            told = protocol.parse_hello(hello(architecture=(b"toy", 3), names=TOY.names))
            assert "other registers" in protocol.check_hello(told)

    def test_of_a_later_protocol_is_refused_for_that(self):
        told = protocol.parse_hello(hello(4, None, names=["something else"]))
        assert "protocol 4, and this vmibridge 3" in protocol.check_hello(told)


class TestTraps:
    layout = protocol.layout_of(TOY, ("extra",), {TOY.flags: "psr"})

    def test_have_the_order_of_their_architecture(self):
        assert self.layout.names == (
            *("psr", "small", "medium", "g0", "g1", "g2", "g3", "g4", "tables", "extra"),
        )
        body = struct.pack("<QBBBBI10Q", 0x4000, 2, 4, 40, 1, 2, *range(10))
        event = protocol.parse_trap(body, 5, "toy", 6, self.layout)
        assert event.registers == TOY.registers(0x4000, *range(9))
        assert (event.ip, event.width, event.ring, event.flags_known) == (0x4000, 40, 1, False)

    @pytest.mark.parametrize("wrong", [(4, 64, 1), (5, 40, 1), (4, 40, 2)])
    def test_that_the_architecture_has_not_are_refused(self, wrong):
        length, width, ring = wrong
        body = struct.pack("<QBBBBI10Q", 0x4000, 2, length, width, ring, 0, *range(10))
        with pytest.raises(ValueError, match="a TRAP of kind 2"):
            protocol.parse_trap(body, 5, "toy", 6, self.layout)


class Idle(BridgeHandler[None]):
    MAGIC = 5
    REQUEST = 1

    async def handle(self, vmi, packet):
        return None


async def greeting(path, body):
    stream = await anyio.connect_unix(path)
    async with stream:
        await stream.send(struct.pack("<II", HELLO, len(body)) + body)
        return struct.unpack("<III", (data := await stream.receive())[:12]), data[8:]


@pytest.mark.anyio
async def test_a_plugin_is_welcomed_in_its_protocol_or_refused(tmp_path, caplog):
    path = tmp_path / "s"
    async with open_backend(f"qemu-plugin:unix:{path}?stay=true") as backend:
        server = BridgeServer(backend, Idle())
        async with anyio.create_task_group() as tasks:

            async def serve():
                async for _ in server.run():
                    pass

            tasks.start_soon(serve)
            for version, architecture in ((3, (b"x86", 1)), (2, None)):
                (kind, _, told), _ = await greeting(path, hello(version, architecture))
                assert (kind, told) == (WELCOME, version)
            (kind, *_), why = await greeting(path, hello(architecture=(b"arm64", 1)))
            server.stop(now=True)
    assert kind == REFUSED
    assert b"architecture 'arm64' version 1 is not known here" in why
    assert "architecture 'arm64' version 1" in caplog.text

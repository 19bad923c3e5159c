"""The architecture of a guest on the wire: HELLO names it, WELCOME confirms it, traps follow it."""

import logging

import anyio
import msgspec
import pytest
from remote_parts import Echo, FakeAgent, carry, served, trap
from toy_architecture import PAGE, TOY, ToyBackend, known_toy, page_tables, toy_trap

from vmibridge import BridgeHandler, BridgeResponse, BridgeServer
from vmibridge.errors import BackendError, RefusedByServerError, RefusedError, WireError
from vmibridge.testing import FakeBackend
from vmibridge.transport import RemoteBackend
from vmibridge.transport.handshake import check_hello, check_welcome, hello
from vmibridge.transport.wire import (
    FROM_AGENT,
    FROM_SERVER,
    FrameReader,
    Hello,
    Welcome,
    encode,
    layout_of,
    trap_event,
    trap_frame,
)
from vmibridge.vm.arch.x86.description import X86

ID = bytes(range(16))
# As 0.2.0 sends them, element by element.
OLD_HELLO = [1, "vmibridge", 1, 1, ID, "web", 0, True]
OLD_WELCOME = [16, 1, ID, 0, [0x1234], True, False, 5000, [None] * 4, 64, []]
PACKED = layout_of(TOY)


@pytest.fixture
def url(tmp_path):
    return f"unix:{tmp_path}/s"


def body(frame):
    return msgspec.msgpack.decode(encode(frame)[4:])


def read(elements, decoder):
    data = msgspec.msgpack.encode(elements)
    (frame,) = FrameReader(decoder).feed(len(data).to_bytes(4, "little") + data)
    return frame


class TestTheBytes:
    def test_hello_names_the_architecture_behind_what_0_2_0_sends(self):
        frame = hello(ID, "web", other_hypercalls=True, architecture=X86)
        assert body(frame) == [*OLD_HELLO, "x86", 1]

    def test_a_hello_of_0_2_0_is_of_x86(self):
        frame = read(OLD_HELLO, FROM_AGENT)
        assert (frame.architecture, frame.architecture_version) == ("x86", 1)
        check_hello(frame)

    def test_a_welcome_of_0_2_0_is_to_x86(self):
        frame = read(OLD_WELCOME, FROM_SERVER)
        assert check_welcome(frame, X86) is frame


class TestWhatIsNotKnown:
    @pytest.mark.parametrize("told", [("m68k", 1), ("x86", 2), ("x86", 0), ("toy", 3)])
    def test_a_server_refuses_it_in_one_line(self, told):
        frame = Hello("vmibridge", 1, 1, ID, "web", 0, False, *told)
        with pytest.raises(RefusedError, match=r"'\w+' version \d is not known here") as why:
            check_hello(frame)
        assert why.value.final
        assert "\n" not in str(why.value)

    def test_an_agent_leaves_a_server_that_takes_its_guest_for_another(self):
        frame = read(OLD_WELCOME, FROM_SERVER)
        with pytest.raises(
            RefusedByServerError,
            match="takes the guest for 'x86' version 1, and it is toy version 3",
        ) as why:
            check_welcome(frame, TOY)
        assert why.value.final


class TestTraps:
    def test_registers_have_the_order_and_the_widths_of_their_architecture(self):
        event = toy_trap(seq=9, values=(1 << 63, 2, 3, 0xFFFF))
        frame = trap_frame(event, 5000, layout=PACKED)
        assert len(frame.registers) == TOY.size == 8 + 1 + 2 + 4 + 6 * 8
        assert frame.registers[:11] == (0x4000).to_bytes(8, "little") + b"\5\xff\xff"
        (came,) = FrameReader(FROM_AGENT).feed(encode(frame))
        assert trap_event(came, "toy", PACKED) == event

    @pytest.mark.parametrize("wrong", [{"small": 1 << 16}, {"status": 256}, {"g0": -1}])
    def test_what_does_not_fit_a_register_is_not_sent(self, wrong):
        event = toy_trap()
        registers = msgspec.structs.replace(event.registers, **wrong)
        with pytest.raises(ValueError, match="trap 1: registers have"):
            trap_frame(msgspec.structs.replace(event, registers=registers), 5000, layout=PACKED)

    @pytest.mark.parametrize(
        ("field", "value"),
        [("width", 64), ("ring", 2), ("length", 5), ("registers", bytes(62))],
    )
    def test_what_the_architecture_has_not_is_an_error(self, field, value):
        frame = trap_frame(toy_trap(), 5000, layout=PACKED)
        with pytest.raises(WireError):
            trap_event(msgspec.structs.replace(frame, **{field: value}), "toy", PACKED)

    @pytest.mark.parametrize("size", [0, 175])
    def test_registers_of_another_size_are_an_error(self, size):
        frame = msgspec.structs.replace(trap_frame(trap(1), 5000), registers=bytes(size))
        with pytest.raises(WireError, match=f"registers of {size} bytes"):
            trap_event(frame, "vm")

    def test_no_more_is_taken_than_an_architecture_has(self):
        frame = msgspec.structs.replace(trap_frame(trap(1), 5000), registers=bytes(177))
        with pytest.raises(WireError):
            FrameReader(FROM_AGENT).feed(encode(frame))


class Spell(BridgeHandler[bytes]):
    """Reads a word across two pages, and writes one."""

    REQUEST = 1

    async def handle(self, vmi, packet):
        word = await vmi.memory.read(packet.value1, packet.value2)
        await vmi.memory.write(packet.value1, word[::-1])
        return BridgeResponse(value1=int.from_bytes(word, "big")).with_output(word)


def toy_backend():
    pages = {0x5000: bytes(PAGE - 2) + b"ab", 0x6000: b"cd".ljust(PAGE, b"\0")}
    traps = [toy_trap(values=(PAGE - 2, 4)), toy_trap(2, values=(5 * PAGE, 4))]
    return ToyBackend(traps, memory=page_tables(0x50, 0x60) | pages, vm="toy")


@pytest.mark.anyio
class TestARun:
    async def test_a_guest_of_another_architecture_is_served_by_its_description(self, url):
        with known_toy():
            backend = toy_backend()
            async with served(url, Spell()):
                await carry(backend, url)
        first, second = backend.writes[1], backend.writes[2]
        assert (first.rip, first.rax) == (0x4004, int.from_bytes(b"abcd", "big"))
        assert second.rax is None
        assert backend.memory[0x5000][-2:] + backend.memory[0x6000][:2] == b"dcba"

    async def test_an_agent_that_is_not_understood_ends_with_one_line(self, url, caplog):
        caplog.set_level(logging.WARNING)
        async with served(url, Spell()):
            with pytest.raises(BackendError) as why:
                await carry(toy_backend(), url)
        assert str(why.value) == (
            f"{url}: architecture 'toy' version 3 is not known here: this vmibridge knows x86"
            " version 1"
        )
        assert "refused: architecture 'toy' version 3" in caplog.text

    async def test_the_server_confirms_what_it_was_told(self, url):
        with known_toy():
            async with served(url, Echo()), FakeAgent.connected(url) as agent:
                welcome = await agent.hello(architecture="toy", architecture_version=3)
        assert isinstance(welcome, Welcome)
        assert (welcome.architecture, welcome.architecture_version) == ("toy", 3)

    async def test_a_session_goes_on_with_its_architecture_only(self, url):
        """The server says which that is, and an agent of another leaves."""
        with known_toy():
            async with served(url, Echo()):
                async with FakeAgent.connected(url) as agent:
                    assert isinstance(await agent.hello(), Welcome)
                async with FakeAgent.connected(url) as agent:
                    welcome = await agent.hello(architecture="toy", architecture_version=3)
        with pytest.raises(RefusedByServerError, match="takes the guest for 'x86' version 1"):
            check_welcome(welcome, TOY)

    async def test_a_remote_backend_is_of_one_architecture(self, url):
        """Recorders are told which before an agent comes."""
        with known_toy():
            async with RemoteBackend(url) as backend, anyio.create_task_group() as tasks:
                server = BridgeServer(backend, Spell())

                async def serve():
                    async for _ in server.run():
                        pass

                tasks.start_soon(serve)
                with pytest.raises(BackendError, match="only a guest of x86 is served here"):
                    await carry(toy_backend(), url)
                await carry(FakeBackend(), url)

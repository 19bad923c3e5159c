"""The description of an architecture, and the table of those that are known."""

import pytest
from toy_architecture import MASK, TOY, ToyRegisters, known_toy, page_tables, toy_trap

from vmibridge import BridgePacket, BridgeResponse, GuestMemoryError, TrapReason
from vmibridge.bridge.registers import (
    forms_of,
    is_guest_request,
    read_packet,
    write_response,
)
from vmibridge.bridge.request import retry_key
from vmibridge.errors import UnknownArchitectureError
from vmibridge.testing import FakeMemory
from vmibridge.vm.arch import ARCHITECTURES, architecture_named, architecture_of
from vmibridge.vm.arch.x86.description import X86
from vmibridge.vm.memory import GuestMemory
from vmibridge.vm.trap import Registers, TrapEvent

every_one = pytest.mark.parametrize("architecture", [*ARCHITECTURES, TOY], ids=str)


@pytest.fixture(autouse=True)
def toy():
    with known_toy():
        yield


class TestDescriptions:
    @every_one
    def test_its_words_are_registers(self, architecture):
        names = set(architecture.names)
        assert {architecture.instruction_pointer, architecture.flags} <= names
        assert names >= set(architecture.values)
        assert names >= set(architecture.bits)
        for form in architecture.forms.values():
            assert names >= set(form.names)

    @every_one
    def test_its_forms_are_of_its_widths(self, architecture):
        assert {width for _, width in architecture.forms} <= architecture.widths
        assert architecture.narrowest in architecture.widths

    @every_one
    def test_its_name_has_room_in_every_protocol(self, architecture):
        assert architecture.name.isascii()
        assert 0 < len(architecture.name) <= 12
        assert architecture.version > 0

    @every_one
    def test_registers_have_their_widths_in_their_order(self, architecture):
        codes = {"B": 8, "H": 16, "I": 32, "Q": 64}
        bits = [codes[code] for code in architecture.layout]
        assert bits == [architecture.bits.get(name, 64) for name in architecture.names]
        assert architecture.size == sum(bits) // 8

    def test_x86_is_as_peers_and_files_of_version_1_have_it(self):
        """Another register, order or width is another version."""
        assert (X86.name, X86.version, X86.layout) == ("x86", 1, "Q" * 22)
        assert X86.names == (
            *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp"),
            *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"),
            *("rip", "rflags", "cr0", "cr3", "cr4", "efer"),
        )
        assert X86.registers is Registers


class TestTheTable:
    def test_registers_find_their_architecture(self):
        assert architecture_of(Registers()) is X86
        assert architecture_of(ToyRegisters()) is TOY
        assert toy_trap().architecture is TOY
        assert TrapEvent(1, TrapReason.CPUID, Registers()).architecture is X86

    def test_what_are_no_registers_have_none(self):
        with pytest.raises(TypeError, match="int is the registers of no architecture"):
            architecture_of(5)

    def test_a_name_and_a_version_find_one(self):
        assert architecture_named("x86", 1) is X86
        assert architecture_named("toy", 3) is TOY

    @pytest.mark.parametrize(
        ("name", "version", "why"),
        [
            ("m68k", 1, "'m68k' version 1 is not known here: .* knows x86 version 1, toy version"),
            ("toy", 4, "'toy' version 4 is not known here: this vmibridge knows toy version 3$"),
            ("toy", 2, "'toy' version 2"),
            ("x86", 0, "'x86' version 0"),
            ("", 1, "'' version 1"),
            ("a\nb\x1b", 1, r"'a\\nb\\x1b' version 1"),
        ],
    )
    def test_any_other_is_one_clear_line(self, name, version, why):
        with pytest.raises(UnknownArchitectureError, match=why) as told:
            architecture_named(name, version)
        assert str(told.value).isprintable()

    def test_a_trap_instruction_is_of_one_architecture(self):
        with pytest.raises(ValueError, match="vmcall is of x86 and of toy"):
            forms_of((X86, TOY))
        assert forms_of((X86, X86)) == X86.forms


class TestARequest:
    def test_is_read_by_its_form(self):
        event = toy_trap(request=2, method=3, values=(MASK + 7, 8, 9, 10))
        assert read_packet(event) == BridgePacket(0x0701_0701, 2, 3, 6, 8, 9, 10)

    def test_is_answered_within_its_width(self):
        event = toy_trap(ip=MASK - 1)
        writes = write_response(event, BridgeResponse(value1=MASK + 3, value4=4))
        assert (writes.rip, writes.values) == (2, (2, None, None, 4))

    def test_has_a_signature_of_its_own(self):
        assert is_guest_request(toy_trap())
        assert not is_guest_request(toy_trap(width=41))

    def test_has_an_address_space_of_its_own(self):
        event = toy_trap()
        assert event.address_space == 0x2000
        assert retry_key(event, read_packet(event))[:2] == (0x2000, 1)


class Physical:
    def __init__(self, memory):
        self.memory = FakeMemory(memory)

    async def read_physical(self, event, address, size):
        return self.memory.read(address, size)

    async def write_physical(self, event, address, data):
        self.memory.write(address, data)


@pytest.mark.anyio
class TestMemory:
    async def test_is_reached_by_its_page_walk(self):
        frames = {0x5000: bytes(254) + b"ab", 0x6000: b"cdef".ljust(256, b"\0")}
        physical = Physical(page_tables(0x50, 0x60) | frames)
        memory = GuestMemory(physical, toy_trap())
        assert await memory.read(254, 6) == b"abcdef"
        await memory.write(255, b"XYZ")
        assert physical.memory[0x6000][:4] == b"YZef"

    async def test_has_its_rights(self):
        kernels_own = {0x2000: (0x50 << 4 | 1).to_bytes(2, "little").ljust(512, b"\0")}
        physical = Physical(kernels_own | {0x5000: b"x" * 256})
        assert await GuestMemory(physical, toy_trap(ring=0)).read(0, 1) == b"x"
        with pytest.raises(GuestMemoryError, match="not mapped"):
            await GuestMemory(physical, toy_trap(ring=1)).read(0, 1)

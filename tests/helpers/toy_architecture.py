"""An architecture that no machine has, unlike x86 wherever it can be.

`with known_toy():` makes vmibridge know it. What then works does so by the description alone.
"""

from contextlib import contextmanager

import msgspec
import pytest

from vmibridge.bridge import registers
from vmibridge.errors import GuestMemoryError
from vmibridge.testing import FakeBackend
from vmibridge.vm import arch
from vmibridge.vm.arch.architecture import Architecture, Page, register_form
from vmibridge.vm.trap import TrapEvent, TrapReason

WIDTH = 40
MASK = (1 << WIDTH) - 1
MAGIC = 0x0701_0701
PAGE = 256


class ToyRegisters(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """The instruction pointer is first, and four of them are small."""

    pc: int = 0
    status: int = 5
    small: int = 0
    medium: int = 0
    g0: int = 0
    g1: int = 0
    g2: int = 0
    g3: int = 0
    g4: int = 0
    tables: int = 0


def walk(toy, address, *, write=False, ring=0):
    """One level: entries of 2 bytes, whose bit 0 is present and bit 1 is for ring 1, too."""
    entry = yield (toy.tables & 0xFF00) + 2 * (address // PAGE), 2
    if not entry & 1 or (ring and not entry & 2):
        raise GuestMemoryError(address, "not mapped")
    return Page((entry >> 4) * PAGE + address % PAGE, PAGE - address % PAGE)


TOY = Architecture(
    name="toy",
    version=3,
    registers=ToyRegisters,
    bits={"status": 8, "small": 16, "medium": 32},
    instruction_pointer="pc",
    flags="status",
    values=("g0", "g1", "g2", "g3", "medium"),
    rings=2,
    widths=frozenset({WIDTH}),
    narrowest=WIDTH,
    longest_instruction=4,
    roots=0xFF00,
    page_root=lambda toy: toy.tables & 0xFF00,
    walk=walk,
    # It has to be a hypercall that handlers are asked for; on x86 no width is 40.
    forms={
        (TrapReason.VMCALL, WIDTH): register_form(MASK, "medium", "g3", "g2", "g1", "g0", "small")
    },
    is_guest_request=lambda toy, width: toy.g4 == width,
)


@contextmanager
def known_toy():
    """For the time of the block, vmibridge knows it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arch, "ARCHITECTURES", (*arch.ARCHITECTURES, TOY))
        patch.setattr(registers, "_FORMS", {**registers._FORMS, **TOY.forms})
        yield


def toy_trap(seq=1, request=1, method=1, values=(), **fields):
    names = ("g2", "g1", "g0", "small")
    found = ToyRegisters(
        pc=0x4000, medium=MAGIC, g3=request | method << 16, tables=0x2077, g4=WIDTH,
        **dict(zip(names, values, strict=False)),
    )  # fmt: skip
    fields = {"vm": "toy", "ip": 0x4000, "length": 4, "width": WIDTH, "ring": 1, **fields}
    return TrapEvent(seq, TrapReason.VMCALL, found, **fields)


def page_tables(*frames):
    """Memory whose pages 0, 1, ... are in these frames, user ones."""
    entries = b"".join((frame << 4 | 3).to_bytes(2, "little") for frame in frames)
    return {0x2000: entries.ljust(512, b"\0")}


class ToyBackend(FakeBackend):
    architecture = TOY
    other_hypercalls = True

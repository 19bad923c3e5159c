"""What a description of an architecture has; docs/design.md says how to add one.

Invariants:

- A description is a table of values and plain functions, made once and never changed. Wire,
  recording and plugin protocol take the names, the order and the sizes of registers from it.
- Registers, their order and their sizes are fixed by name and version. Another register is another
  version; the description of the one before stays beside it, for peers and files that have it.
- A trap instruction is one of a single architecture, so a `TrapReason` and an address width find
  the register form of a trap without asking for its architecture.
"""

import struct
from collections.abc import Callable, Generator, Mapping
from operator import attrgetter
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import msgspec

from vmibridge.vm.reason import TrapReason

R = TypeVar("R", bound=msgspec.Struct)
R_contra = TypeVar("R_contra", contravariant=True)

_CODES = {8: "B", 16: "H", 32: "I", 64: "Q"}


class Page(NamedTuple):
    """Where a virtual address leads: a physical address, and the bytes left in its page."""

    physical: int
    left: int


Walk = Generator[tuple[int, int], int, Page]
"""Yields the physical address and the size in bytes of each page-table entry that it needs, and is
sent the entry."""


class PageWalk(Protocol[R_contra]):
    """Translates one virtual address."""

    def __call__(
        self, registers: R_contra, address: int, *, write: bool = False, ring: int = 0
    ) -> Walk:
        """Raises `GuestMemoryError`, with the virtual address, where the guest would fault."""


class PagesNow(Protocol[R_contra]):
    """Translates a range of virtual addresses for a read, by memory that need not be waited for."""

    def __call__(
        self,
        read: Callable[[int, int], bytes | None],
        registers: R_contra,
        address: int,
        size: int,
        ring: int,
    ) -> list[tuple[int, int]] | None:
        """Physical addresses, each with the bytes from there on, one for each page.

        `None`: it is not done here, or the guest would fault. Then `PageWalk` says why and where.
        """


class RegisterForm(NamedTuple):
    """Where one kind of guest keeps the fields of a request."""

    names: tuple[str, ...]
    """magic, request and method, value1 to as many values as the form has."""
    mask: int
    """The bits that a value of this form has."""
    get: Callable[[Any], tuple[int, ...]]
    """From registers to the values of `names`."""


def register_form(mask: int, *names: str) -> RegisterForm:
    """A form whose fields are in the registers of these names."""
    return RegisterForm(names, mask, attrgetter(*names))


class Architecture(msgspec.Struct, Generic[R], frozen=True, kw_only=True, eq=False):
    """The description of one architecture, in one version."""

    name: str
    """At most 12 ASCII characters; what peers and files call it."""
    version: int
    """Of the registers, their order and their sizes; from 1."""
    registers: type[R]
    """The struct of the registers. The order of its fields is that of every codec."""
    bits: Mapping[str, int] = {}
    """Registers that have fewer than 64 bits: 8, 16 or 32."""
    instruction_pointer: str
    flags: str
    """The register with the arithmetic flags."""
    values: tuple[str, ...]
    """The general registers, in which a request has its values, or which may repeat one. The stack
    pointer is none of them."""
    rings: int
    """Privilege levels, numbered from 0; 0 is that of the kernel."""
    widths: frozenset[int]
    """Address widths that code may have, in bits."""
    narrowest: int
    """The narrowest width in bits whose guests can be answered; others get an error."""
    longest_instruction: int
    """Bytes, prefixes included."""
    roots: int
    """The bits that the root of page tables may have: a mask of physical addresses."""
    page_root: Callable[[R], int]
    """The physical address of the root of the page tables, which names the address space."""
    walk: PageWalk[R]
    pages: PagesNow[R] | None = None
    """A shortcut to what `walk` says of each page of a range; `None`: there is none."""
    forms: Mapping[tuple[TrapReason, int], RegisterForm]
    """By trap instruction and address width."""
    is_guest_request: Callable[[R, int], bool]
    """Whether a hypercall at this address width has the signature of Xen's guest request."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the registers, in their order."""
        return self.registers.__struct_fields__

    @property
    def layout(self) -> str:
        """The registers in the letters of `struct`, without a byte order."""
        return "".join(_CODES[self.bits.get(name, 64)] for name in self.names)

    @property
    def size(self) -> int:
        """Bytes that all registers have together."""
        return struct.calcsize(f"<{self.layout}")

    def __str__(self) -> str:
        return f"{self.name} version {self.version}"

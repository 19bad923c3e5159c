"""What a program begins with, what happens in it, and what it leaves behind."""

from dataclasses import dataclass, field
from typing import NamedTuple

from transparency.layout import ROOT_A


class UnmodelledError(Exception):
    """The program does what this reference does not know."""


class FaultError(Exception):
    def __init__(self, vector: int, length: int) -> None:
        self.vector, self.length = vector, length


class Answer(NamedTuple):
    """What the handler leaves behind: RAX, RBX, RCX, RDX, and bytes at physical addresses."""

    values: tuple[int | None, ...]
    writes: tuple[tuple[int, bytes], ...] = ()


class Shown(NamedTuple):
    """What the handler of a trap has to see."""

    reason: str
    ip: int
    length: int
    width: int
    ring: int
    registers: tuple[int, ...]
    rflags: int


class Logged(NamedTuple):
    """An exception that the guest was given."""

    vector: int
    cs: int
    rip: int
    rflags: int
    dr6: int


@dataclass
class Start:
    """The state that a program begins in."""

    width: int
    ring: int
    cs: int
    ss: int
    base: int
    rip: int
    rflags: int
    registers: list[int]
    root: int = ROOT_A
    breakpoints: tuple[int, ...] = ()
    """Linear addresses."""
    af_of_shifts: int = 0
    """What the processor makes of AF, which is undefined after a shift: 0 or the flag."""


@dataclass
class End:
    """The state that a program leaves behind, and what happened in it."""

    vector: int = 0
    rip: int = 0
    rflags: int = 0
    registers: list[int] = field(default_factory=list)
    ram: bytearray = field(default_factory=bytearray)
    """From `TABLE_A` to `MEMORY_END`."""
    shown: list[Shown] = field(default_factory=list)
    log: list[Logged] = field(default_factory=list)
    fixups: list[int] = field(default_factory=list)
    steps: int = 0

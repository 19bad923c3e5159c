"""One package for each architecture of a guest, and the table of those that are known."""

from typing import Any, Final

from vmibridge.errors import UnknownArchitectureError
from vmibridge.vm.arch.architecture import Architecture
from vmibridge.vm.arch.x86.description import X86

ARCHITECTURES: Final[tuple[Architecture[Any], ...]] = (X86,)
"""Each version of each one. Of one architecture the newest version is first: what is made here has
that one."""


# A policy asks for the address space of each trap, and with it for the architecture.
_BY_REGISTERS: Final[dict[type, Architecture[Any]]] = {
    each.registers: each for each in reversed(ARCHITECTURES)
}


def architecture_of(registers: object) -> Architecture[Any]:
    """The architecture whose registers these are. Raises `TypeError` for what are none."""
    kind = type(registers)
    found = _BY_REGISTERS.get(kind)
    if found is not None:
        return found
    for each in ARCHITECTURES:
        if each.registers is kind:
            return each
    raise TypeError(f"{kind.__name__} is the registers of no architecture")


def architecture_named(name: str, version: int) -> Architecture[Any]:
    """The architecture that a peer or a file names.

    Raises `UnknownArchitectureError`, whose message quotes the name in ASCII, for one that this
    vmibridge does not know, or not in this version.
    """
    known = [each for each in ARCHITECTURES if each.name == name]
    for each in known:
        if each.version == version:
            return each
    raise UnknownArchitectureError(
        f"architecture {name!a} version {version} is not known here: this vmibridge knows"
        f" {', '.join(map(str, known or ARCHITECTURES))}"
    )

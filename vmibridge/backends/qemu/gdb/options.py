"""The options of a `qemu-gdb:` spec."""

from pathlib import Path
from typing import Annotated, Literal

import msgspec

from vmibridge.backends.qemu.gdb.sites import listed_sites, sites_of
from vmibridge.errors import BackendSpecError
from vmibridge.vm.spec import parse_options

_NUMBERS = {"site": "an address", "ud-handler": "an address"}
_LISTS = ("site", "symbol")
MAX_HARDWARE = 4
"""The debug registers of an x86 processor."""


class QemuGdbOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The options of a `qemu-gdb:` spec."""

    site: tuple[int, ...] = ()
    """Virtual addresses of trap instructions, prefixes included."""
    symbol: tuple[str, ...] = ()
    """The same by their names in `elf`."""
    elf: str = ""
    ud_handler: int | None = msgspec.field(default=None, name="ud-handler")
    """Virtual address of the first instruction of the guest's #UD handler: under TCG it meets
    every VMCALL and VMMCALL."""
    breakpoints: Literal["auto", "software", "hardware"] = "auto"
    """`auto` takes hardware's with KVM, where software's change the guest's memory."""
    qmp: str = ""
    """The unix socket of QEMU's monitor, which tells of resets."""
    stop_log: str = msgspec.field(default="", name="stop-log")
    """The file of QEMU's log, so that a `stop` by QMP in a trap is not lost."""
    leave: Literal["native", "skip", "wait"] = "native"
    """What a trap does when the run has ended and no host is there."""
    ram: str = ""
    """The file in which QEMU keeps guest memory and shares it."""
    sites: str = ""
    """A file of sites: an address a line."""
    within: Annotated[float, msgspec.Meta(ge=0, le=3600)] = 0.0
    """Seconds that QEMU may take until it listens."""


def parse_spec(where: str, options: str) -> tuple[QemuGdbOptions, list[int]]:
    """The options, and the addresses of all sites. Raises `BackendSpecError`."""
    spec = f"qemu-gdb:{where}"
    kind, _, place = where.partition(":")
    host, _, port = place.rpartition(":")
    if not (kind == "unix" and place) and not (kind == "tcp" and host and port.isdecimal()):
        raise BackendSpecError(
            "qemu-gdb: needs a socket, as in qemu-gdb:unix:/run/gdb.sock or qemu-gdb:tcp:::1:1234"
        )
    given = parse_options(spec, options, QemuGdbOptions, _NUMBERS, _LISTS, ("within",))
    elf = Path(given.elf) if given.elf else None
    sites = sites_of(spec, list(given.site), elf, list(given.symbol))
    if given.sites:
        sites = list(dict.fromkeys([*sites, *listed_sites(spec, Path(given.sites))]))
    if given.ud_handler is not None and not 0 <= given.ud_handler < 1 << 64:
        raise BackendSpecError(f"{spec}: ud-handler={given.ud_handler:#x} is not an address")
    if given.leave == "skip" and not sites:
        raise BackendSpecError(f"{spec}: leave=skip needs sites: without them no code is known")
    if not sites and given.ud_handler is None:
        raise BackendSpecError(
            f"{spec}: needs a site=ADDRESS, a symbol=NAME, sites=FILE, or ud-handler=ADDRESS"
        )
    return given, sites

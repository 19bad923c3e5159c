"""How a VM is left without a host, and what the next host finds.

| leave | a trap without a host | what stays in the VM |
|---|---|---|
| native | as the processor has it: VMCALL and VMMCALL raise #UD under TCG | nothing |
| skip | VMCALL, VMMCALL do nothing; CPUID is the processor's | a byte of a site (`skipping`) |
| wait | stops the VM until a host comes | the breakpoints |
"""

import logging
from collections.abc import Callable, Iterable

from vmibridge.backends.qemu.gdb import commands
from vmibridge.backends.qemu.gdb.client import GdbClient
from vmibridge.backends.qemu.gdb.memory import QemuMemory
from vmibridge.backends.qemu.gdb.skipping import patch_of, unpatched
from vmibridge.errors import BackendError
from vmibridge.vm.arch.x86.instruction import MAX_INSTRUCTION, decode_trap

log: logging.Logger = logging.getLogger(__name__)

_WIDTHS = 64, 32

Change = Callable[[bytes], tuple[int, bytes] | None]
"""Of the code at a site: where to write, and what; `None` where another code is."""


async def skip_sites(
    vm: str, client: GdbClient, memory: QemuMemory, sites: Iterable[int], threads: Iterable[str]
) -> None:
    """Make the hypercalls at the sites do nothing, in whatever address space a vCPU is in now.

    Logs the sites that are in none of them. Raises `ClientLostError`.
    """
    missing = await _change(client, memory, sites, threads, _skip)
    if missing:
        log.warning(
            "vm %s: no trap at %s in the address space of any vCPU now:"
            " what runs there later is not skipped",
            *(vm, ", ".join(f"{address:#x}" for address in missing)),
        )


async def restore_sites(
    client: GdbClient, memory: QemuMemory, sites: Iterable[int], threads: Iterable[str]
) -> None:
    """Undo it, as far as the sites are mapped now. Raises `ClientLostError`."""
    await _change(client, memory, sites, threads, _restore)


def _skip(code: bytes) -> tuple[int, bytes] | None:
    for width in _WIDTHS:
        if (found := decode_trap(code, width)) is not None:
            patch = patch_of(*found)
            return (0, b"") if patch is None else (patch.offset, patch.skip)
        if unpatched(code, width) is not None:
            return 0, b""
    return None


def _restore(code: bytes) -> tuple[int, bytes] | None:
    for width in _WIDTHS:
        before = unpatched(code, width)
        found = None if before is None else decode_trap(before, width)
        if found is not None and (patch := patch_of(*found)) is not None:
            return patch.offset, patch.trap
    return None


async def _change(
    client: GdbClient,
    memory: QemuMemory,
    sites: Iterable[int],
    threads: Iterable[str],
    change: Change,
) -> list[int]:
    left = list(sites)
    for thread in threads:
        if not left:
            break
        await client.ask_all([commands.select(thread)], probe=True)
        for address in list(left):
            found = change(await memory.read_code(address, MAX_INSTRUCTION))
            if found is None:
                continue
            offset, data = found
            if data:
                write = commands.write_memory(address + offset, data)
                await client.ask_all([*memory.virtual(), write], probe=True)
            left.remove(address)
    return left


def check_status(vm: str, text: str) -> None:
    """Log in what state a VM was found, if that is not a usual one.

    `text` is that of `info status`. Raises `BackendError` for a VM that cannot go on.
    """
    status = text.partition("(")[2].partition(")")[0]
    if status in ("shutdown", "internal-error"):
        raise BackendError(
            f"the VM has status {status!r} and cannot go on:"
            " reset it by QMP (system_reset), or start QEMU again"
        )
    if status == "debug":
        log.warning(
            "vm %s: found at a breakpoint (status 'debug'): its last host or debugger was killed,"
            " or has left it to wait. Its breakpoints are removed; it continues with this run, and"
            " a trap that was not answered comes again",
            vm,
        )
    elif status not in ("", "prelaunch"):
        log.warning("vm %s: found with status %r: it continues with this run", vm, status)

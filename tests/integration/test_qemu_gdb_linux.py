"""Programs in a Linux guest that call by each instruction, by breakpoints and without the plugin.

CPUIDs are sites, found in the programs' files; VMCALL and VMMCALL come by the kernel's handler
of undefined instructions.
"""

from collections import Counter

import anyio
import pytest
from elftools.elf.elffile import ELFFile
from linux_guest import LIMIT, LinuxGuest, built_guest, exchange

pytestmark = [pytest.mark.anyio, pytest.mark.no_cover]

COUNT = 10
CALLERS = {(3, 64), (3, 32)}


@pytest.fixture(scope="module")
def folder():
    return built_guest()


def cpuids(program):
    """The addresses of all CPUIDs of a program."""
    found = []
    with program.open("rb") as file:
        text = ELFFile(file).get_section_by_name(".text")
        code, base = text.data(), text["sh_addr"]
    at = code.find(b"\x0f\xa2")
    while at >= 0:
        found.append(base + at)
        at = code.find(b"\x0f\xa2", at + 1)
    return found


@pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": False})], ids=["asyncio"])
async def test_programs_call_by_each_instruction(any_qemu, plugin, folder, tmp_path):
    sites = cpuids(folder / "calls-x64") + cpuids(folder / "calls-x86")
    assert sites
    linux = LinuxGuest(any_qemu, plugin, folder, tmp_path)
    with anyio.fail_after(LIMIT):
        boot = await linux.boot_with_breakpoints("user", exchange(), sites, count=COUNT)
    assert boot.lines[-1] == "all right", boot.lines
    events = [outcome.event for outcome in boot.outcomes]
    assert {(event.reason.value, event.ring, event.width) for event in events} == {
        (reason, *caller) for reason in ("cpuid", "vmcall", "vmmcall") for caller in CALLERS
    }
    outcomes = Counter(outcome.kind.value for outcome in boot.outcomes)
    assert outcomes.keys() <= {"handled", "waiting"}
    assert outcomes["handled"] >= 6 * COUNT

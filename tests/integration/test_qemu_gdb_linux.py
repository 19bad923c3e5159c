"""Programs in a Linux guest that call by each instruction, by breakpoints and without the plugin.

CPUIDs are sites, found in the programs' files; VMCALL and VMMCALL come by the kernel's handler
of undefined instructions.
"""

from collections import Counter

import anyio
import pytest
from children import opened
from elftools.elf.elffile import ELFFile
from linux_guest import LinuxGuest, built_guest, exchange, told
from needs import needs

from vmibridge import Bridge, BridgeServer, open_backend

pytestmark = pytest.mark.anyio

COUNT = 10
CALLERS = {(3, 64), (3, 32)}


@pytest.fixture(scope="module")
def folder():
    return built_guest()


@pytest.fixture(params=["system", "new"])
def any_qemu(request):
    if request.param == "new":
        return request.getfixturevalue("qemu")
    return needs("qemu-system-x86_64")


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
    with anyio.fail_after(60):
        first = await linux.boot_alone("symbols", kernel="nokaslr")
    (address,) = [line.split()[0] for line in first.lines if "asm_exc_invalid_op" in line]
    options = "&".join(f"site={address:#x}" for address in sites) + f"&ud-handler=0x{address}"
    stub = tmp_path / "s"
    arms = ("-S", "-gdb", f"unix:{stub},server=on,wait=off")
    command = linux.command("user", *arms, count=COUNT, kernel="nokaslr")
    seen, outcomes, said = set(), Counter(), b""
    with anyio.fail_after(200):
        async with opened(command) as process:
            while not stub.exists():
                await anyio.sleep(0.01)
            async with open_backend(f"qemu-gdb:unix:{stub}?{options}") as backend:
                server = BridgeServer(backend, Bridge(exchange()), timeout=30)
                async for outcome in server.run():
                    event = outcome.event
                    seen.add((event.reason.value, event.ring, event.width))
                    outcomes[outcome.kind.value] += 1
            async for part in process.stdout:
                said += part
    lines = told(said)
    assert lines[-1] == "all right", lines
    assert seen == {
        (reason, *caller) for reason in ("cpuid", "vmcall", "vmmcall") for caller in CALLERS
    }
    assert outcomes.keys() <= {"handled", "waiting"}
    assert outcomes["handled"] >= 6 * COUNT

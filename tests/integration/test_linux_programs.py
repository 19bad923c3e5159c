"""Programs of a real Linux whose traps are where a translator may mistake them.

They are `guests/programs.c`.

| program | what is unusual |
|---|---|
| pie | twenty runs, each at another address: the kernel randomises position-independent programs |
| linked | a shared library, in three processes at once, at an address of its own in each |
| stepped | a debugger steps over the traps by ptrace |
| swapped | a page at two addresses in two processes; a signal handler swaps them, and calls, too |

Breakpoints have to know the address of a CPUID: `pie` and `linked`, which are anywhere, make
hypercalls alone, and the others are where they were linked. A 32-bit program is
among those of test_linux_guest.py and test_qemu_gdb_linux.py.
"""

import sys
from pathlib import Path

import anyio
import pytest
from children import run
from elftools.elf.elffile import ELFFile
from linux_guest import LIMIT, LinuxGuest, built_guest
from needs import needs

from vmibridge import BridgeHandler, BridgeResponse
from vmibridge.bridge.contract import STANDARD_MAGIC

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": False})], ids=["asyncio"]),
]

PROGRAMS = Path(__file__).parent / "guests/programs.c"
MASK64 = (1 << 64) - 1
RUNS, LINKED = 20, 3
RIGHT = [*["pie right"] * RUNS, *["linked right"] * LINKED, "stepped right", "swapped right"]
INIT = f"""#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
for i in $(/bin/busybox seq {RUNS}); do /bin/programs pie || echo "vmibridge: ended by $?"; done
for i in $(/bin/busybox seq {LINKED}); do /bin/linked & done
wait
/bin/fixed stepped || echo "vmibridge: ended by $?"
/bin/fixed swapped || echo "vmibridge: ended by $?"
/bin/busybox poweroff -f
"""


class Witness(BridgeHandler[None]):
    """Each trap says in value1 where it is."""

    MAGIC, REQUEST = STANDARD_MAGIC, 0x0100

    def __init__(self):
        self.events = []
        self.wrong = []

    async def handle(self, vmi, packet):
        self.events.append(vmi.event)
        if vmi.event.ip != packet.value1:
            self.wrong.append((vmi.event, packet.value1))
        return BridgeResponse(~packet.value1 & MASK64)


def gcc(*arguments):
    run([needs("gcc"), "-O1", "-Wall", "-Wextra", "-Werror", *arguments], check=True)


def found(name):
    """A file of the C library that gcc links to."""
    return run([needs("gcc"), f"-print-file-name={name}"], check=True).stdout.strip()


def symbol(program, name):
    with program.open("rb") as file:
        (found,) = ELFFile(file).get_section_by_name(".symtab").get_symbol_by_name(name)
    return found["st_value"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A kernel, and an initramfs with the programs."""
    made, base = tmp_path_factory.mktemp("linux"), built_guest()
    (made / "init").write_text(INIT)
    library = made / "libcall.so"
    gcc("-fPIE", "-static-pie", "-o", made / "programs", PROGRAMS)
    gcc("-static", "-no-pie", "-o", made / "fixed", PROGRAMS)
    gcc("-shared", "-fPIC", "-DLIBRARY", "-Wl,-soname,libcall.so", "-o", library, PROGRAMS)
    gcc("-DLINKED", "-Wl,-rpath,/lib", "-o", made / "linked", PROGRAMS, library)
    files = {
        "init": made / "init",
        "bin/busybox": base / "busybox",
        "bin/programs": made / "programs",
        "bin/fixed": made / "fixed",
        "bin/linked": made / "linked",
        "lib/libcall.so": library,
        "lib/libc.so.6": found("libc.so.6"),
        "lib64/ld-linux-x86-64.so.2": found("ld-linux-x86-64.so.2"),
    }
    pairs = [f"{name}={file}" for name, file in files.items()]
    run(
        [sys.executable, "-m", "vmibridge.backends.qemu.initramfs", made / "initrd", *pairs],
        check=True,
    )
    (made / "vmlinuz").symlink_to(base / "vmlinuz")
    return made


@pytest.mark.parametrize("cpus", [1, 2])
async def test_each_trap_is_of_the_code_that_runs(folder, qemu, plugin, tmp_path, cpus):
    witness = Witness()
    with anyio.fail_after(LIMIT):
        boot = await LinuxGuest(qemu, plugin, folder, tmp_path).boot("", witness, cpus=cpus)
    assert boot.lines == RIGHT
    assert_where_they_were(witness)
    assert all(event.flags_known for event in witness.events)


@pytest.mark.parametrize(
    "any_qemu", ["new", pytest.param("system", marks=pytest.mark.slow)], indirect=True
)
async def test_and_by_breakpoints(folder, any_qemu, plugin, tmp_path):
    witness = Witness()
    linux = LinuxGuest(any_qemu, plugin, folder, tmp_path)
    with anyio.fail_after(LIMIT):
        boot = await linux.boot_with_breakpoints(
            "", witness, [symbol(folder / "fixed", "stepped_cpuid")]
        )
    assert boot.lines == RIGHT
    assert_where_they_were(witness)


def assert_where_they_were(witness):
    assert witness.wrong == []
    # The kernel has put them somewhere else indeed.
    programs = {event.ip for event in witness.events[:RUNS]}
    libraries = {event.ip for event in witness.events[RUNS : RUNS + LINKED]}
    assert min(len(programs), len(libraries)) > 1
    swapped = {event.ip for event in witness.events} & {0x1000_0011, 0x2000_0011}
    assert len(swapped) == 2

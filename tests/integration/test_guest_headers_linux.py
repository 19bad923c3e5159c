"""Programs and the kernel of a real Linux call methods by generated headers: of every kind in C,
and in assembly and Rust those with buffers.

The buffers of the programs are pages that were never touched: the host answers with what to touch,
and the header's functions do so and ask again.
"""

import os
import shutil
import sys
from itertools import product

import anyio
import pytest
from called_methods import Called
from children import run
from guest_builds import GUESTS, INCLUDE, PROGRAMS, STRICT, build_programs, done, write_header
from linux_guest import LIMIT, SOURCES, LinuxGuest, built_guest
from needs import needs

from vmibridge import Status, StatusKind
from vmibridge.recording import Recorder, Replay

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.slow,
    pytest.mark.parametrize("anyio_backend", [("asyncio", {"use_uvloop": False})], ids=["asyncio"]),
]

CALLERS = ("user x64", "user x86", "kernel x64")
OTHERS = [f"{language}-{width}" for language, width in PROGRAMS]
RIGHT = {f"{caller} {how}: right" for caller, how in product(CALLERS, (1, 2, 3))} | {
    f"{name}: right" for name in OTHERS
}
TOTAL, FILL = 0x09, 0x0A
INIT = f"""#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
for how in 1 2 3; do /bin/called-x64 $how; /bin/called-x86 $how; done
for name in {" ".join(OTHERS)}; do
    if /bin/$name; then echo "vmibridge: $name: right"; else echo "vmibridge: $name: WRONG"; fi
done
/bin/busybox insmod /called.ko
/bin/busybox dmesg | /bin/busybox sed -n 's/^.*vmibridge: /vmibridge: /p'
/bin/busybox stty sane
/bin/busybox poweroff -f
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A kernel, and an initramfs with the programs and the module."""
    made, base = tmp_path_factory.mktemp("called"), built_guest()
    (made / "init").write_text(INIT)
    for language, name in (("c", "called.h"), ("asm", "called.inc"), ("rust", "called.rs")):
        write_header(made / name, Called, language)
    for width, name in ((64, "x64"), (32, "x86")):
        done(
            needs("gcc"), f"-m{width}", "-O2", *STRICT, f"-I{made}", f"-I{INCLUDE}", f"-I{SOURCES}",
            "-fno-stack-protector", "-fno-pie", "-fno-asynchronous-unwind-tables", "-no-pie",
            "-mgeneral-regs-only", "-nostdlib", "-static", "-Wno-unused-function",
            "-o", made / f"called-{name}", GUESTS / "called_methods_linux.c",
        )  # fmt: skip
    files = {
        "init": made / "init",
        "bin/busybox": base / "busybox",
        "bin/called-x64": made / "called-x64",
        "bin/called-x86": made / "called-x86",
        "called.ko": build_module(made, base),
        **{f"bin/{name}": file for name, file in build_programs(made).items()},
    }
    pairs = [f"{name}={file}" for name, file in files.items()]
    run(
        [sys.executable, "-m", "vmibridge.backends.qemu.initramfs", made / "initrd", *pairs],
        check=True,
    )
    (made / "vmlinuz").symlink_to(base / "vmlinuz")
    return made


def build_module(made, base):
    """By the kernel's own build, as guest/linux/build-guest does."""
    module = made / "module"
    module.mkdir()
    (module / "Kbuild").write_text("obj-m := called.o\n")
    shutil.copy(GUESTS / "called_methods_module.c", module / "called.c")
    for header in (GUESTS / "called_methods.h", made / "called.h", INCLUDE / "vmibridge.h"):
        shutil.copy(header, module)
    library = base / "root/usr/lib/x86_64-linux-gnu"
    built = run(
        [
            needs("make"), "-s", "-C", f"{base / 'headers'}/", f"M={module}", "CC=gcc",
            "CONFIG_DEBUG_INFO_BTF_MODULES=", "KCFLAGS=-Werror", "modules",
        ],
        env={**os.environ, "LD_LIBRARY_PATH": str(library)},
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    return module / "called.ko"


async def test_programs_and_the_kernel_call_by_the_header(folder, qemu, plugin, tmp_path):
    path = tmp_path / "run.mcap"
    with anyio.fail_after(LIMIT):
        async with Recorder(path) as recorder:
            linux = LinuxGuest(qemu, plugin, folder, tmp_path)
            boot = await linux.boot("", Called(), {"taps": [recorder]})
        assert set(boot.lines) == RIGHT, boot.lines
        touched = {
            (outcome.event.ring, outcome.event.width, outcome.packet.method)
            for outcome in boot.outcomes
            if outcome.response.value1 is not None
            and Status.decode(outcome.response.value1).kind == StatusKind.TOUCH
        }
        # The kernel's memory is there, and that of programs is not until it is touched.
        assert touched >= {(3, width, method) for width in (64, 32) for method in (TOTAL, FILL)}
        assert {ring for ring, _, _ in touched} == {3}
        async with Replay(path, Called()) as replay:
            result = await replay.run()
    assert result.compared > 0
    assert result.different == 0

"""vmibridge_device.h: what compiles it, and guests that call by it in QEMU, on both carriers."""

from functools import partial

import anyio
import pytest
from base_handlers import StandardHandler
from called_methods import Called
from children import run, run_beside
from device_guests import RIGHT, WRONG, CallingMachine, build_device_guest
from guest_builds import GUESTS, INCLUDE, STRICT, done, write_header
from linux_guest import exchange
from needs import needs

from vmibridge import BridgeResponse, TrapReason, method

HEADER = INCLUDE / "vmibridge_device.h"
SYSFS, DRIVER = INCLUDE / "vmibridge_sysfs.h", INCLUDE / "vmibridge_driver.h"
slow = pytest.mark.slow
# What differs between the loops is tested without a VM.
on_asyncio = pytest.mark.parametrize(
    "anyio_backend", [("asyncio", {"use_uvloop": False})], ids=["asyncio"]
)


@pytest.mark.parametrize("width", [64, 32])
@pytest.mark.parametrize(
    ("compiler", "language"),
    [
        ("gcc", "c11"),
        pytest.param("g++", "c++11", marks=slow),
        pytest.param("clang", "c11", marks=slow),
        pytest.param("clang++", "c++11", marks=slow),
    ],
)
def test_it_compiles_without_a_warning(tmp_path, compiler, language, width):
    kind = "c" if language == "c11" else "c++"
    for level in ("-O0", "-Os"):
        done(
            needs(compiler), f"-std={language}", level, *STRICT, f"-m{width}", "-x", kind, "-c",
            "-include", HEADER, "/dev/null", "-o", tmp_path / "header.o",
        )  # fmt: skip


@slow
@pytest.mark.parametrize("processor", ["x86_64", "i686"])
def test_and_for_windows(tmp_path, processor):
    done(
        needs(f"{processor}-w64-mingw32-gcc"), "-std=c11", "-O2", *STRICT, "-x", "c", "-c",
        "-include", HEADER, "/dev/null", "-o", tmp_path / "header.o",
    )  # fmt: skip


@slow
@pytest.mark.parametrize(
    ("processor", "entry"), [("x86_64", "DriverEntry"), ("i686", "_DriverEntry@8")]
)
def test_a_driver_of_windows_is_linked_to_its_kernel_alone(tmp_path, processor, entry):
    """It is not run: there is no Windows here."""
    warnings = [each for each in STRICT if each != "-Wpedantic"]
    done(
        needs(f"{processor}-w64-mingw32-gcc"), "-std=c11", "-O2", *warnings, f"-I{INCLUDE}",
        "-isystem", "/usr/share/mingw-w64/include/ddk", "-shared", "-nostdlib",
        "-Wl,--subsystem,native", f"-Wl,--entry,{entry}", "-o", tmp_path / "device.sys",
        GUESTS / "device_windows.c", "-lntoskrnl", "-lhal",
    )  # fmt: skip
    listed = run([needs("objdump"), "-p", tmp_path / "device.sys"], check=True).stdout
    libraries = {line.split()[-1] for line in listed.splitlines() if "DLL Name" in line}
    assert libraries == {"ntoskrnl.exe", "HAL.dll"}


@pytest.mark.parametrize(
    ("compiler", "language"), [("gcc", "gnu11"), pytest.param("g++", "gnu++11", marks=slow)]
)
@pytest.mark.parametrize("header", [SYSFS, DRIVER], ids=["sysfs", "driver"])
def test_those_of_linux_programs_compile_with_a_c_library(tmp_path, header, compiler, language):
    warnings = [each for each in STRICT if each != "-ffreestanding"]
    done(
        needs(compiler), f"-std={language}", "-O2", *warnings,
        "-x", "c" if compiler == "gcc" else "c++", "-c",
        "-include", header, "/dev/null", "-o", tmp_path / "header.o",
    )  # fmt: skip


@pytest.fixture(params=["ivshmem-system", pytest.param("ivshmem-new", marks=slow), "vfio-user-new"])
def calling(request, tmp_path):
    """`calling(kernel=0)`: a machine of each carrier; vfio-user is in new QEMUs only."""
    carrier, _, which = request.param.rpartition("-")
    is_new = which == "new"
    qemu = request.getfixturevalue("qemu") if is_new else needs("qemu-system-x86_64")
    return partial(CallingMachine, qemu, tmp_path, carrier)


CALLS = {
    "64": {"SPACE": "IN_SLOT"},
    "32": {"SPACE": "IN_SLOT", "width": 32},
    "ring-3": {"SPACE": "IN_SLOT", "USER": 1, "SLOT": 7},
    "halts": {"SPACE": "IN_SLOT", "INTERRUPT": 1, "SLOT": 5},
    "kernel": {"SPACE": "OWN", "SLOT": 1},
    "physical": {"SPACE": "PHYSICAL"},
    "kernel-32": {"SPACE": "OWN", "width": 32},
}


@pytest.mark.anyio
@on_asyncio
@pytest.mark.parametrize(
    "form", [each if each == "kernel" else pytest.param(each, marks=slow) for each in CALLS]
)
async def test_a_guest_without_a_system_calls_and_checks_every_answer(calling, tmp_path, form):
    given = CALLS[form]
    is_kernel = given["SPACE"] != "IN_SLOT"
    machine = calling(kernel=2 if is_kernel else 0)
    image = build_device_guest(tmp_path, "device_calls", COUNT=300, **given)
    assert await machine.run(exchange(), image) == (RIGHT, "")
    assert machine.outcomes["handled"] == 5 + 300 + 2
    assert set(machine.outcomes) <= {"handled", "waiting"}
    event = machine.events[-1]
    assert (event.vcpu, event.ring) == (given.get("SLOT", 0), 0 if is_kernel else 3)
    assert (event.reason, event.width) == (TrapReason.DEVICE, given.get("width", 64))
    assert machine.ends == [(event.vcpu, "halted")]


@pytest.mark.anyio
@on_asyncio
async def test_a_guest_in_assembly_calls_by_the_include(calling, build_guest):
    machine = calling()
    image = build_guest("device_inc", COUNT=300)
    assert await machine.run(exchange(), image) == (RIGHT, "")
    assert (machine.outcomes, machine.ends[0][1]) == ({"handled": 300}, "halted")


@slow
@pytest.mark.anyio
@on_asyncio
@pytest.mark.parametrize("machine_type", ["pc", "microvm,pcie=on"])
async def test_on_other_machines(calling, tmp_path, machine_type):
    machine = calling()
    defines = {"SPACE": "IN_SLOT", "COUNT": 300}
    if machine_type != "pc":
        # There is no firmware that would assign BARs.
        defines |= {"ECAM": "0xe0000000", "ASSIGN": "0xc0000000"}
    image = build_device_guest(tmp_path, "device_calls", **defines)
    assert await machine.run(exchange(), image, machine=machine_type) == (RIGHT, "")


@pytest.mark.anyio
@on_asyncio
async def test_a_guest_without_the_device_finds_none(qemu, tmp_path):
    machine = CallingMachine(qemu, tmp_path)
    image = build_device_guest(tmp_path, "device_calls", SPACE="NONE")
    ended = await run_beside(machine.command(image, device=False))
    assert (ended.returncode, ended.stdout.strip()) == (WRONG, b"no device")


class Patient(StandardHandler):
    """For `device_states.c`."""

    def __init__(self):
        self.counted = self.hung = self.cancelled = 0
        self.hangs_now = anyio.Event()

    @method(1)
    async def answers(self, vmi, packet):
        return BridgeResponse(packet.value1 + packet.value2)

    @method(2)
    async def hangs(self, vmi, packet):
        self.hung += 1
        self.hangs_now.set()
        try:
            await anyio.sleep_forever()
        finally:
            self.cancelled += 1

    @method(3)
    async def counts(self, vmi, packet):
        self.counted += 1
        return BridgeResponse(self.counted)


@pytest.mark.anyio
@on_asyncio
async def test_a_call_that_does_not_end_well_says_how(calling, tmp_path):
    machine, handler = calling(), Patient()
    image = build_device_guest(tmp_path, "device_states")
    assert await machine.run(handler, image) == (RIGHT, "")
    assert handler.cancelled == handler.hung


@pytest.mark.anyio
@on_asyncio
async def test_a_guest_sees_that_its_host_has_stopped(calling, tmp_path):
    machine, handler = calling(), Patient()
    image = build_device_guest(tmp_path, "device_states", GONE=1)
    assert await machine.run(handler, image, stop=handler.hangs_now) == (RIGHT, "")


@pytest.mark.anyio
@on_asyncio
@pytest.mark.parametrize("width", [64, pytest.param(32, marks=slow)])
@pytest.mark.parametrize("space", ["IN_SLOT", pytest.param("OWN", marks=slow)])
async def test_methods_are_called_by_generated_headers(calling, tmp_path, width, space):
    """With addresses of the kernel's own, and with buffers that go through the slot."""
    write_header(tmp_path / "called.h", Called, "c")
    machine = calling(kernel=0 if space == "IN_SLOT" else 1)
    image = build_device_guest(
        tmp_path, "device_headers", "-Wno-unused-function", width=width, SPACE=space
    )
    assert await machine.run(Called(), image) == (RIGHT, "")

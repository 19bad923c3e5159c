"""The guest's C header, compiled in all its forms and run in guests that check every answer."""

import shutil
from itertools import product
from pathlib import Path

import pytest
from base_handlers import StandardHandler
from children import run
from flipping_host import FlippingHost
from needs import needs

from vmibridge import (
    Bridge,
    BridgeResponse,
    BridgeServer,
    Gate,
    OutcomeKind,
    method,
    open_backend,
)
from vmibridge.engine.handshake import Feature, Host, HostInfo

pytestmark = pytest.mark.anyio

INCLUDE = Path(__file__).parents[2] / "guest/include"
GUEST = Path(__file__).parent / "guests/c_header.c"
COMPILERS = ["gcc", *(["clang"] if shutil.which("clang") else [])]

CPUID, VMCALL, VMMCALL = 1, 2, 3
FORMS = {
    f"{form}-{name}": (width, how)
    for (form, width), (name, how) in product(
        {"x64": 64, "x86": 32}.items(),
        {"cpuid": CPUID, "vmcall": VMCALL, "vmmcall": VMMCALL}.items(),
    )
}
every_form = pytest.mark.parametrize(("width", "how"), FORMS.values(), ids=FORMS)

BASIC = "-std=c11 -Wall -Wextra -Wpedantic -Werror -ffreestanding"
LEVELS = ("-O0", "-O2", "-Os")
FRAMES = ("", "-fPIC", "-fomit-frame-pointer", "-fno-omit-frame-pointer -fPIC")
HANDLED, WAITING, UNMATCHED = OutcomeKind.HANDLED, OutcomeKind.WAITING, OutcomeKind.UNMATCHED
PASSED, NO_SELF_TEST, SLEEPS = 0x600D, 38, 9


def compile_c(*arguments, compiler="gcc"):
    done = run([needs(compiler), *BASIC.split(), f"-I{INCLUDE}", *arguments])
    assert (done.returncode, done.stderr) == (0, ""), done.stderr


@pytest.fixture(scope="session")
def build(tmp_path_factory):
    """`build(WIDTH, HOW, flags)` gives the path of a flat image of `c_header.c`."""
    folder = tmp_path_factory.mktemp("c")
    built = {}

    def build_image(width, how, flags="-O2"):
        key = (width, how, flags)
        if key not in built:
            linked = folder / f"{len(built)}.elf"
            built[key] = linked.with_suffix(".bin")
            compile_c(
                *(f"-m{width}", f"-DHOW={how}", *flags.split(), "-mgeneral-regs-only"),
                *("-fno-stack-protector", "-fno-asynchronous-unwind-tables"),
                *("-nostdlib", "-static", "-no-pie", f"-Wl,-T,{INCLUDE}/flat.ld"),
                *("-o", str(linked), str(GUEST)),
            )
            run([needs("objcopy"), "-O", "binary", linked, built[key]], check=True)
        return built[key]

    return build_image


class Work(StandardHandler):
    def __init__(self):
        self.packets = []

    @method(1)
    async def mix(self, vmi, packet):
        self.packets.append(packet)
        return BridgeResponse(packet.value1 - packet.value2, 2 * packet.value1)

    @method(2)
    async def gate(self, vmi, packet):
        """Open at attempt value1, counted by value2."""
        is_open = packet.value2 == packet.value1
        return BridgeResponse(Gate.CONTINUE, 0x77) if is_open else BridgeResponse(Gate.WAIT)

    @method(3)
    async def aborts(self, vmi, packet):
        return BridgeResponse(Gate.ABORT)

    @method(4)
    async def waits(self, vmi, packet):
        return BridgeResponse(Gate.WAIT)


INFO = HostInfo(
    features=Feature.WAIT | Feature.QUOTA,
    soft_timeout=0.25,
    timeout=float("inf"),
    result_timeout=30.0,
    in_flight=17,
)


STAMPS = Host(INFO).contract


class Flips(FlippingHost):
    """Answers echoes with one bit of one register wrong; puts the stamps there itself."""

    VERIFY_VALUE3 = VERIFY_VALUE4 = None

    async def handle(self, vmi, packet):
        echo = packet.method >= 0x0010
        if echo and self.side == "request":
            packet = self.flip(packet)
        answer = STAMPS.stamp(await super().handle(vmi, packet))
        return self.flip(answer) if echo and self.side == "answer" else answer


async def run_guest(image, width, *handlers):
    """Run it: what it ended with, and the outcomes."""
    async with open_backend(f"unicorn:{image}?width={width}") as backend:
        server = BridgeServer(backend, Bridge(*handlers), handshake=False)
        outcomes = [outcome async for outcome in server.run()]
    (end,) = server.summary.guest.vcpus
    assert end.reason == "halted", end.detail
    registers = end.registers
    high = registers["rax"] >> 32 if width == 64 else registers["rdx"]
    return registers["rax"] & 0xFFFF_FFFF, high, outcomes


@every_form
@pytest.mark.parametrize("flags", ["-O0", "-O2 -fPIC -fomit-frame-pointer", "-Os"])
async def test_a_guest_finds_all_as_it_is_documented(build, width, how, flags):
    work = Work()
    end, slept, outcomes = await run_guest(build(width, how, flags), width, Host(INFO), work)
    assert (end, slept) == (PASSED, SLEEPS)
    assert {(outcome.event.width, outcome.kind) for outcome in outcomes} == {
        (width, HANDLED),
        (width, UNMATCHED),
    }
    assert [(packet.value1, packet.value2) for packet in work.packets] == [(70, 20)]


@every_form
async def test_a_hypercall_has_the_signature_of_xen(build, width, how):
    _, _, outcomes = await run_guest(build(width, how), width, Host(INFO), Work())
    names = ("rax", "rdi", "rsi") if width == 64 else ("rax", "rbx", "rcx")
    registers = [outcome.event.registers for outcome in outcomes]
    signatures = {tuple(getattr(each, name) for name in names) for each in registers}
    assert (signatures == {(0x22, 0x18, 0)}) == (how != CPUID)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@every_form
@pytest.mark.parametrize("bit", [0, 31])
@pytest.mark.parametrize("value", ["value1", "value2", "value3", "value4"])
@pytest.mark.parametrize("side", ["request", "answer"])
@pytest.mark.no_cover
async def test_the_self_test_finds_a_bit_that_is_wrong(build, width, how, side, value, bit):
    end, _, _ = await run_guest(build(width, how), width, Flips(INFO, side, value, bit))
    assert end == NO_SELF_TEST


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("width", [64, 32])
@pytest.mark.parametrize(("level", "frame"), list(product(LEVELS, FRAMES)))
def test_it_compiles_without_warnings(tmp_path, compiler, width, level, frame):
    """A source that uses nothing of it, and one that uses all."""
    lone = tmp_path / "lone.c"
    lone.write_text('#include "vmibridge.h"\n#include "vmibridge.h"\nextern int nothing;\n')
    for source in (lone, GUEST):
        flags = (f"-m{width}", level, *frame.split(), "-DHOW=VMIBRIDGE_VMCALL")
        compile_c(*flags, "-Wshadow", "-c", "-o", "/dev/null", str(source), compiler=compiler)

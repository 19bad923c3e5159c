"""Guests in C, C++, assembly and Rust call methods of every kind by headers made of a handler."""

from itertools import product

import pytest
from called_methods import Called
from guest_builds import (
    GUESTS,
    INCLUDE,
    RUST_WIDTHS,
    STRICT,
    build_asm,
    build_c,
    build_rust,
    done,
    write_header,
)
from needs import needs
from remote_parts import carry, served

from vmibridge import (
    Bridge,
    BridgeResponse,
    BridgeServer,
    OutcomeKind,
    Status,
    StatusKind,
    TrapReason,
    open_backend,
)
from vmibridge.engine.settings import ServerSettings
from vmibridge.recording import Recorder, Replay

pytestmark = pytest.mark.anyio
# What differs between the loops is not in the guest.
on_asyncio = pytest.mark.parametrize("anyio_backend", ["asyncio"])

REASONS = {1: TrapReason.CPUID, 2: TrapReason.VMCALL, 3: TrapReason.VMMCALL}
every_form = pytest.mark.parametrize(
    ("width", "how"),
    list(product((64, 32), REASONS)),
    ids=[f"x{width}-{REASONS[how].value}" for width, how in product((64, 32), REASONS)],
)
PASSED = 0x600D
LANGUAGES = {"c": "called.h", "asm": "called.inc", "rust": "called.rs"}


@pytest.fixture
def folder(tmp_path):
    for language, name in LANGUAGES.items():
        write_header(tmp_path / name, Called, language)
    return tmp_path


async def run_guest(image, width, handler, **settings):
    """What it ended with, and the outcomes. A busy machine takes its time."""
    async with open_backend(f"unicorn:{image}?width={width}") as backend:
        server = BridgeServer(backend, Bridge(handler), handshake=False, timeout=600, **settings)
        outcomes = [outcome async for outcome in server.run()]
    (end,) = server.summary.guest.vcpus
    assert end.reason == "halted", end.detail
    return end.registers["rax"] & 0xFFFF_FFFF, outcomes


async def passes(image, width, how):
    ended, outcomes = await run_guest(image, width, Called())
    assert ended == PASSED, f"the check of line {ended}"
    seen = {(outcome.event.width, outcome.event.reason) for outcome in outcomes}
    assert seen == {(width, REASONS[how])}
    asked = {outcome.packet.method for outcome in outcomes if outcome.packet.request == 0x0120}
    assert asked == set(Called.methods)


@every_form
@on_asyncio
async def test_a_guest_in_c(folder, width, how):
    source = GUESTS / "called_methods.c"
    await passes(build_c(folder, source, width, how, "-O2", compiler="gcc"), width, how)


@every_form
async def test_a_guest_in_assembly(folder, width, how):
    await passes(build_asm(folder, GUESTS / "called_methods.asm", width, how), width, how)


@pytest.mark.parametrize("width", [64, 32])
async def test_a_guest_is_recorded_and_replayed(folder, tmp_path, width):
    path = tmp_path / "run.mcap"
    image = build_asm(folder, GUESTS / "called_methods.asm", width, 2)
    async with Recorder(path) as recorder:
        ended, _ = await run_guest(image, width, Called(), taps=[recorder])
    assert ended == PASSED, f"the check of line {ended}"
    async with Replay(path, Called()) as replay:
        result = await replay.run()
    assert result.compared >= len(Called.methods)
    assert result.different == 0


async def test_a_guest_whose_handlers_are_elsewhere(folder):
    image = build_asm(folder, GUESTS / "called_methods.asm", 64, 2)
    settings = ServerSettings(timeout=600)
    async with served("tcp:127.0.0.1:0", Called(), settings=settings) as server:
        backend = open_backend(f"unicorn:{image}")
        agent, end = await carry(backend, f"tcp:127.0.0.1:{server.ports[0]}", deadline=600)
    (vcpu,) = end.vcpus
    assert vcpu.registers["rax"] == PASSED, vcpu
    assert agent.counts.traps == agent.counts.answered


@pytest.mark.slow
@every_form
@pytest.mark.parametrize("level", ["-O0", "-O1", "-O3", "-Os"])
@pytest.mark.parametrize("compiler", ["gcc", "clang"])
@on_asyncio
async def test_a_guest_in_c_at_every_level(folder, compiler, level, width, how):
    source = GUESTS / "called_methods.c"
    image = build_c(folder, source, width, how, "-std=c11", level, compiler=compiler)
    await passes(image, width, how)


@pytest.mark.slow
@every_form
@pytest.mark.parametrize("standard", ["c++11", "c++20"])
@pytest.mark.parametrize("compiler", ["g++", "clang++"])
@on_asyncio
async def test_a_guest_in_cpp(folder, compiler, standard, width, how):
    copied = folder / "called_methods.cc"
    copied.write_text((GUESTS / "called_methods.c").read_text())
    flags = (f"-std={standard}", "-O2", f"-I{GUESTS}")
    await passes(build_c(folder, copied, width, how, *flags, compiler=compiler), width, how)


@pytest.mark.slow
@pytest.mark.parametrize("width", RUST_WIDTHS)
@pytest.mark.parametrize("how", REASONS)
@pytest.mark.parametrize("level", ["0", "2", "s"])
@on_asyncio
async def test_a_guest_in_rust(folder, level, width, how):
    await passes(build_rust(folder, GUESTS / "called_methods.rs", width, how, level), width, how)


@pytest.mark.slow
@pytest.mark.parametrize("level", ["-O0", "-O2", "-Os"])
@pytest.mark.parametrize("compiler", ["x86_64-w64-mingw32-gcc", "i686-w64-mingw32-gcc"])
@on_asyncio
async def test_it_compiles_for_windows(folder, compiler, level):
    done(
        needs(compiler), "-std=c11", level, *STRICT, f"-I{INCLUDE}", f"-I{folder}",
        "-DHOW=VMIBRIDGE_VMCALL", f"-I{GUESTS}", "-c", "-o", folder / "windows.o", "-x", "c",
        GUESTS / "called_methods.h", "-Wno-unused-function",
    )  # fmt: skip


class Touchy(Called):
    """Names a page that is not present, so many times for each request."""

    def __init__(self, times):
        super().__init__()
        self.times = times
        self.asked = {}

    async def handle(self, vmi, packet):
        asked = self.asked[packet.method] = self.asked.get(packet.method, 0) + 1
        if asked <= self.times and packet.method in (TOTAL, REVERSE, TEXTS, FILL):
            status = Status(packet.method & 0xFF, StatusKind.TOUCH)
            return BridgeResponse(status.encode(), packet.value2)
        return await super().handle(vmi, packet)


TEXTS, TOTAL, FILL, REVERSE = 0x08, 0x09, 0x0A, 0x0B
PAGES = 20_000 // 4096 + 2
"""Of a buffer of the guests, at the most."""
BUILD = {
    "c": lambda folder, width: build_c(
        folder, GUESTS / "called_methods.c", width, 1, "-O2", compiler="gcc"
    ),
    "asm": lambda folder, width: build_asm(folder, GUESTS / "called_methods.asm", width, 1),
    "rust": lambda folder, width: build_rust(folder, GUESTS / "called_methods.rs", width, 1, "2"),
}
every_language = pytest.mark.parametrize(
    ("language", "width"),
    [
        *product(("c", "asm"), (64, 32)),
        *(pytest.param("rust", width, marks=pytest.mark.slow) for width in RUST_WIDTHS),
    ],
)


@every_language
@on_asyncio
async def test_a_guest_touches_its_pages_and_asks_again(folder, language, width):
    touchy = Touchy(3)
    ended, outcomes = await run_guest(BUILD[language](folder, width), width, touchy)
    assert ended == PASSED, f"the check of line {ended}"
    called = [outcome for outcome in outcomes if outcome.packet.request == Called.REQUEST]
    assert {outcome.kind for outcome in called} <= {OutcomeKind.HANDLED, OutcomeKind.WAITING}
    methods = [outcome.packet.method for outcome in called]
    for method in (TEXTS, TOTAL, FILL, REVERSE):
        again = [at for at, each in enumerate(methods) if each == method][:4]
        assert again == list(range(again[0], again[0] + 4))


@every_language
@on_asyncio
async def test_a_guest_gives_up_when_touching_is_of_no_use(folder, language, width):
    touchy = Touchy(1_000_000)
    ended, outcomes = await run_guest(BUILD[language](folder, width), width, touchy)
    # The texts are what it asks for first, which have a page or two each, and maybe a block.
    assert ended != PASSED
    assert outcomes[-1].packet.method == TEXTS
    assert 9 <= touchy.asked[TEXTS] <= 9 + 3 * 2 + 2

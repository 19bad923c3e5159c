"""Guests for the tests: assembled from their sources, once per form."""

from collections.abc import Callable
from pathlib import Path

import pytest
from children import run
from needs import needs
from qemu_machine import Machine

from vmibridge.backends.qemu.plugin.build import build_plugin

ROOT = Path(__file__).parents[2]
GUESTS = Path(__file__).parent / "guests"

Build = Callable[..., Path]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every QEMU is tested on asyncio, and the one of `make qemu` on every loop. The other
    combinations are slow: what a QEMU does differently does not depend on the loop."""
    for item in items:
        call = getattr(item, "callspec", None)
        if call is None or not {"system", "kvm"} & set(call.id.split("-")):
            continue
        if {"uvloop", "trio"} & set(call.id.split("-")):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def build_guest(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """`build_guest(NAME, DEFINE=value, ...)` gives the path of the assembled image."""
    folder = tmp_path_factory.mktemp("guests")
    built: dict[tuple, Path] = {}

    def build(name: str, **defines: object) -> Path:
        key = (name, *sorted(defines.items()))
        if key not in built:
            image = folder / f"{name}-{len(built)}.bin"
            options = [f"-D{define}={value}" for define, value in defines.items()]
            assemble(GUESTS / f"{name}.asm", image, *options)
            built[key] = image
        return built[key]

    return build


@pytest.fixture
def guest_code(tmp_path: Path) -> Callable[..., Path]:
    """`guest_code(SOURCE, width=64, org=0x100000)` assembles a few lines of a test's own."""

    def build(source: str, width: int = 64, org: int = 0x10_0000) -> Path:
        (tmp_path / "code.inc").write_text(source)
        image = tmp_path / "guest.bin"
        assemble(GUESTS / "source.asm", image, f"-I{tmp_path}/", f"-DWIDTH={width}", f"-DORG={org}")
        return image

    return build


def assemble(source: Path, image: Path, *options: str) -> None:
    include = (f"-I{ROOT / 'guest/include'}/", f"-I{GUESTS}/")
    command = [needs("nasm"), "-Werror", "-f", "bin", *include, *options]
    run([*command, source, "-o", image], check=True)


@pytest.fixture(params=["system", "new"])
def any_qemu(request) -> str:
    """Breakpoints do for any QEMU: that of the system, and the one that the plugin needs."""
    if request.param == "new":
        return request.getfixturevalue("qemu")
    return needs("qemu-system-x86_64")


@pytest.fixture(scope="session")
def qemu_i386(qemu: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The QEMU for 32-bit machines that came with the other one."""
    path = Path(qemu).with_name("qemu-system-i386")
    assert path.exists(), f"{path} is missing: Debian has it in the same package"
    return str(path)


@pytest.fixture(scope="session")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    needs("cc")
    return build_plugin(tmp_path_factory.mktemp("plugin") / "vmibridge-plugin.so")


@pytest.fixture
def machine(qemu: str, plugin: Path, build_guest: Build, tmp_path: Path) -> Machine:
    return Machine(qemu, plugin, build_guest, tmp_path)

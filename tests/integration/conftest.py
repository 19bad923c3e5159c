"""Guests for the tests: assembled from their sources, once per form."""

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from vmibridge.backend.qemu_plugin.build import build_plugin

ROOT = Path(__file__).parents[2]
GUESTS = Path(__file__).parent / "guests"
UNPACKED = ROOT / ".qemu/qemu-system-x86_64"

Build = Callable[..., Path]


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
    command = ["nasm", "-Werror", "-f", "bin", f"-I{ROOT / 'guest/include'}/", *options]
    done = subprocess.run(
        [*command, str(source), "-o", str(image)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def new_enough(path: str) -> bool:
    told = subprocess.run([path, "--version"], capture_output=True, text=True, check=False).stdout
    version = re.search(r"version (\d+)\.(\d+)", told)
    return version is not None and (int(version[1]), int(version[2])) >= (11, 1)


@pytest.fixture(scope="session")
def qemu() -> str:
    """A QEMU that has plugins which may write registers."""
    if given := os.environ.get("VMIBRIDGE_QEMU"):
        assert new_enough(given), f"VMIBRIDGE_QEMU={given} is no QEMU of 11.1 or newer"
        return given
    system = shutil.which("qemu-system-x86_64")
    for path in (str(UNPACKED), system):
        if path and os.access(path, os.X_OK) and new_enough(path):
            return path
    if not os.environ.get("CI"):
        pytest.skip("no QEMU of 11.1 or newer: run `make qemu`, or set VMIBRIDGE_QEMU")
    subprocess.run([ROOT / "guest/qemu/fetch-qemu"], check=True, timeout=600)
    return str(UNPACKED)


@pytest.fixture(scope="session")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_plugin(tmp_path_factory.mktemp("plugin") / "vmibridge-plugin.so")

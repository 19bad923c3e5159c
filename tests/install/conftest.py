"""Wheel and sdist of this checkout, and what they are tried with."""

import sys

import pytest
from environments import ROOT, run

SITE = ".globl site, _start\n_start:\nsite: cpuid\n hlt\n"


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """The wheel and the sdist of this checkout."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "-o", folder, ROOT)
    (wheel,) = folder.glob("*.whl")
    (sdist,) = folder.glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="session")
def wheel(built):
    return built[0]


@pytest.fixture(scope="session")
def elf(tmp_path_factory):
    """A program with a CPUID at `site`."""
    folder = tmp_path_factory.mktemp("elf")
    source = folder / "site.s"
    source.write_text(SITE)
    options = ["-nostdlib", "-static", "-no-pie", "-Wl,-Ttext=0x400000", "-Wl,--build-id=none"]
    run("cc", *options, source, "-o", folder / "site.elf")
    return folder / "site.elf"

"""Wheel and sdist of this checkout, and an environment that has the wheel."""

import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from distribution_parts import ROOT, Built, run


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "-o", folder, ROOT)
    (wheel,) = folder.glob("*.whl")
    (sdist,) = folder.glob("*.tar.gz")
    return Built(wheel, sdist)


@pytest.fixture(scope="session")
def installed_python(built, tmp_path_factory):
    """The Python of an environment with the wheel, and with the dependencies that are here."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": folder, "platbase": folder}))
    with zipfile.ZipFile(built.wheel) as wheel:
        wheel.extractall(site)
    # A .pth file in a folder that comes by a .pth file is not read. So all that is installed here
    # can be imported there, but for this checkout.
    (site / "here.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin/python"

"""Wheel and sdist of this checkout, and an environment that has the wheel."""

import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
SECONDS = 300


class Built(NamedTuple):
    wheel: Path
    sdist: Path


def run(*command, cwd=ROOT):
    """Its output; where it fails, that is the failure."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, f"{command}: {done.stdout}"
    return done.stdout


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

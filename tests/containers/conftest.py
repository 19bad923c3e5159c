"""podman, and the images that are built with it."""

import os
import shutil
import sys
from pathlib import Path

import pytest
from children import run

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "docker"))
from build_images import IMAGES, BuildError, Engine, bases, other_images  # noqa: E402

PROGRAMS = ["podman", "runc", "debootstrap", "iptables"]
PACKAGES = ["podman", "runc", "netavark", "aardvark-dns", "debootstrap", "iptables"]


def missing_programs():
    """Those of podman that are not there: netavark, too, needs iptables, and names it nowhere."""
    places = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    return [each for each in PROGRAMS if not shutil.which(each, path=places)]


def installed_podman():
    """As root it is installed where that can be; else the tests are skipped, and say why."""
    missing = missing_programs()
    if not missing:
        return
    told = f"no {', '.join(missing)}: apt-get install {' '.join(PACKAGES)}"
    if not os.environ.get("CI"):
        pytest.skip(told)
    if os.geteuid() or not shutil.which("apt-get"):
        pytest.skip(f"{told}; that can be done only as root, on a Debian")
    run(["apt-get", "update", "-q"], seconds=300)
    command = ["apt-get", "install", "-q", "-y", "--no-install-recommends", *PACKAGES]
    run(command, env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"}, seconds=600)
    assert not missing_programs(), told


@pytest.fixture(scope="session")
def engine(tmp_path_factory):
    """podman, with the images built. Where it starts no container at all, a skip says why."""
    installed_podman()
    engine = Engine("podman", tmp_path_factory.mktemp("podman"))
    try:
        for image in other_images():
            engine.bring_as_it_is(image)
        for name in IMAGES:
            (base,) = [engine.bring(image) for image in bases(name)]
    except BuildError as error:
        pytest.skip(str(error))
    tried = engine.run("run", "--rm", "--network=none", base, "true", capture_output=True)
    if tried.returncode:
        pytest.skip(f"podman starts no container here: {tried.stderr.decode()[-300:].strip()}")
    for name in IMAGES:
        engine.build(name)
    return engine


@pytest.fixture(scope="session")
def guest():
    """The folder with kernel and initramfs. In CI they are brought; else the test is skipped."""
    folder = ROOT / ".linux"
    sources = ROOT / "guest/linux"
    if not (folder / "release").exists():
        if not os.environ.get("CI"):
            pytest.skip("no Linux guest: run `make linux`")
        run([sources / "fetch-linux"], check=True, seconds=600)
    run([sources / "build-guest"], check=True, seconds=300)
    return folder

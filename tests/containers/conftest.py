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

PACKAGES = ["podman", "runc", "netavark", "aardvark-dns", "debootstrap"]


def installed_podman():
    """In CI it is installed where that can be; else the tests are skipped, and say why."""
    if shutil.which("podman"):
        return
    if not os.environ.get("CI"):
        pytest.skip(f"no podman: apt-get install {' '.join(PACKAGES)}")
    if os.geteuid() or not shutil.which("apt-get"):
        pytest.skip("no podman, and it can be installed only as root, on a Debian")
    run(["apt-get", "update", "-q"], seconds=300)
    command = ["apt-get", "install", "-q", "-y", "--no-install-recommends", *PACKAGES]
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    done = run(command, env=environment, seconds=600)
    if done.returncode or not shutil.which("podman"):
        pytest.skip("no podman, and apt-get could not install it")


@pytest.fixture(scope="session")
def engine(tmp_path_factory):
    """podman, with the images built. Where it starts no container at all, a skip says why."""
    installed_podman()
    engine = Engine("podman", tmp_path_factory.mktemp("podman"))
    needed = [image for name in IMAGES for image in bases(name)] + other_images()
    try:
        for image in needed:
            engine.bring(image)
    except BuildError as error:
        pytest.skip(str(error))
    (base,) = bases("qemu")
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

"""podman, and the images that are built with it."""

import os
from pathlib import Path

import pytest
from build_images import IMAGES, BuildError, Engine, bases, other_images
from children import run
from needs import needs

ROOT = Path(__file__).parents[2]

PROGRAMS = ["podman", "runc", "debootstrap", "iptables"]
"""What `make system-containers` installs and looks for."""


@pytest.fixture(scope="session")
def engine(tmp_path_factory):
    """podman, with the images built. Where it starts no container at all, a skip says why."""
    for each in PROGRAMS:
        needs(each)
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

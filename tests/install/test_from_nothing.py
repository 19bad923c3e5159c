"""The first contact, on a Debian 12 that has python3-venv, nasm and make, and nothing else.

It needs root, for debootstrap and a chroot.
"""

import os
import shutil

import pytest
from fresh_debian import USER, FreshDebian

pytestmark = pytest.mark.install

MAX_SIZE = 130 << 20
"""Bytes of an environment that runs the demo."""
users = pytest.mark.parametrize("user", ["root", USER])


@pytest.fixture(scope="module")
def debian(tmp_path_factory):
    if os.geteuid():
        pytest.skip("a chroot needs root: sudo make test-install")
    assert shutil.which("debootstrap"), "apt-get install debootstrap"
    folder = tmp_path_factory.mktemp("debian")
    yield FreshDebian("bookworm", folder, ["python3-venv", "nasm", "make", "ca-certificates"])
    shutil.rmtree(folder)


@users
def test_make_demo_passes_in_a_path_with_a_space(debian, user):
    debian.take_checkout(user, "a folder/vmibridge")
    done = debian.run(user, "cd 'a folder/vmibridge' && make demo && du -sb .venv")
    assert done.returncode == 0, done.stdout
    *told, size = done.stdout.splitlines()
    assert "demo: passed" in told
    assert int(size.split()[0]) < MAX_SIZE
    # It says what it does before it does it, and a second time it has nothing to do.
    assert any("makes .venv" in line for line in told[:3])
    again = debian.run(user, "cd 'a folder/vmibridge' && make demo")
    assert "demo: passed" in again.stdout.splitlines()
    assert "makes .venv" not in again.stdout


@users
def test_the_wheel_gives_a_command_that_works(debian, user, wheel):
    """With the pip of Debian 12, and no checkout."""
    debian.take(wheel, user, wheel.name)
    done = debian.run(
        user,
        "python3 -m venv 'an environment'; cd 'an environment/bin'"
        f"; ./pip install -q '{debian.inside(user, wheel.name)}[cli,unicorn]'"
        "; ./vmibridge --version; ./pip check",
    )
    assert done.returncode == 0, done.stdout
    assert "No broken requirements found." in done.stdout


def test_a_plain_user_without_a_package_is_told_which(debian):
    debian.take_checkout(USER, "without")
    hidden = debian.root / "usr/bin/nasm"
    hidden.rename(debian.root / "usr/bin/nasm.hidden")
    try:
        done = debian.run(USER, "cd without && make demo")
    finally:
        (debian.root / "usr/bin/nasm.hidden").rename(hidden)
    assert done.returncode != 0
    assert "missing packages: nasm; as root: apt-get install nasm" in done.stdout

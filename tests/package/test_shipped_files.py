"""What is distributed: the same files from a checkout and from an sdist, each real and once."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from vmibridge.backends.qemu.plugin.build import SOURCES

ROOT = Path(__file__).parents[2]


def build(source, target, what):
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", f"--{what}", "-o", target, source],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    (made,) = target.iterdir()
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("dist")


@pytest.fixture(scope="module")
def sdist(folder):
    return build(ROOT, folder / "sdist", "sdist")


@pytest.fixture(scope="module")
def unpacked(sdist, folder):
    (folder / "source").mkdir()
    # `TarFile.extractall` has its filter from 3.11.4 on, and Debian 12 has 3.11.2.
    subprocess.run(["tar", "-xf", sdist, "-C", folder / "source"], check=True)
    (source,) = (folder / "source").iterdir()
    return source


@pytest.fixture(scope="module")
def wheel(folder):
    return files_of(build(ROOT, folder / "wheel", "wheel"))


def files_of(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert len(names) == len(set(names))
        return {name: archive.read(name) for name in names if not name.endswith("/RECORD")}


def test_a_wheel_of_the_sdist_is_that_of_the_checkout(unpacked, folder, wheel):
    assert files_of(build(unpacked, folder / "again", "wheel")) == wheel


def test_the_sdist_has_no_links_and_the_handlers_once(sdist):
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    assert all(member.isfile() for member in members)
    handlers = [each.name.split("/", 1)[1] for each in members if each.name.endswith("/hello.py")]
    assert handlers == ["handlers/hello.py"]


def test_the_wheel_has_what_a_guest_is_made_of(wheel):
    tracked = subprocess.run(
        ["git", "ls-files", "guest", "handlers"],
        cwd=ROOT, capture_output=True, text=True, check=True, timeout=60,
    ).stdout.split()  # fmt: skip
    folders = ("include", "demo", "init", "linux/vmibridge_device", "qemu", "tools")
    kept = tuple(f"guest/{name}/" for name in folders)
    kept += ("handlers/",)
    wanted = {each for each in tracked if each.startswith(kept)} | {"guest/debian-packages.sh"}
    packed = {
        name for name in wheel if name.startswith(("vmibridge/guest/", "vmibridge/handlers/"))
    }
    assert packed == {f"vmibridge/{each}" for each in wanted}
    for name in wanted:
        assert wheel[f"vmibridge/{name}"] == (ROOT / name).read_bytes()
    assert {f"vmibridge/{source.relative_to(ROOT / 'vmibridge')}" for source in SOURCES} <= {*wheel}
    assert "vmibridge/guest_header/prelude.rs" in wheel

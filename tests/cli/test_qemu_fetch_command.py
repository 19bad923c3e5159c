"""`vmibridge qemu fetch`: over a Debian that is made up, so that no network is needed."""

import os
import shlex
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from probe_guest import command

from vmibridge.backends.qemu.find import PLUGIN_NEEDS, find_qemu

NAME = "qemu-system-x86_64"
RELEASE = Path("/etc/os-release")
ON_DEBIAN = RELEASE.exists() and "\nID=debian\n" in f"\n{RELEASE.read_text()}"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg").exists()

pytestmark = pytest.mark.skipif(
    not (ON_DEBIAN and KEYRING), reason="needs Debian with debian-archive-keyring"
)

QEMU = "#!/bin/sh\necho 'QEMU emulator version {}'\n"
LOADER = "usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2"
APT_GET = """#!/bin/bash
echo "apt-get $*" >>"$LOG"
[ "$1" != install ] || {{
    {install}
    work=$(dirname "$APT_CONFIG")
    echo 'Need to get 38 MB of archives.'
    for n in $(seq 40); do echo "Get:$n http://nowhere x"; done
    touch "$work/archives/qemu.deb"
}}
"""
DPKG = """#!/bin/bash
case $1 in
--print-architecture) echo {architecture} ;;
-x) mkdir -p "$3/{folder}"; printf '{qemu}' >"$3/{loader}"; chmod +x "$3/{loader}" ;;
esac
"""


@pytest.fixture
def debian(tmp_path):
    """Makes the programs of a Debian; returns how `qemu fetch` is run there."""
    tools, home = tmp_path / "bin", tmp_path / "some home"
    tools.mkdir()
    home.mkdir()
    for name in ("bash", "sh", "apt-config", "apt-cache", *COREUTILS):
        (tools / name).symlink_to(shutil.which(name))

    def place(name, text):
        path = tools / name
        path.write_text(text)
        path.chmod(0o755)

    def make(*, architecture="amd64", version="11.1.3", install="", system=None):
        place("apt-get", APT_GET.format(install=install))
        qemu = QEMU.format(version).replace("\n", "\\n").replace("'", "'\\''")
        loader = Path(LOADER)
        place("dpkg", DPKG.format(
            architecture=architecture, folder=loader.parent, loader=loader, qemu=qemu
        ))  # fmt: skip
        if system:
            place(NAME, QEMU.format(system))
            place("qemu-system-i386", QEMU.format(system))
        return {
            **os.environ, "PATH": str(tools), "HOME": str(home), "LOG": str(tmp_path / "log"),
            "XDG_CACHE_HOME": "",
        }  # fmt: skip

    return make


COREUTILS = (
    *("awk", "cat", "chmod", "cp", "dirname", "flock", "grep", "head", "ln", "ls", "mkdir", "mv"),
    *("readlink", "rm", "sed", "seq", "sort", "tail", "touch", "wc"),
)


def fetch(environment, *options, folder):
    return subprocess.run(
        command("qemu", "fetch", *options),
        capture_output=True, text=True, timeout=60, check=False, cwd=folder, env=environment,
    )  # fmt: skip


def cache_of(environment):
    return Path(environment["HOME"]) / ".cache/vmibridge/qemu"


def downloads(tmp_path):
    log = tmp_path / "log"
    return log.read_text().count("apt-get install") if log.exists() else 0


def test_it_is_kept_in_the_cache_where_qemu_run_finds_it(debian, tmp_path, monkeypatch):
    environment = debian()
    done = fetch(environment, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    kept = cache_of(environment)
    assert done.stdout == f"{kept / NAME}\n"
    assert "fetch-qemu: downloads 38 MB of archives." in done.stderr
    assert "fetch-qemu: 40 packages are there" in done.stderr
    assert {path.name for path in kept.iterdir()} == {NAME, "qemu-system-i386", "root"}
    monkeypatch.chdir("/")
    for name in ("PATH", "HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, environment[name])
    monkeypatch.delenv("VMIBRIDGE_QEMU", raising=False)
    assert find_qemu(None, PLUGIN_NEEDS).path == str(kept / NAME)


def made(file):
    """Which file it is, and when it was last written."""
    stat = file.stat()
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def test_a_second_run_does_nothing(debian, tmp_path):
    environment = debian()
    fetch(environment, folder=tmp_path)
    before = made(cache_of(environment) / NAME)
    done = fetch(environment, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert downloads(tmp_path) == 1
    assert made(cache_of(environment) / NAME) == before


def test_into_a_folder_with_a_blank(debian, tmp_path):
    done = fetch(debian(), "--into", "some where", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'some where' / NAME}\n"
    told = subprocess.run([tmp_path / "some where" / NAME], capture_output=True, check=True)
    assert told.stdout == b"QEMU emulator version 11.1.3\n"


def test_a_qemu_of_the_system_that_is_new_enough_is_linked_to(debian, tmp_path):
    environment = debian(system="12.0.0")
    done = fetch(environment, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert downloads(tmp_path) == 0
    assert (cache_of(environment) / NAME).resolve() == tmp_path / "bin" / NAME


def test_a_qemu_of_the_system_that_is_too_old_is_not(debian, tmp_path):
    environment = debian(system="7.2.0")
    assert fetch(environment, folder=tmp_path).returncode == 0
    assert not (cache_of(environment) / NAME).is_symlink()


class TestFailures:
    def one_line(self, done):
        assert done.returncode == 1
        assert done.stdout == ""
        line = done.stderr.splitlines()[-1]
        assert line.startswith("vmibridge: qemu fetch: ")
        return line

    def test_another_architecture(self, debian, tmp_path):
        line = self.one_line(fetch(debian(architecture="arm64"), folder=tmp_path))
        assert line.endswith("needs Debian for amd64, and this is for arm64")

    def test_a_system_without_apt(self, debian, tmp_path):
        environment = debian()
        (tmp_path / "bin/apt-cache").unlink()
        line = self.one_line(fetch(environment, folder=tmp_path))
        assert line.endswith("needs apt-cache, which is not in PATH")

    def test_packages_that_cannot_be_had(self, debian, tmp_path):
        environment = debian(install="echo 'E: no such package'; exit 100")
        done = fetch(environment, folder=tmp_path)
        assert self.one_line(done).endswith("the packages cannot be had")
        assert list(cache_of(environment).iterdir()) == []

    def test_a_qemu_that_is_too_old_after_all(self, debian, tmp_path):
        environment = debian(version="10.0.0")
        self.one_line(fetch(environment, folder=tmp_path))
        assert list(cache_of(environment).iterdir()) == []

    def test_a_folder_that_cannot_be_made(self, debian, tmp_path):
        (tmp_path / "file").touch()
        self.one_line(fetch(debian(), "--into", "file/here", folder=tmp_path))


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=str
)
def test_one_that_is_ended_leaves_nothing_and_the_next_one_works(debian, tmp_path, number, status):
    waits = f"echo downloading >&2; exec {shlex.quote(shutil.which('sleep'))} 1000"
    fetching = tmp_path / "fetching"
    os.mkfifo(fetching)
    environment = debian(install=f"echo now >{shlex.quote(str(fetching))}; {waits}")
    child = subprocess.Popen(
        command("qemu", "fetch"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment,
    )  # fmt: skip
    try:
        assert fetching.read_text() == "now\n"
        child.send_signal(number)
        out, err = child.communicate(timeout=60)
    finally:
        child.kill()
    assert (child.returncode, out) == (status, ""), err
    assert list(cache_of(environment).iterdir()) == []
    environment = debian()
    assert fetch(environment, folder=tmp_path).returncode == 0

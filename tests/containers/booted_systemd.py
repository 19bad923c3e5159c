"""The systemd of this machine, booted in namespaces of its own: see `boot-systemd`."""

import os
import signal
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from children import Child, run

BOOT = Path(__file__).with_name("boot-systemd")
CHECKOUT = "/srv/checkout"
"""The working folder of commands in there."""
PATH = "PATH=/usr/sbin:/usr/bin:/sbin:/bin"
"""Programs of the system: a Python of who runs the tests may be in their home."""
SECONDS = 120
"""Within which what is waited for happens, on a machine that is busy with other work."""


class Booted:
    """What runs in there."""

    def __init__(self, init: int) -> None:
        self._init = init

    def run(self, *command, has_network=False, **options):
        """A command in there; with `has_network` that of this machine, for what installs."""
        spaces = ["--mount", "--pid", "--uts", "--ipc", "--cgroup"]
        spaces += [] if has_network else ["--net"]
        enter = ["nsenter", f"--target={self._init}", *spaces]
        return run([*enter, "env", f"--chdir={CHECKOUT}", PATH, *command], **options)

    def write(self, path, text):
        self.run("sh", "-c", 'printf %s "$2" > "$1"', "sh", path, text, check=True)

    def read(self, path):
        return self.run("cat", path).stdout

    def systemctl(self, *arguments, status=0):
        done = self.run("systemctl", *arguments)
        assert done.returncode == status, (arguments, done.stderr, self.journal())
        return done.stdout

    def shows(self, unit, name):
        """A property of a unit, of those of `systemctl show`."""
        return self.systemctl("show", f"--property={name}", "--value", unit).strip()

    def journal(self, *options):
        """What has come to it by now."""
        self.run("journalctl", "--sync", check=True)
        return self.run("journalctl", "--no-pager", "--output=cat", *options).stdout

    def wait(self, is_so, what):
        """Until `is_so()` is true."""
        deadline = time.monotonic() + SECONDS
        while not is_so():
            assert time.monotonic() < deadline, f"{what}\n{self.journal()}"
            time.sleep(0.05)


def cgroups():
    """Where version 2 of cgroups is mounted, if it is."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(place)
    return None


@contextmanager
def booted(folder):
    """Up, and down again with all that it started. Files of `folder`/upper are at its root."""
    cgroup = cgroups() / f"vmibridge-test-{os.getpid()}"
    with Child([BOOT, folder, cgroup], seconds=1200) as child:
        try:
            yield Booted(_awaited(child))
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait()
            _remove(cgroup)


def _awaited(child):
    """The process that is its init, when it has booted."""
    deadline = time.monotonic() + SECONDS
    while True:
        assert time.monotonic() < deadline, child.told()
        assert child.poll() is None, child.communicate()
        below = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
        if below and Path(f"/proc/{below[0]}/comm").read_text() == "systemd\n":
            found = Booted(int(below[0]))
            if found.run("systemctl", "is-system-running", "--wait").stdout == "running\n":
                return int(below[0])
        time.sleep(0.05)


def _remove(cgroup):
    """It is empty when the last process, which was killed, is gone."""
    deadline = time.monotonic() + SECONDS
    while cgroup.exists():
        assert time.monotonic() < deadline, f"{cgroup} is in use"
        for path, _, _ in os.walk(cgroup, topdown=False):
            with suppress(OSError):
                Path(path).rmdir()
        time.sleep(0.05)

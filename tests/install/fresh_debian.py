"""A Debian that has nothing but what is asked for, to try things in as a user would."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from environments import ROOT

sys.path.insert(0, str(ROOT / "docker"))
from debian import debootstrap, pip_mounts

SECONDS = 1200
USER = "someone"
HOMES = {"root": "/root", USER: f"/home/{USER}"}


class FreshDebian:
    """One in a folder. What runs in it has mounts and processes of its own, and ends with it."""

    def __init__(self, suite: str, folder: Path, packages: list[str]) -> None:
        self.root = folder / suite
        debootstrap(suite, self.root, packages)
        self._mounts = pip_mounts(folder)
        add = ["chroot", self.root, "useradd", "--create-home", "--shell", "/bin/bash", USER]
        subprocess.run(add, check=True)

    def home(self, user: str) -> Path:
        return self.root / HOMES[user].lstrip("/")

    def inside(self, user: str, name: str) -> str:
        """The path, as seen inside, of what was taken under this name."""
        return f"{HOMES[user]}/{name}"

    def take(self, source: Path, user: str, name: str) -> None:
        """A file, in the home of this user."""
        target = self.home(user) / name
        shutil.copy(source, target)
        shutil.chown(target, *self._ids(user))

    def take_checkout(self, user: str, name: str) -> None:
        """The files of this checkout that git knows, in a folder in the home of this user."""
        target = self.home(user) / name
        target.mkdir(parents=True)
        files = subprocess.run(
            ["git", "-C", ROOT, "ls-files", "-z"], capture_output=True, check=True
        ).stdout
        for file in filter(None, files.decode().split("\0")):
            if os.path.lexists(ROOT / file):
                (target / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / file, target / file, follow_symlinks=False)
        for path in (target, *target.rglob("*")):
            os.lchown(path, *self._ids(user))

    def run(self, user: str, script: str, seconds: float = SECONDS) -> subprocess.CompletedProcess:
        """A script for bash, in the home of this user, with nothing of our environment."""
        command = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "bash", "-ec"]
        mounts = [
            # Else what makes namespaces inside cannot: its root has to be a mount.
            f"mount --bind '{self.root}' '{self.root}'",
            f"mount -t proc proc '{self.root}/proc'",
            f"mkdir -p '{self.root}/dev/pts'",
            # Terminals of its own, which some tests make.
            f"mount -t devpts -o newinstance,ptmxmode=0666 devpts '{self.root}/dev/pts'",
            f"ln -sf pts/ptmx '{self.root}/dev/ptmx'",
            *self._bound(),
        ]
        uid, gid = self._ids(user)
        clean = f"env -i HOME={HOMES[user]} PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8"
        inside = f"exec chroot --userspec={uid}:{gid} --groups={gid} '{self.root}' {clean}"
        inside += f' bash -ec "cd {HOMES[user]}; $1"'
        return subprocess.run(
            [*command, "; ".join([*mounts, inside]), "bash", script],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            timeout=seconds,
            check=False,
        )

    def _bound(self) -> list[str]:
        """What pip's settings name, where they name it."""
        lines = []
        for number, path in enumerate(self._mounts):
            target = self.root / ("etc/pip.conf" if number == 0 else str(path).lstrip("/"))
            make = f"mkdir -p '{target}'"
            if path.is_file():
                make = f"mkdir -p '{target.parent}' && touch '{target}'"
            lines.append(f"{make} && mount --bind '{path}' '{target}'")
        return lines

    def _ids(self, user: str) -> tuple[int, int]:
        for line in (self.root / "etc/passwd").read_text().splitlines():
            name, _, uid, gid, *_ = line.split(":")
            if name == user:
                return int(uid), int(gid)
        raise AssertionError(f"there is no user {user}")

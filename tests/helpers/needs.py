"""Programs of the system that tests need, and the one way to do without.

A plain user without one sees a skip that says what would run the test. In CI and for root, who
can install it, the test fails: a run is never green for want of what it should have run.
"""

import os
import shutil
import subprocess

import pytest

PACKAGES = {
    "cc": "gcc libc6-dev",
    "chromium": "chromium",
    "clang": "clang",
    "clang++": "clang",
    "debootstrap": "debootstrap",
    "g++": "g++",
    "gcc": "gcc libc6-dev",
    "gdb": "gdb",
    "gdbserver": "gdbserver",
    "i686-w64-mingw32-gcc": "gcc-mingw-w64-i686",
    "initdb": "postgresql",
    "iptables": "iptables",
    "ld": "binutils",
    "make": "make",
    "nasm": "nasm",
    "nm": "binutils",
    "objcopy": "binutils",
    "objdump": "binutils",
    "pg_isready": "postgresql-client",
    "podman": "podman runc netavark aardvark-dns debootstrap iptables",
    "postgres": "postgresql",
    "psql": "postgresql-client",
    "qemu-system-x86_64": "qemu-system-x86 seabios",
    "readelf": "binutils",
    "redis-server": "redis-server",
    "runc": "runc",
    "rustc": "rustc",
    "systemd-analyze": "systemd",
    "unshare": "util-linux",
    "x86_64-w64-mingw32-gcc": "gcc-mingw-w64-x86-64",
}
"""Debian's packages that have them."""

has_kvm = pytest.mark.skipif(not os.access("/dev/kvm", os.W_OK), reason="no /dev/kvm to write to")
"""Mark of a test that runs where there is KVM, and is skipped elsewhere, in CI as well."""


def may_skip() -> bool:
    return not os.environ.get("CI") and os.geteuid() != 0


def missing(what: str) -> None:
    """Skip the test for want of this, or fail it; `what` says what would run it."""
    if may_skip():
        pytest.skip(what)
    pytest.fail(what)


def needs(program: str) -> str:
    """The path of a program of the system."""
    path = shutil.which(program) or shutil.which(program, path="/usr/sbin:/sbin")
    if path is None:
        missing(f"no {program}: as root, apt-get install {PACKAGES[program]}")
        raise AssertionError("unreachable")
    return path


def own_namespaces(*options: str) -> list[str]:
    """What runs a command as root in namespaces of its own, such as `--mount`.

    Root needs none of users for that, which cannot be had in a chroot.
    """
    line = [needs("unshare"), *(["--map-root-user"] if os.geteuid() else []), *options]
    if subprocess.run([*line, "true"], check=False).returncode:
        missing("no namespaces for a plain user: run it as root")
    return line

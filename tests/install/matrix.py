"""The test-suite, with the lock, on every Python that is supported.

    python tests/install/matrix.py [3.12 3.14...]

A Python that is installed here runs all tests but the slow ones, in an environment of its own. One
that is not is from a newer Debian in a chroot, which needs root; there the tests run that need
no system but Python and an assembler. Says what passed; ends with 1 when something failed.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from environments import ROOT, environment, install, installed_python
from fresh_debian import FreshDebian
from lock import PYTHONS

SECONDS = 3600
"""For the tests in a chroot, on a loaded machine."""
NEWER_DEBIAN = "forky"
"""A Debian whose archive has the Pythons that this machine lacks."""
IN_CHROOT = (
    "tests/unit tests/conformance tests/fuzz tests/integration/test_unicorn.py tests/cli"
    " --deselect tests/cli/test_qemu_command.py::test_breakpoints_do_for_any_qemu"
)
PYTEST = ["-m", "pytest", "-q", "-n", "2", "--dist", "worksteal"]


def run_here(path: str, folder: Path) -> bool:
    python = environment(folder, path)
    install(python, "--no-deps", "--require-hashes", "-r", ROOT / "requirements.lock")
    install(python, "--no-deps", "--no-build-isolation", "-e", ROOT)
    return subprocess.run([python, *PYTEST], cwd=ROOT, check=False).returncode == 0


def run_in_chroot(python: str, folder: Path) -> bool:
    packages = [f"python{python}", f"python{python}-venv", "nasm", "gcc", "libc6-dev", "make"]
    debian = FreshDebian(NEWER_DEBIAN, folder, [*packages, "ca-certificates", "procps"])
    debian.take_checkout("root", "vmibridge")
    install = f"python{python} -m venv .venv; .venv/bin/pip install -q --no-deps"
    done = debian.run(
        "root",
        f"cd vmibridge; {install} --require-hashes -r requirements.lock"
        "; .venv/bin/pip install -q --no-deps --no-build-isolation -e .; .venv/bin/pip check"
        f"; .venv/bin/python {' '.join(PYTEST)} {IN_CHROOT}",
        seconds=SECONDS,
    )
    print(done.stdout[-20_000:], flush=True)
    return done.returncode == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("pythons", nargs="*", metavar="PYTHON", help=f"of {', '.join(PYTHONS)}")
    options = parser.parse_args()
    told = {}
    for python in options.pythons or PYTHONS:
        with tempfile.TemporaryDirectory(prefix="vmibridge-matrix-") as name:
            path = installed_python(python)
            print(f"Python {python}: {path or f'in a chroot of Debian {NEWER_DEBIAN}'}", flush=True)
            if path:
                told[python] = run_here(path, Path(name) / "environment")
            elif os.geteuid() or not shutil.which("debootstrap"):
                print("needs root and debootstrap", file=sys.stderr)
                told[python] = False
            else:
                told[python] = run_in_chroot(python, Path(name))
    for python, passed in told.items():
        print(f"Python {python}: {'passed' if passed else 'FAILED'}")
    return 0 if all(told.values()) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Makes a virtual environment with some packages of a lock, and what they need.

    python locked_install.py LOCK FOLDER REQUIREMENT...

Versions and hashes are those of LOCK. pip alone cannot do it: with hashes it takes the whole of a
lock, and as constraints it takes no hashes. So it is asked which packages it would install, and
then installs these from the lock. A REQUIREMENT may be a wheel that was built here.
"""

import json
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

HEAD = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)(\[[^\]]*\])?==")


def main(lock: Path, folder: Path, requirements: list[str]) -> None:
    """Fails with pip when the lock lacks a package, or a file is not that of the lock."""
    venv.create(folder, symlinks=True)
    locked = entries(lock.read_text())
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        pinned = work / "pinned.txt"
        pinned.write_text("".join(constraint(entry) for entry in locked.values()))
        report = work / "report.json"
        pip(folder, "--dry-run", f"--report={report}", "-c", str(pinned), *requirements)
        names = [
            normal(each["metadata"]["name"]) for each in json.loads(report.read_text())["install"]
        ]
        built = [each.partition("[")[0] for each in requirements if "/" in each]
        own = {normal(Path(each).name.partition("-")[0]) for each in built}
        wanted = work / "wanted.txt"
        names = [name for name in names if name not in own]
        if missing := [name for name in names if name not in locked]:
            sys.exit(f"{lock} has no {', '.join(missing)}: make lock")
        wanted.write_text("".join(locked[name] for name in names))
        pip(folder, "--no-deps", "--require-hashes", "-r", str(wanted))
        if built:
            pip(folder, "--no-deps", "--no-index", *built)


def entries(lock: str) -> dict[str, str]:
    """What a lock says of each package, by its name."""
    found: dict[str, str] = {}
    name = ""
    for line in lock.splitlines(keepends=True):
        if head := HEAD.match(line):
            name = normal(head[1])
        if name:
            found[name] = found.get(name, "") + line
    return found


def constraint(entry: str) -> str:
    """Its first line: the version, and where it is for. pip wants no extras and no hashes there."""
    line = entry.splitlines()[0].rstrip(" \\")
    return HEAD.sub(r"\1==", line) + "\n"


def normal(name: str) -> str:
    """As PEP 503 has it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pip(folder: Path, *arguments: str) -> None:
    """The pip that is here, for the environment in `folder`."""
    command = [sys.executable, "-m", "pip", f"--python={folder}/bin/python", "install"]
    options = ["--quiet", "--no-cache-dir", "--root-user-action=ignore"]
    subprocess.run([*command, *options, *arguments], check=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])

"""A fresh Debian in a folder, and how this machine reaches Debian's archive and PyPI from there."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = Path("/usr/share/debootstrap/scripts")
DEBOOTSTRAP_SECONDS = 2700
EMULATED_TIMES = 4
"""How many times as long anything may take whose programs run in an emulator: it takes several
times as much CPU, and on a machine with other work 2700 s were not enough."""


class DebianError(Exception):
    """A Debian cannot be made here."""


def debootstrap(
    suite: str,
    folder: Path,
    packages: Iterable[str],
    architecture: str | None = None,
    *,
    seconds: float = DEBOOTSTRAP_SECONDS,
) -> int:
    """The smallest Debian there is, with `packages`. Needs root. Raises `DebianError`.

    Returns when the archive was released, in seconds since 1970. `architecture` is Debian's name of
    one whose programs run here, by default this machine's.
    """
    source = archive()
    if source is None:
        raise DebianError("no Debian archive is known here to make it from")
    command = ["debootstrap", "--variant=minbase", f"--include={','.join(packages)}"]
    command += [f"--arch={architecture}"] if architecture else []
    # One that is newer than this debootstrap is made as sid is.
    script = [] if (SCRIPTS / suite).exists() else [SCRIPTS / "sid"]
    log = folder.with_name(f"{folder.name}.log")
    with log.open("w") as output:
        # A group of its own: what runs in the folder has to end with debootstrap.
        process = subprocess.Popen(
            [*command, suite, folder, source, *script],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired as error:
            raise DebianError(f"debootstrap: not done after {seconds:g} s") from error
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            _unmount(folder)
    if process.returncode:
        raise DebianError(f"debootstrap failed: {log.read_text()[-500:]}")
    epoch = _released(folder)
    for left in (*folder.glob("var/lib/apt/lists/*"), *folder.glob("var/cache/apt/archives/*.deb")):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    return epoch


def _unmount(folder: Path) -> None:
    """What a debootstrap that was ended leaves mounted: /proc is not to be removed."""
    points = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    below = [point for point in points if point.startswith(f"{folder.resolve()}/")]
    for point in reversed(below):
        subprocess.run(["umount", point], check=True)


def _released(folder: Path) -> int:
    """The date of the file Release that was checked. Raises `DebianError`."""
    for path in sorted(folder.glob("var/lib/apt/lists/*Release")):
        if date := re.search(r"^Date: (.+)$", path.read_text(), re.MULTILINE):
            return int(parsedate_to_datetime(date[1]).timestamp())
    raise DebianError("debootstrap left no file Release with a date")


def archive() -> str | None:
    """Where this machine, if it is a Debian, gets its packages."""
    release = Path("/etc/os-release")
    if not release.exists() or not re.search(r"^ID=debian$", release.read_text(), re.MULTILINE):
        return None
    script = ROOT / "guest/debian-packages.sh"
    done = subprocess.run(
        ["bash", "-c", '. "$0" && debian_archive | sed -n 1p', script],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or None


def pip_mounts(folder: Path) -> list[Path]:
    """pip's settings of this machine as `folder`/pip.conf, and what else they name, to be mounted.

    Empty where there are none. The first is the file itself, which belongs to /etc/pip.conf.
    """
    settings = _pip_settings()
    if not settings:
        return []
    file = folder / "pip.conf"
    lines = [f"{name} = {value}\n" for name, value in settings.items()]
    file.write_text("".join(["[global]\n", *lines]))
    mounts = [file]
    for value in " ".join(settings.values()).split():
        path = Path(value)
        if value.startswith("file:"):
            # An index in a folder has its files beside it.
            path = Path(urlsplit(value).path).parent
        if path.is_absolute() and path.exists() and path != Path("/"):
            mounts.append(path)
    return list(dict.fromkeys(mounts))


def _pip_settings() -> dict[str, str]:
    printed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False
    ).stdout
    found: dict[str, str] = {}
    # Those of the environment come before those of files, as with pip itself.
    for source, name, value in re.findall(r"^(\S+?)\.([\w-]+)='(.*)'$", printed, re.MULTILINE):
        if source == ":env:" or name not in found:
            found[name.lstrip(".")] = value.replace("\\n", " ")
    return found

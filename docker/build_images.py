"""Builds the images of this folder.

    python docker/build_images.py [--engine podman|docker] [--platform PLATFORM,...] [NAME...]
    python docker/build_images.py --pin

Two builds of a commit with podman and `--clean` give one image: its time stamps are those of the
commit. For several platforms there is an image for each (`vmibridge:latest-amd64`), and a manifest
list under the name itself. `--pin` asks the registries for the digests of the images that these
build upon, and writes them to base_images.json.

How this machine reaches Debian's archive and PyPI is taken from the configuration of its apt and
pip, for podman.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from base_images import (
    ARCHITECTURES,
    PINS,
    Base,
    bring,
    bring_as_it_is,
    native_platform,
    need_emulator,
    times,
)
from container_engine import BuildError, Runner
from debian import archive, pip_mounts
from normal_image import normalize
from registry import RegistryError, digest_of
from source_state import SourceState, labels, source_state

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
BUILD_SECONDS = 3600
SAVE_SECONDS = 900


class Engine(Runner):
    """podman or docker, which builds the images."""

    output: TextIO | None = None
    """Where builds print to: by default the standard output."""

    def bring(self, image: str) -> str:
        """What to build upon instead of `image`, for this machine. Raises `BuildError`."""
        return bring(self, image, native_platform()).reference

    def bring_as_it_is(self, image: str) -> None:
        """Raises `BuildError`."""
        bring_as_it_is(self, image)

    def build(
        self,
        name: str,
        *,
        tag: str | None = None,
        platforms: Sequence[str] = (),
        is_clean: bool = False,
        state: SourceState | None = None,
    ) -> None:
        """Build one image, for this machine or for `platforms`. Raises `BuildError`.

        `is_clean`: without what earlier builds left, which has their time stamps.
        """
        tag = tag or IMAGES[name]
        wanted = list(platforms) or [native_platform()]
        if len(wanted) > 1 and self.name != "podman":
            raise BuildError("several platforms at once: needs podman")
        for each in wanted:
            need_emulator(each)
        state = state or source_state()
        (image,) = bases(name)
        for each in wanted:
            base = bring(self, image, each)
            own = tag if len(wanted) == 1 else f"{tag}-{ARCHITECTURES[each]}"
            command = self.command(name, own, each, base, state)
            done = self.run(
                *command,
                *(["--no-cache"] if is_clean else []),
                str(ROOT),
                seconds=times(each) * BUILD_SECONDS,
                stdout=self.output,
            )
            if done.returncode:
                raise BuildError(f"{name}: the build for {each} failed")
            if is_clean and self.name == "podman":
                self._normalize(own)
        if len(wanted) > 1:
            self._list(tag, wanted)

    def _normalize(self, tag: str) -> None:
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            place = Path(name) / "image"
            saved = ("save", "--quiet", "--format=docker-dir", "-o", str(place), tag)
            self.printed(*saved, seconds=SAVE_SECONDS)
            normalize(place)
            identity = self.printed("pull", "--quiet", f"dir:{place}", seconds=SAVE_SECONDS)
        self.printed("tag", identity, tag)

    def _list(self, tag: str, platforms: Sequence[str]) -> None:
        # One of before: `manifest create` adds to none, and `rmi` would remove an image.
        self.run("manifest", "rm", tag, capture_output=True)
        self.run("untag", tag, capture_output=True)
        self.printed("manifest", "create", tag)
        for each in platforms:
            image = f"containers-storage:{tag}-{ARCHITECTURES[each]}"
            self.printed("manifest", "add", tag, image)

    def command(
        self, name: str, tag: str, platform: str, base: Base, state: SourceState
    ) -> list[str]:
        """The arguments of a build, but for its context."""
        file = dockerfile(name)
        command = ["build", "-f", str(file), "--tag", tag, f"--platform={platform}"]
        told = {"BASE": base.reference, "VERSION": state.version}
        if state.epoch is not None:
            told["SOURCE_DATE_EPOCH"] = str(state.epoch)
        if name == "qemu" and (source := archive()) is not None:
            told["DEBIAN"] = source
        for key, value in told.items():
            command += ["--build-arg", f"{key}={value}"]
        for key, value in labels(state, base).items():
            command += ["--label", f"{key}={value}"]
        if name in STAGES:
            command += ["--target", name]
        if self.name == "podman":
            # Of the two formats, this one keeps the health check. Docker finds the list by itself.
            command += ["--format", "docker", f"--ignorefile={file}.dockerignore"]
            command += ["--identity-label=false"]
            command += [f"--timestamp={state.epoch}"] if state.epoch is not None else []
            command += self._reach() if file.stem == "bridge" else []
        return command

    def _reach(self) -> list[str]:
        """pip's settings, and the folders and files that they name, for the time of a build."""
        found = pip_mounts(self.folder)
        mounts = [f"{settings}:/etc/pip.conf:ro" for settings in found[:1]]
        mounts += [f"{path}:{path}:ro" for path in found[1:]]
        return [word for mount in mounts for word in ("--volume", mount)]


def dockerfile(name: str) -> Path:
    return FOLDER / f"{STAGES.get(name, name)}.Dockerfile"


def bases(name: str) -> list[str]:
    """The image that a Dockerfile builds upon: `ARG BASE`, and no other."""
    text = dockerfile(name).read_text()
    stages = re.findall(r"^FROM (\S+)(?: AS (\S+))?$", text, re.MULTILINE)
    own = {"${BASE}", *(stage for _, stage in stages)}
    assert all(image in own for image, _ in stages), f"{name}: builds upon another image"
    return re.findall(r"^ARG BASE=(\S+)$", text, re.MULTILINE)


def other_images() -> list[str]:
    """Those that compose.yaml takes as they are."""
    text = (FOLDER / "compose.yaml").read_text()
    named = re.findall(r"^ +image: (?:\$\{\w+:-)?([^\s}]+)\}?$", text, re.MULTILINE)
    return [image for image in dict.fromkeys(named) if image not in IMAGES.values()]


def write_pins() -> None:
    """Raises `RegistryError`."""
    images = sorted({image for name in IMAGES for image in bases(name)})
    found = {image: digest_of(image) for image in images}
    PINS.write_text(json.dumps(found, indent=4) + "\n")
    for image, digest in found.items():
        print(f"{image}: {digest}")


def engine_name(asked: str | None) -> str:
    """Raises `BuildError`."""
    found = next(
        (each for each in ([asked] if asked else ["podman", "docker"]) if shutil.which(each)), None
    )
    if found is None:
        raise BuildError(f"needs {asked or 'podman or docker'}: see `make system-containers`")
    return found


def platforms_of(text: str) -> list[str]:
    """For an option of argparse."""
    found = list(dict.fromkeys(text.split(",")))
    if unknown := [each for each in found if each not in ARCHITECTURES]:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: not of {', '.join(ARCHITECTURES)}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--engine", choices=["podman", "docker"])
    parser.add_argument(
        "--platform",
        type=platforms_of,
        default=[],
        metavar="PLATFORM,...",
        help=f"of {', '.join(ARCHITECTURES)}; by default this machine's",
    )
    parser.add_argument("--clean", action="store_true", help="use nothing of earlier builds")
    parser.add_argument("--source", metavar="URL", help="where the source is to be had")
    parser.add_argument("--pin", action="store_true", help="write base_images.json, build nothing")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(IMAGES)}")
    options = parser.parse_args()
    if unknown := set(options.names) - set(IMAGES):
        parser.error(f"there is no image {', '.join(sorted(unknown))}")
    try:
        if options.pin:
            write_pins()
            return 0
        with tempfile.TemporaryDirectory(prefix="vmibridge-") as folder:
            engine = Engine(engine_name(options.engine), Path(folder))
            state = source_state(options.source)
            if not options.names:
                for image in other_images():
                    engine.bring_as_it_is(image)
            for each in options.names or IMAGES:
                engine.build(
                    each,
                    platforms=options.platform,
                    is_clean=options.clean,
                    state=state,
                )
    except (BuildError, RegistryError, subprocess.SubprocessError) as error:
        print(f"images: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

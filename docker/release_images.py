"""Makes a release of the images in a folder: built from nothing, summed, signed and verified.

    python docker/release_images.py FOLDER --key KEY [--platform PLATFORM,...] [--registry PLACE]
    python docker/release_images.py FOLDER --unsigned
    python docker/release_images.py FOLDER --verify [--public-key KEY]

Needs podman, and for signatures cosign (version 2 or later). The key is yours: a file of `cosign
generate-key-pair`, or what else cosign takes for --key. What is in FOLDER afterwards is on top of
release_folder.py. With --registry the images are pushed to PLACE/NAME:VERSION, too, and there
they are signed by their digests, with their SBOMs as attestations.

Progress goes to standard error, and with --json the content of release.json to standard output.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from base_images import ARCHITECTURES, native_platform
from build_images import IMAGES, Engine, platforms_of
from container_engine import BuildError
from release_folder import RELEASE, SIGNATURE, SUMS, ReleaseError, sha256_of, verify, write_sums
from source_state import SourceState, source_state

NAMES = ("bridge", "builder", "qemu", "certificates")
SBOMS = ("bridge", "qemu")
"""The images that have an SBOM in /usr/share/sbom."""
COSIGN_SECONDS = 300
PUSH_SECONDS = 1800


class Cosign:
    """cosign with a key of the user."""

    def __init__(self, key: str | None, public_key: str | None) -> None:
        self.key = key
        self.public_key = public_key
        if (key or public_key) and not shutil.which("cosign"):
            raise ReleaseError(
                "cosign is not in PATH, so nothing can be signed or checked; install it "
                "(docs.sigstore.dev), or say --unsigned"
            )

    def run(self, *arguments: str) -> None:
        try:
            done = subprocess.run(["cosign", *arguments], check=False, timeout=COSIGN_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise ReleaseError(f"cosign {arguments[0]}: nothing in {COSIGN_SECONDS} s") from error
        if done.returncode:
            raise ReleaseError(f"cosign {arguments[0]}: exit status {done.returncode}")

    def sign_sums(self, folder: Path) -> None:
        if self.key is None:
            return
        bundle = str(folder / SIGNATURE)
        sums = str(folder / SUMS)
        self.run("sign-blob", "--yes", "--key", self.key, "--bundle", bundle, sums)

    def verify_sums(self, folder: Path) -> None:
        if self.public_key is None:
            return
        bundle = str(folder / SIGNATURE)
        self.run("verify-blob", "--key", self.public_key, "--bundle", bundle, str(folder / SUMS))

    def sign_pushed(self, reference: str, sbom: Path | None) -> None:
        """`reference` ends with a digest: a tag may change before it is signed."""
        if self.key is None:
            return
        self.run("sign", "--yes", "--recursive", "--key", self.key, reference)
        if sbom is not None:
            kind = ("--type", "cyclonedx", "--predicate", str(sbom))
            self.run("attest", "--yes", "--key", self.key, *kind, reference)


class Release:
    """One release, as it is made."""

    def __init__(self, engine: Engine, folder: Path, state: SourceState, cosign: Cosign) -> None:
        self.engine = engine
        self.folder = folder
        self.state = state
        self.cosign = cosign
        self._done = 0
        self._steps = 0

    def make(self, names: list[str], platforms: list[str], registry: str | None) -> None:
        """Raises `BuildError` and `ReleaseError`: what is in the folder then is no release."""
        self._steps = len(names) * (1 + len(platforms)) + len(names) * bool(registry) + 2
        images = []
        for name in names:
            tag = f"{IMAGES[name].rpartition(':')[0]}:{self.state.version}"
            self._tell(f"{name}: builds it for {', '.join(platforms)}")
            self.engine.build(name, tag=tag, platforms=platforms, is_clean=True, state=self.state)
            written = [self._write(name, tag, each, len(platforms) > 1) for each in platforms]
            if registry:
                self._push(tag, registry, written)
            images += written
        release = {
            "version": self.state.version,
            "revision": self.state.revision,
            "epoch": self.state.epoch,
            "images": images,
        }
        (self.folder / RELEASE).write_text(json.dumps(release, indent=1) + "\n")
        self._tell("sums and signature")
        write_sums(self.folder)
        self.cosign.sign_sums(self.folder)
        self._tell("verifies what was written")
        verify(self.folder)
        self.cosign.verify_sums(self.folder)

    def _tell(self, step: str) -> None:
        self._done += 1
        print(f"release: [{self._done}/{self._steps}] {step}", file=sys.stderr, flush=True)

    def _write(self, name: str, tag: str, platform: str, is_listed: bool) -> dict[str, Any]:
        """One image into the folder; returns what release.json says of it."""
        architecture = ARCHITECTURES[platform]
        own = f"{tag}-{architecture}" if is_listed else tag
        title = tag.rpartition("/")[2].partition(":")[0]
        self._tell(f"{name}: writes it for {platform}")
        place = self.folder / "images" / f"{title}-{architecture}"
        place.parent.mkdir(exist_ok=True)
        saved = ("save", "--quiet", "--format=docker-dir", "--compress", "-o", str(place), own)
        self.engine.printed(*saved, seconds=PUSH_SECONDS)
        sbom = None
        if name in SBOMS:
            sbom = f"sbom/{title}-{architecture}.json"
            self._take(own, f"/usr/share/sbom/{title}.json", self.folder / sbom)
        return {
            "name": title,
            "platform": platform,
            "tag": own,
            "id": self.engine.printed("image", "inspect", "--format={{.Id}}", own),
            "digest": f"sha256:{sha256_of(place / 'manifest.json')}",
            "folder": str(place.relative_to(self.folder)),
            "sbom": sbom,
        }

    def _take(self, image: str, path: str, target: Path) -> None:
        """A file of an image, whose programs need not run here."""
        target.parent.mkdir(exist_ok=True)
        container = self.engine.printed("create", image)
        try:
            self.engine.printed("cp", f"{container}:{path}", str(target))
        finally:
            self.engine.printed("rm", container)

    def _push(self, tag: str, registry: str, images: list[dict[str, Any]]) -> None:
        self._tell(f"{tag}: pushes it to {registry}")
        for image in images:
            local = image["tag"]
            reference = f"{registry}/{local.rpartition('/')[2]}"
            image["pushed"] = self._pushed(reference, "push", "--quiet", local)
            sbom = self.folder / image["sbom"] if image["sbom"] else None
            self.cosign.sign_pushed(image["pushed"], sbom)
        if len(images) > 1:
            reference = f"{registry}/{tag.rpartition('/')[2]}"
            listed = self._pushed(reference, "manifest", "push", "--quiet", "--all", tag)
            self.cosign.sign_pushed(listed, None)
            for image in images:
                image["list"] = listed

    def _pushed(self, reference: str, *command: str) -> str:
        """Returns PLACE/NAME@DIGEST, as the registry has it."""
        file = self.engine.folder / "digest"
        target = f"docker://{reference}"
        self.engine.printed(*command, f"--digestfile={file}", target, seconds=PUSH_SECONDS)
        return f"{reference.rpartition(':')[0]}@{file.read_text().strip()}"


def checked_state(url: str | None) -> SourceState:
    """What is released. Raises `ReleaseError` if nobody could build it again."""
    state = source_state(url)
    if state.is_changed or state.epoch is None:
        raise ReleaseError("the checkout differs from its commit, or git cannot say: commit first")
    return state


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="new, or empty")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--platform", type=platforms_of, default=[], metavar="PLATFORM,...")
    parser.add_argument("--registry", metavar="PLACE", help="push there, such as ghcr.io/OWNER")
    parser.add_argument("--source", metavar="URL", help="where the source is to be had")
    parser.add_argument("--key", help="cosign's --key: sign with it")
    parser.add_argument("--public-key", metavar="KEY", help="check the signature with it")
    parser.add_argument("--unsigned", action="store_true", help="do not sign")
    parser.add_argument("--verify", action="store_true", help="make nothing, check FOLDER")
    parser.add_argument("--json", action="store_true", help="print what release.json has")
    options = parser.parse_intermixed_args()
    if unknown := set(options.names) - set(NAMES):
        parser.error(f"there is no image {', '.join(sorted(unknown))}")
    if not options.verify and (options.key is None) != options.unsigned:
        parser.error("one of --key KEY and --unsigned")
    try:
        cosign = Cosign(options.key, options.public_key)
        if options.verify:
            release = verify(options.folder)
            cosign.verify_sums(options.folder)
        else:
            release = made(options, cosign)
    except (BuildError, ReleaseError, OSError, subprocess.SubprocessError) as error:
        print(f"release: {error}", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(release, indent=1))
    return 0


def made(options: argparse.Namespace, cosign: Cosign) -> dict[str, Any]:
    folder: Path = options.folder
    state = checked_state(options.source)
    if not shutil.which("podman"):
        raise ReleaseError("needs podman")
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ReleaseError(f"{folder}: not empty")
    with tempfile.TemporaryDirectory(prefix="vmibridge-") as name:
        engine = Engine("podman", Path(name))
        engine.output = sys.stderr
        release = Release(engine, folder, state, cosign)
        names = options.names or list(NAMES)
        release.make(names, options.platform or [native_platform()], options.registry)
    return verify(folder)


if __name__ == "__main__":
    sys.exit(main())

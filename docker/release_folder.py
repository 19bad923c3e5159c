"""The folder of a release: what is in it, its sums, and whether all of it is right.

    release.json           version, commit, time, and for each image and platform its id and digest
    images/NAME-ARCH/      the image, as `podman pull dir:PATH` takes it
    sbom/NAME-ARCH.json    what is in it, in the format of CycloneDX
    SHA256SUMS             of each of these files, as sha256sum(1) checks it
    SHA256SUMS.sigstore.json   its signature, if the release is signed

A digest is the SHA-256 of an image's manifest.json, which has those of its layers.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from source_state import PREFIX

RELEASE = "release.json"
SUMS = "SHA256SUMS"
SIGNATURE = "SHA256SUMS.sigstore.json"
CHUNK = 1 << 20
LINE = re.compile(r"([0-9a-f]{64})  ([^/\s][^\s]*)")


class ReleaseError(Exception):
    """A release cannot be made, or is not what it says."""


def sha256_of(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(CHUNK):
            found.update(data)
    return found.hexdigest()


def write_sums(folder: Path) -> None:
    """SHA256SUMS, of all files that are there."""
    lines = [f"{sha256_of(path)}  {path.relative_to(folder)}\n" for path in _files(folder)]
    (folder / SUMS).write_text("".join(lines))


def verify(folder: Path) -> dict[str, Any]:
    """Returns the content of release.json. Raises `ReleaseError` for what is missing, too much or
    other than it should be. The signature is not asked for: that is cosign's."""
    try:
        _verify_sums(folder)
        release: dict[str, Any] = json.loads((folder / RELEASE).read_bytes())
        for image in release["images"]:
            _verify_image(folder / image["folder"], image, release)
            if image["sbom"] is not None:
                _verify_sbom(folder / image["sbom"], image, release)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ReleaseError(f"{folder}: {error!r}") from error
    return release


def _files(folder: Path) -> list[Path]:
    own = {SUMS, SIGNATURE}
    found = [path for path in folder.rglob("*") if path.is_file()]
    return sorted(path for path in found if str(path.relative_to(folder)) not in own)


def _verify_sums(folder: Path) -> None:
    told = {}
    *lines, end = (folder / SUMS).read_text().split("\n")
    for line in [*lines, *([end] if end else [])]:
        match = LINE.fullmatch(line)
        if match is None:
            raise ReleaseError(f"{folder / SUMS}: no sum: {line[:200]!r}")
        told[match[2]] = match[1]
    there = {str(path.relative_to(folder)): path for path in _files(folder)}
    if other := sorted(told.keys() ^ there.keys()):
        raise ReleaseError(f"{folder / SUMS}: {other[0]} is only there or only listed")
    for name, path in there.items():
        if sha256_of(path) != told[name]:
            raise ReleaseError(f"{path}: not what {SUMS} says")


def _verify_image(folder: Path, image: dict[str, Any], release: dict[str, Any]) -> None:
    manifest = folder / "manifest.json"
    if f"sha256:{sha256_of(manifest)}" != image["digest"]:
        raise ReleaseError(f"{manifest}: not of the digest {image['digest']}")
    told = json.loads(manifest.read_bytes())
    for blob in (told["config"], *told["layers"]):
        path = folder / blob["digest"].removeprefix("sha256:")
        if sha256_of(path) != path.name or path.stat().st_size != blob["size"]:
            raise ReleaseError(f"{path}: not what {manifest} says")
    if told["config"]["digest"].removeprefix("sha256:") != image["id"]:
        raise ReleaseError(f"{manifest}: of another image than {image['id']}")
    config = json.loads((folder / image["id"]).read_bytes())
    if f"{config['os']}/{config['architecture']}" != image["platform"]:
        raise ReleaseError(f"{folder}: not for {image['platform']}")
    for label in ("version", "revision"):
        if config["config"]["Labels"][f"{PREFIX}.{label}"] != release[label]:
            raise ReleaseError(f"{folder}: another {label} than {release[label]}")


def _verify_sbom(path: Path, image: dict[str, Any], release: dict[str, Any]) -> None:
    component = json.loads(path.read_bytes())["metadata"]["component"]
    if (component["name"], component["version"]) != (image["name"], release["version"]):
        raise ReleaseError(f"{path}: of {component['name']} {component['version']}")

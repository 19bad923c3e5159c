"""What is in the images, read from their file systems: no program of them is run."""

import json
import re
import subprocess
import tarfile
from types import SimpleNamespace

import pytest
from build_images import IMAGES
from image_sbom import os_release, stanzas
from sbom_schema import check_sbom

pytestmark = pytest.mark.containers

MAX_BYTES = 70_000_000
"""The bridge's image, above what it builds upon."""
PREFIX = "org.opencontainers.image"
LABELS = {
    *("title", "description", "version", "revision", "created", "source", "documentation"),
    *("licenses", "vendor", "base.name", "base.digest"),
}
KEPT = ("var/lib/dpkg/status", "etc/os-release", "usr/lib/os-release", "usr/share/sbom/")
UNCHECKED = 1
"""The flags of bytecode that is valid whatever its source is (PEP 552)."""
EMPTIED = re.compile(r"(var/lib/apt/lists|var/cache/(apt|ldconfig)|var/log|tmp|root/\.cache)/.+")
PIP = re.compile(r".*(/bin/pip[0-9.]*|/(pip|ensurepip|setuptools)/__init__\.py|/pip-[^/]*\.whl)")
COMPILER = re.compile(r".*/bin/([a-z0-9_]+-)*(cc|gcc|g\+\+|c\+\+|cpp|clang|as|ld|make)(-[0-9.]+)?")


@pytest.fixture(scope="module", params=["bridge", "qemu"])
def contents(request, engine):
    """The files of an image by their paths, and the text of a few."""
    container = engine.printed("create", IMAGES[request.param])
    files, texts, bytecode = {}, {}, {}
    command = [engine.name, "export", container]
    with subprocess.Popen(command, env=engine.environment, stdout=subprocess.PIPE) as export:
        with tarfile.open(fileobj=export.stdout, mode="r|") as archive:
            for member in archive:
                name = member.name.removeprefix("./")
                files[name] = member
                if member.isfile() and name.startswith(KEPT):
                    texts[name] = archive.extractfile(member).read().decode()
                elif member.isfile() and name.endswith(".pyc"):
                    bytecode[name] = archive.extractfile(member).read(16)
        assert export.wait() == 0
    engine.printed("rm", container)
    return SimpleNamespace(
        image=IMAGES[request.param],
        title=IMAGES[request.param].rpartition("/")[2].partition(":")[0],
        files=files,
        texts=texts,
        bytecode=bytecode,
    )


def inspected(engine, image, form):
    return json.loads(engine.printed("image", "inspect", f"--format={{{{json {form}}}}}", image))


def matching(contents, pattern):
    found = [name for name, member in contents.files.items() if not member.isdir()]
    return [name for name in found if pattern.fullmatch(name)]


def test_there_is_no_pip_and_no_compiler(contents):
    assert matching(contents, PIP) == []
    assert matching(contents, COMPILER) == []


def test_there_are_no_lists_of_apt_no_caches_and_no_logs(contents):
    assert matching(contents, EMPTIED) == []
    assert (
        matching(contents, re.compile(r"(etc|var/lib/dpkg|var/cache/debconf)/[^/]*(-|-old)")) == []
    )
    assert contents.files.get("etc/machine-id") is None or not contents.files["etc/machine-id"].size


def test_no_file_gives_the_rights_of_another_user(contents):
    raised = [name for name, each in contents.files.items() if each.isfile() and each.mode & 0o6000]
    assert raised == []


def test_bytecode_does_not_go_by_time_stamps(contents):
    """An image has other time stamps than the stage that it was made in."""
    assert {header[4:8] for header in contents.bytecode.values()} <= {b"\x01\0\0\0"}
    compiled = any("/asyncio/" in name for name in contents.bytecode)
    assert compiled == (contents.title == "vmibridge"), "of Python's own library, too"


def test_the_sbom_has_each_package_of_debian_and_nothing_else_of_it(contents):
    sbom = json.loads(contents.texts[f"usr/share/sbom/{contents.title}.json"])
    listed = {
        (each["name"], each["version"])
        for each in sbom["components"]
        if each.get("purl", "").startswith("pkg:deb/debian/")
    }
    packages = stanzas(contents.texts["var/lib/dpkg/status"])
    assert listed == {(each["Package"], each["Version"]) for each in packages}
    assert "libc6" in {name for name, _ in listed}
    release = contents.texts.get("usr/lib/os-release") or contents.texts["etc/os-release"]
    (system,) = [each for each in sbom["components"] if each["type"] == "operating-system"]
    assert system["version"] == os_release(release)["VERSION_ID"]


def test_the_sbom_is_of_the_schema(contents):
    text = contents.texts[f"usr/share/sbom/{contents.title}.json"]
    check_sbom(text)


def test_the_sbom_has_what_is_in_no_package_of_debian(contents):
    sbom = json.loads(contents.texts[f"usr/share/sbom/{contents.title}.json"])
    names = {each["name"].lower().replace("_", "-") for each in sbom["components"]}
    assert sbom["metadata"]["component"]["name"] == contents.title
    if contents.title == "vmibridge-qemu":
        assert {"vmibridge-plugin", "qemu-system-x86"} <= names
        return
    info = re.compile(
        r"opt/vmibridge/lib/python3\.\d+/site-packages/([^/]+)-[^-/]+\.dist-info/METADATA"
    )
    installed = {info.fullmatch(name)[1] for name in matching(contents, info)}
    assert {name.lower().replace("_", "-") for name in installed} <= names
    assert {"cpython", "vmibridge", "anyio", "msgspec", "cyclopts", "trio"} <= names
    assert not {"pip", "hatchling", "pytest", "cyclonedx-bom"} & names


def test_the_image_has_every_label(contents, engine):
    found = inspected(engine, contents.image, ".Config.Labels")
    assert found.keys() == {f"{PREFIX}.{label}" for label in LABELS}
    assert re.fullmatch(r"[0-9a-f]{40}|unknown", found[f"{PREFIX}.revision"])
    assert re.fullmatch(r"\d{4}(-\d\d){2}T\d\d(:\d\d){2}Z", found[f"{PREFIX}.created"])
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", found[f"{PREFIX}.base.digest"])
    assert found[f"{PREFIX}.version"] != "unknown"


def test_the_bridge_is_a_small_image(engine):
    base = inspected(engine, IMAGES["bridge"], ".Config.Labels")[f"{PREFIX}.base.name"]
    sizes = [inspected(engine, image, ".Size") for image in (IMAGES["bridge"], base)]
    assert sizes[0] - sizes[1] <= MAX_BYTES

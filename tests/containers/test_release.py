"""The folder of a release, what is signed of it, and the whole with podman.

There is no cosign here: the tests have a program of that name which is a fake. It keeps its
arguments, and writes the file that cosign would.
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import release_images
from release_folder import ReleaseError, sha256_of, verify, write_sums
from source_state import PREFIX, SourceState

ROOT = Path(__file__).parents[2]

STATE = SourceState("1.2.3", "c0" * 20, 1_700_000_000, False, "https://source.test/x")
FAKE_COSIGN = """#!{python}
# A fake: it signs nothing.
import json, sys
with open({log!r}, "a") as log:
    log.write(json.dumps(sys.argv[1:]) + "\\n")
if "--bundle" in sys.argv and sys.argv[1] == "sign-blob":
    open(sys.argv[sys.argv.index("--bundle") + 1], "w").write("a fake signature")
sys.exit({status})
"""


@pytest.fixture
def fake_cosign(tmp_path, monkeypatch):
    """The fake in PATH; calling it gives the arguments that it got."""
    folder = tmp_path / "bin"
    folder.mkdir()
    log = tmp_path / "cosign.log"

    def install(status=0):
        text = FAKE_COSIGN.format(python=sys.executable, log=str(log), status=status)
        (folder / "cosign").write_text(text)
        (folder / "cosign").chmod(0o755)

    install()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def ran():
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    ran.install = install
    return ran


@pytest.fixture
def without_cosign(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))


def put(folder, data):
    """A blob of an image, and what its manifest says of it."""
    name = hashlib.sha256(data).hexdigest()
    (folder / name).write_bytes(data)
    return {"digest": f"sha256:{name}", "size": len(data)}


@pytest.fixture
def folder(tmp_path):
    """A release of one image, made by hand."""
    found = tmp_path / "release"
    place = found / "images/vmibridge-amd64"
    place.mkdir(parents=True)
    labels = {f"{PREFIX}.version": "1.2.3", f"{PREFIX}.revision": "c0" * 20}
    config = {"os": "linux", "architecture": "amd64", "config": {"Labels": labels}}
    told = put(place, json.dumps(config).encode())
    manifest = {"config": told, "layers": [put(place, b"a layer")]}
    (place / "manifest.json").write_text(json.dumps(manifest))
    sbom = {"metadata": {"component": {"name": "vmibridge", "version": "1.2.3"}}}
    (found / "sbom").mkdir()
    (found / "sbom/vmibridge-amd64.json").write_text(json.dumps(sbom))
    image = {
        "name": "vmibridge",
        "platform": "linux/amd64",
        "id": told["digest"].removeprefix("sha256:"),
        "digest": f"sha256:{sha256_of(place / 'manifest.json')}",
        "folder": "images/vmibridge-amd64",
        "sbom": "sbom/vmibridge-amd64.json",
    }
    release = {"version": "1.2.3", "revision": "c0" * 20, "images": [image]}
    (found / "release.json").write_text(json.dumps(release))
    write_sums(found)
    return found


# --- what was written -------------------------------------------------------------------


def test_what_was_written_is_verified(folder):
    assert verify(folder)["images"][0]["name"] == "vmibridge"
    done = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=folder, check=False
    )
    assert done.returncode == 0


def every_file(folder):
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def test_a_file_that_was_changed_is_found(folder):
    for path in every_file(folder):
        before = path.read_bytes()
        path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        with pytest.raises(ReleaseError):
            verify(folder)
        path.write_bytes(before)
    assert verify(folder)


def test_a_file_that_is_missing_or_too_much_is_found(folder):
    for path in every_file(folder):
        data = path.read_bytes()
        path.unlink()
        with pytest.raises(ReleaseError):
            verify(folder)
        path.write_bytes(data)
    (folder / "images/more").write_text("")
    with pytest.raises(ReleaseError, match="images/more"):
        verify(folder)


def change(folder, fields):
    path = folder / "release.json"
    release = json.loads(path.read_text())
    release["images"][0].update({k: v for k, v in fields.items() if k in release["images"][0]})
    release.update({k: v for k, v in fields.items() if k in release})
    path.write_text(json.dumps(release))
    write_sums(folder)


@pytest.mark.parametrize(
    "field",
    [
        {"digest": f"sha256:{'0' * 64}"},
        {"id": "0" * 64},
        {"platform": "linux/arm64"},
        {"version": "1.2.4"},
        {"revision": "00" * 20},
        {"name": "vmibridge-qemu"},
        {"folder": "images/other"},
        {"images": [{}]},
        {"images": 3},
    ],
    ids=lambda field: next(iter(field)),
)
def test_sums_alone_are_not_believed(field, folder):
    """They are right for what release.json says wrongly."""
    change(folder, field)
    with pytest.raises(ReleaseError):
        verify(folder)


@pytest.mark.parametrize("line", ["", "zz  release.json", f"{'0' * 64}  /etc/passwd"])
def test_a_line_that_is_no_sum_is_refused(line, folder):
    path = folder / "SHA256SUMS"
    path.write_text(f"{path.read_text()}{line}\n")
    with pytest.raises(ReleaseError, match="no sum"):
        verify(folder)


# --- signatures -------------------------------------------------------------------------


def test_the_sums_are_signed_with_the_key_of_the_user(folder, fake_cosign):
    cosign = release_images.Cosign("awskms:///alias/mine", "cosign.pub")
    cosign.sign_sums(folder)
    cosign.verify_sums(folder)
    bundle, sums = str(folder / "SHA256SUMS.sigstore.json"), str(folder / "SHA256SUMS")
    assert fake_cosign() == [
        ["sign-blob", "--yes", "--key", "awskms:///alias/mine", "--bundle", bundle, sums],
        ["verify-blob", "--key", "cosign.pub", "--bundle", bundle, sums],
    ]
    assert verify(folder), "with its signature beside it"


def test_what_was_pushed_is_signed_by_its_digest_with_its_sbom(fake_cosign, tmp_path):
    cosign = release_images.Cosign("own.key", None)
    reference = f"registry.test/own/vmibridge@sha256:{'0' * 64}"
    cosign.sign_pushed(reference, tmp_path / "sbom.json")
    predicate = ["--type", "cyclonedx", "--predicate", str(tmp_path / "sbom.json")]
    assert fake_cosign() == [
        ["sign", "--yes", "--recursive", "--key", "own.key", reference],
        ["attest", "--yes", "--key", "own.key", *predicate, reference],
    ]


def test_without_a_key_nothing_is_signed(folder, fake_cosign):
    cosign = release_images.Cosign(None, None)
    cosign.sign_sums(folder)
    cosign.verify_sums(folder)
    cosign.sign_pushed("registry.test/x@sha256:0", None)
    assert fake_cosign() == []


def test_a_signature_that_fails_fails_the_release(folder, fake_cosign):
    fake_cosign.install(status=3)
    with pytest.raises(ReleaseError, match="cosign sign-blob: exit status 3"):
        release_images.Cosign("own.key", None).sign_sums(folder)


# --- the command ------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch, capfd):
    """The command in this process: its status, standard output and standard error."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["release_images.py", *map(str, words)])
        try:
            status = release_images.main()
        except SystemExit as error:
            status = error.code
        return status, *capfd.readouterr()

    return run


@pytest.mark.usefixtures("without_cosign")
def test_it_says_before_all_work_that_cosign_is_missing(command, tmp_path):
    status, _, told = command(tmp_path / "release", "--key", "own.key")
    assert status == 1
    assert told.startswith("release: cosign is not in PATH")
    assert not (tmp_path / "release").exists()


@pytest.mark.parametrize("words", [[], ["--key", "own.key", "--unsigned"]])
def test_it_wants_to_be_told_whether_to_sign(words, command, tmp_path):
    status, _, told = command(tmp_path, *words)
    assert status == 2
    assert "one of --key KEY and --unsigned" in told


def test_names_may_follow_options(command, tmp_path):
    status, _, told = command(tmp_path, "--unsigned", "--source", "https://source.test", "bridg")
    assert status == 2
    assert "there is no image bridg" in told


@pytest.mark.parametrize("state", [{"is_changed": True}, {"epoch": None}])
def test_a_changed_checkout_is_not_released(state, command, tmp_path, monkeypatch):
    monkeypatch.setattr(release_images, "source_state", lambda url: STATE._replace(**state))
    status, _, told = command(tmp_path / "release", "--unsigned")
    assert status == 1
    assert "commit first" in told
    assert not (tmp_path / "release").exists()


def test_a_release_is_verified_by_the_command_too(command, folder, fake_cosign):
    status, printed, _ = command(folder, "--verify", "--public-key", "cosign.pub", "--json")
    assert status == 0
    assert json.loads(printed)["version"] == "1.2.3"
    assert [each[0] for each in fake_cosign()] == ["verify-blob"]
    (folder / "release.json").write_text("{}")
    status, printed, told = command(folder, "--verify")
    assert (status, printed) == (1, "")
    assert told.startswith(f"release: {folder}/release.json: not what SHA256SUMS says")


@pytest.mark.containers
def test_a_release_is_built_written_signed_and_verified(
    engine, command, fake_cosign, tmp_path, monkeypatch
):
    # The checkout of a test may differ from its commit.
    monkeypatch.setattr(release_images, "checked_state", release_images.source_state)
    target = tmp_path / "release"
    keys = ["--key", "own.key", "--public-key", "cosign.pub"]
    status, printed, told = command(target, *keys, "--json", "certificates")
    assert status == 0, told
    release = json.loads(printed)
    assert release == verify(target)
    (image,) = release["images"]
    assert image["name"] == "vmibridge-certificates"
    assert image["tag"] == f"localhost/vmibridge-certificates:{release['version']}"
    assert "release: [4/4] verifies what was written" in told
    assert [each[0] for each in fake_cosign()] == ["sign-blob", "verify-blob"]
    # It can be taken from there.
    pulled = engine.printed("pull", "-q", f"dir:{target / image['folder']}")
    assert pulled == image["id"]

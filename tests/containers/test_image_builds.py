"""How images are built, without building one: commands, labels, bases, SBOMs, registries."""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise
from pathlib import Path

import base_images
import build_images
import image_sbom
import pytest
import source_state
from base_images import Base
from container_engine import BuildError
from debian import DEBOOTSTRAP_SECONDS, DebianError
from registry import RegistryError, digest_of
from sbom_schema import check_sbom

ROOT = Path(__file__).parents[2]

DIGEST = f"sha256:{'5a' * 32}"
BASE = Base("3fe1", "localhost/stand-in/python:3.13-slim-trixie-amd64", DIGEST)
STATE = source_state.SourceState("1.2.3", "c0" * 20, 1_700_000_000, False, "https://source.test/x")


class FakeEngine(build_images.Engine):
    """An engine that runs nothing and keeps what it would run."""

    def __init__(self, name, folder, present=(), refused=()):
        self.name, self.folder, self.environment = name, folder, {}
        self.present, self.refused = set(present), refused
        self.ran = []
        self.seconds = {}
        self.platform = "linux/amd64"
        """Of the image that was pulled last."""

    def run(self, *arguments, **options):
        self.ran.append(arguments)
        self.seconds[arguments] = options.get("seconds")
        return type("Done", (), {"returncode": 0})

    def printed(self, *arguments, **options):
        self.ran.append(arguments)
        if arguments[0] in self.refused:
            raise BuildError("refused")
        if arguments[0] == "pull":
            self.platform = arguments[2].removeprefix("--platform=")
        told = f"f00d {self.platform}" if "{{.Id}}" in arguments[2] else None
        return told or f"docker.io/library/python@{DIGEST}"

    def has(self, image):
        return image in self.present

    def _reach(self):
        return []

    def _normalize(self, tag):
        self.ran.append(("normalize", tag))

    def builds(self):
        return [list(arguments) for arguments in self.ran if arguments[0] == "build"]


def values(command, option):
    """All values of an option that is given again and again."""
    return [value for each, value in pairwise(command) if each == option]


# --- commands ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", build_images.IMAGES)
def test_podman_builds_with_the_time_of_the_commit(name, tmp_path):
    command = FakeEngine("podman", tmp_path).command(name, "tag", "linux/amd64", BASE, STATE)
    assert "--timestamp=1700000000" in command
    assert "SOURCE_DATE_EPOCH=1700000000" in values(command, "--build-arg")
    assert "--identity-label=false" in command, "which has podman's version"
    assert "BASE=3fe1" in values(command, "--build-arg")
    labels = dict(each.split("=", 1) for each in values(command, "--label"))
    prefix = source_state.PREFIX
    assert labels == {
        f"{prefix}.version": "1.2.3",
        f"{prefix}.revision": "c0" * 20,
        f"{prefix}.created": "2023-11-14T22:13:20Z",
        f"{prefix}.source": "https://source.test/x",
        f"{prefix}.documentation": "https://source.test/x",
        f"{prefix}.base.name": BASE.name,
        f"{prefix}.base.digest": DIGEST,
    }


def test_docker_gets_no_option_of_podman(tmp_path):
    command = FakeEngine("docker", tmp_path).command("bridge", "tag", "linux/amd64", BASE, STATE)
    assert not [word for word in command if word.startswith(("--timestamp", "--ignorefile"))]
    assert "SOURCE_DATE_EPOCH=1700000000" in values(command, "--build-arg")


def test_without_a_commit_there_is_no_time(tmp_path):
    state = STATE._replace(epoch=None)
    command = FakeEngine("podman", tmp_path).command("bridge", "tag", "linux/amd64", BASE, state)
    assert not [word for word in command if "timestamp" in word or "EPOCH" in word]
    assert not [word for word in command if "image.created" in word]


@pytest.fixture
def emulated(tmp_path, monkeypatch):
    """A kernel that is told how to run the programs of either platform."""
    for emulator in base_images.EMULATORS.values():
        (tmp_path / emulator).write_text(f"enabled\ninterpreter /x/{emulator}\nflags: PF\n")
    monkeypatch.setattr(base_images, "BINFMT", tmp_path)


@pytest.mark.usefixtures("emulated")
def test_several_platforms_are_an_image_each_and_a_list(tmp_path):
    engine = FakeEngine("podman", tmp_path)
    both = ["linux/amd64", "linux/arm64"]
    engine.build("bridge", tag="localhost/x:1", platforms=both, is_clean=True, state=STATE)
    pulled = [each for each in engine.ran if each[0] == "pull"]
    assert [each[2] for each in pulled] == [f"--platform={each}" for each in both]
    builds = engine.builds()
    assert [values(each, "--tag") for each in builds] == [
        ["localhost/x:1-amd64"],
        ["localhost/x:1-arm64"],
    ]
    assert [f"--platform={each}" in build for each, build in zip(both, builds, strict=True)] == [
        True
    ] * 2
    assert all("--no-cache" in each for each in builds)
    here, emulated = sorted(engine.seconds[tuple(each)] for each in builds)
    assert emulated == 4 * here
    normal = [each[1] for each in engine.ran if each[0] == "normalize"]
    assert normal == ["localhost/x:1-amd64", "localhost/x:1-arm64"]
    assert [
        each for each in engine.ran if each[:2] in {("manifest", "create"), ("manifest", "add")}
    ] == [
        ("manifest", "create", "localhost/x:1"),
        ("manifest", "add", "localhost/x:1", "containers-storage:localhost/x:1-amd64"),
        ("manifest", "add", "localhost/x:1", "containers-storage:localhost/x:1-arm64"),
    ]


@pytest.mark.usefixtures("emulated")
def test_docker_builds_one_platform_at_a_time(tmp_path):
    both = ["linux/amd64", "linux/arm64"]
    with pytest.raises(BuildError, match="needs podman"):
        FakeEngine("docker", tmp_path).build("bridge", platforms=both, state=STATE)


def test_an_emulated_debootstrap_has_more_time(tmp_path, monkeypatch):
    limits = {}

    def made(suite, folder, packages, architecture, *, seconds):
        limits[architecture] = seconds
        raise DebianError("none is made here")

    monkeypatch.setattr(base_images, "debootstrap", made)
    monkeypatch.setattr(base_images, "need_emulator", lambda wanted: None)
    monkeypatch.setattr(base_images.platform, "machine", lambda: "x86_64")
    for wanted in base_images.ARCHITECTURES:
        with pytest.raises(BuildError, match="none is made here"):
            base_images._make_debian("debian:trixie-slim", tmp_path / wanted, wanted)
    assert limits == {"amd64": DEBOOTSTRAP_SECONDS, "arm64": 4 * DEBOOTSTRAP_SECONDS}


INSTALL = "apt-get install qemu-user-static binfmt-support"
ENABLE = "update-binfmts --enable qemu-aarch64"


@pytest.mark.parametrize(
    ("entry", "has_binfmts", "steps"),
    [
        (None, False, f"{INSTALL} && {ENABLE}"),
        # Installed where no service is started, or binfmt_misc is not mounted.
        (None, True, ENABLE),
        ("disabled\nflags: PF\n", True, ENABLE),
        # Of an emulator that is looked for in the container.
        (
            "enabled\ninterpreter /usr/bin/qemu-aarch64\nflags: P\n",
            True,
            f"update-binfmts --disable qemu-aarch64 && {INSTALL} && {ENABLE}",
        ),
    ],
    ids=["nothing", "not enabled", "disabled", "not for containers"],
)
def test_a_platform_whose_programs_cannot_run_says_all_there_is_to_do(
    entry, has_binfmts, steps, tmp_path, monkeypatch
):
    monkeypatch.setattr(base_images, "BINFMT", tmp_path)
    monkeypatch.setattr(base_images, "SBIN", str(tmp_path / "sbin"))
    monkeypatch.setattr(base_images.platform, "machine", lambda: "x86_64")
    file = tmp_path / "qemu-aarch64"
    if entry:
        file.write_text(entry)
    if has_binfmts:
        (tmp_path / "sbin").mkdir()
        (tmp_path / "sbin/update-binfmts").touch(0o755)
    with pytest.raises(BuildError) as raised:
        FakeEngine("podman", tmp_path).build("bridge", platforms=["linux/arm64"], state=STATE)
    told = f"linux/arm64: its programs cannot run here ({file}); as root: {steps}"
    assert str(raised.value) == told


def test_an_unknown_platform_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["build_images.py", "--platform", "linux/amd64,linux/mips"])
    with pytest.raises(SystemExit):
        build_images.main()
    assert "linux/mips: not of linux/amd64, linux/arm64" in capsys.readouterr().err


# --- bases ------------------------------------------------------------------------------


@pytest.fixture
def pinned(tmp_path, monkeypatch):
    def pin(**pins):
        file = tmp_path / "pins.json"
        file.write_text(json.dumps(pins))
        monkeypatch.setattr(base_images, "PINS", file)

    return pin


IMAGE = "docker.io/library/python:3.13-slim-trixie"


def test_a_pinned_base_is_taken_by_its_digest(tmp_path, pinned):
    pinned(**{IMAGE: DIGEST})
    engine = FakeEngine("podman", tmp_path)
    base = base_images.bring(engine, IMAGE, "linux/arm64")
    pulled = ("pull", "-q", "--platform=linux/arm64", f"docker.io/library/python@{DIGEST}")
    assert engine.ran[0] == pulled
    assert base == ("f00d", IMAGE, DIGEST)


def test_a_base_that_is_not_pinned_is_taken_by_its_tag(tmp_path, pinned):
    pinned()
    engine = FakeEngine("podman", tmp_path)
    assert base_images.bring(engine, IMAGE, "linux/amd64") == ("f00d", IMAGE, DIGEST)
    assert engine.ran[0][-1] == IMAGE


def cannot_make(*arguments):
    raise BuildError("no podman with debootstrap, as root")


def test_without_a_registry_and_a_stand_in_what_is_here_is_taken(tmp_path, pinned, monkeypatch):
    monkeypatch.setattr(base_images, "make_stand_in", cannot_make)
    pinned()
    engine = FakeEngine("podman", tmp_path, present=[IMAGE], refused=["pull"])
    assert base_images.bring(engine, IMAGE, "linux/amd64").name == IMAGE
    with pytest.raises(BuildError, match="no podman with debootstrap"):
        base_images.bring(FakeEngine("podman", tmp_path, refused=["pull"]), IMAGE, "linux/amd64")


def test_a_base_for_another_platform_is_refused(tmp_path, pinned):
    pinned()
    made = base_images.stand_in(IMAGE, "linux/arm64")
    engine = FakeEngine("podman", tmp_path, present=[made])
    with pytest.raises(BuildError, match="for linux/amd64 alone, and not for linux/arm64"):
        base_images.bring(engine, IMAGE, "linux/arm64")


def test_a_stand_in_never_has_the_name_of_what_it_stands_for(tmp_path, pinned):
    pinned()
    made = base_images.stand_in(IMAGE, "linux/arm64")
    assert made == "localhost/stand-in/python:3.13-slim-trixie-arm64"
    engine = FakeEngine("podman", tmp_path, present=[made])
    engine.platform = "linux/arm64"
    assert base_images.bring(engine, IMAGE, "linux/arm64").name == made
    assert "pull" not in {each[0] for each in engine.ran}


def test_users_of_a_stand_in_were_all_made_on_one_day():
    shadow = "root:*:20787:0:99999:7:::\nqemu:!:20788:0:99999:7:::\nnew:*::::::\n"
    told = "root:*:19000:0:99999:7:::\nqemu:!:19000:0:99999:7:::\nnew:*::::::\n"
    assert base_images.with_day(shadow, 19000) == told


def test_the_pins_are_of_images_that_are_built_upon():
    used = {image for name in build_images.IMAGES for image in build_images.bases(name)}
    pins = json.loads(base_images.PINS.read_text())
    assert pins.keys() <= used
    assert all(value.startswith("sha256:") for value in pins.values())


# --- registries -------------------------------------------------------------------------


@pytest.fixture
def fake_registry():
    """Not a registry: it answers as one, with what `answers` holds, and keeps what it was asked."""
    asked, answers = [], {}

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append((self.path, self.headers["Accept"], self.headers["Authorization"]))
            if answers.get("token") and not self.headers["Authorization"]:
                self.send_response(401)
                host, port = self.server.server_address
                realm = answers.get("realm", f"http://{host}:{port}/token")
                told = f'Bearer realm="{realm}",service="a registry",scope="repository:x/y:pull"'
                self.send_header("WWW-Authenticate", told)
            else:
                self.send_response(200)
                self.send_header("Docker-Content-Digest", answers["digest"])
            self.end_headers()

        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"token": answers["token"]}).encode())

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    server.asked, server.answers = asked, answers
    server.image = f"127.0.0.1:{server.server_address[1]}/x/y:1-slim"
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_registry_is_asked_for_the_digest_of_the_list(fake_registry):
    fake_registry.answers["digest"] = DIGEST
    assert digest_of(fake_registry.image, scheme="http") == DIGEST
    ((path, accepted, authorization),) = fake_registry.asked
    assert path == "/v2/x/y/manifests/1-slim"
    assert accepted.startswith("application/vnd.oci.image.index.v1+json, ")
    assert authorization is None


def test_a_registry_that_wants_a_token_gets_one(fake_registry):
    fake_registry.answers.update(digest=DIGEST, token="of an anonymous user")
    assert digest_of(fake_registry.image, scheme="http") == DIGEST
    assert fake_registry.asked[1] == "/token?service=a+registry&scope=repository%3Ax%2Fy%3Apull"
    assert fake_registry.asked[2][2] == "Bearer of an anonymous user"


@pytest.mark.parametrize("digest", ["", "sha256:12", f"{DIGEST} "[:-1] + "x", "md5:00"])
def test_what_is_no_digest_is_refused(digest, fake_registry):
    fake_registry.answers["digest"] = digest
    with pytest.raises(RegistryError, match="no digest"):
        digest_of(fake_registry.image, scheme="http")


def test_a_token_is_asked_for_by_the_same_scheme_alone(fake_registry):
    fake_registry.answers.update(digest=DIGEST, token="x", realm="file:///etc/passwd")
    with pytest.raises(RegistryError, match="it wants"):
        digest_of(fake_registry.image, scheme="http")


def test_a_registry_that_is_not_there_is_told():
    with pytest.raises(RegistryError, match=r"127\.0\.0\.1:1/x/y:1"):
        digest_of("127.0.0.1:1/x/y:1", scheme="http")


# --- what git says ----------------------------------------------------------------------


def test_the_time_may_be_given(monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "12")
    assert source_state.source_state().epoch == 12


def test_without_git_nothing_is_made_up(monkeypatch):
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    monkeypatch.setattr(source_state, "_git", lambda *arguments: None)
    state = source_state.source_state()
    assert (state.revision, state.epoch, state.is_changed, state.url) == (
        "unknown",
        None,
        True,
        "unknown",
    )
    assert state.version != "unknown"


def test_a_folder_of_this_machine_is_no_source(monkeypatch):
    told = {"remote": "/srv/a/checkout", "rev-parse": "ab" * 20}
    monkeypatch.setattr(source_state, "_git", lambda first, *_: told.get(first))
    assert source_state.source_state().url == "unknown"
    assert source_state.source_state("https://source.test").url == "https://source.test"


# --- SBOMs ------------------------------------------------------------------------------

STATUS = """\
Package: libstdc++6
Status: install ok installed
Architecture: amd64
Multi-Arch: same
Source: gcc-14 (14.2.0-19)
Version: 1:14.2.0-19+b1~x
Maintainer: Debian GCC Maintainers <gcc@lists.test>
Description: a library
 Version: of what is described
 .
 Package: not one

Package: gone
Status: deinstall ok config-files
Architecture: all
Version: 1

Package: bash
Status: install ok installed
Architecture: amd64
Version: 5.2.37-2
"""
SYSTEM = 'PRETTY_NAME="Debian GNU/Linux 13 (trixie)"\nVERSION_ID="13"\nID=debian\n'


@pytest.fixture
def written(tmp_path, monkeypatch):
    """The SBOM, as the command writes it."""
    (tmp_path / "status").write_text(STATUS)
    (tmp_path / "os-release").write_text(SYSTEM)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")

    def write(*options):
        words = ["image_sbom.py", "vmibridge-qemu", "1.2.3", *options, "-o", "out.json"]
        monkeypatch.setattr(sys, "argv", words)
        image_sbom.main()
        return (tmp_path / "out.json").read_text()

    return write


def test_an_sbom_has_installed_packages_with_their_urls(written):
    found = json.loads(written("--also", "vmibridge-plugin"))
    by_name = {each["name"]: each for each in found["components"]}
    assert by_name.keys() == {"bash", "libstdc++6", "debian", "vmibridge-plugin"}
    told = by_name["libstdc++6"]
    assert told["version"] == "1:14.2.0-19+b1~x"
    url = "pkg:deb/debian/libstdc%2B%2B6@1%3A14.2.0-19%2Bb1~x?arch=amd64&distro=debian-13"
    assert told["purl"] == url
    assert told["supplier"] == {"name": "Debian GCC Maintainers"}
    properties = {each["name"]: each["value"] for each in told["properties"]}
    assert properties == {"debian:source": "gcc-14", "debian:source-version": "14.2.0-19"}
    assert by_name["vmibridge-plugin"]["version"] == "1.2.3"
    assert found["metadata"]["timestamp"] == "2023-11-14T22:13:20Z"


def test_an_sbom_takes_in_that_of_python(written, tmp_path):
    environment = {
        "metadata": {"timestamp": "2020-01-01T00:00:00Z", "component": {"name": "root"}},
        "components": [{"type": "library", "bom-ref": "anyio==4", "name": "anyio", "version": "4"}],
        "dependencies": [{"ref": "root-component"}, {"ref": "anyio==4"}],
    }
    (tmp_path / "python.json").write_text(json.dumps(environment))
    found = json.loads(written("--with", "python.json", "--python"))
    assert {"anyio", "CPython", "bash"} <= {each["name"] for each in found["components"]}
    assert found["metadata"]["component"]["name"] == "vmibridge-qemu"
    refs = [each["ref"] for each in found["dependencies"]]
    assert refs == ["anyio==4", "image:vmibridge-qemu"]


@pytest.mark.parametrize("options", [(), ("--python",), ("--also", "vmibridge-plugin")])
def test_an_sbom_is_of_the_schema_and_the_same_each_time(options, written):
    text = written(*options)
    check_sbom(text)
    assert written(*options) == text

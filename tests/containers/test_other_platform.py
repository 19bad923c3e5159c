"""Images for both platforms, one of which an emulator builds and runs: an hour or more.

It needs podman and, as root, `apt-get install qemu-user-static binfmt-support`: without them the
test of a plain user is skipped and says so, and that of root fails.
"""

import json

import pytest
from base_images import ARCHITECTURES, need_emulator
from build_images import IMAGES, BuildError
from needs import missing

pytestmark = pytest.mark.slow

SECONDS = 600
"""For one command in an emulator, on a machine that is busy."""


@pytest.fixture(scope="module")
def built(engine):
    """An image and its list, of names of their own: by `built(NAME)` its tag."""
    tags = {}
    for each in ARCHITECTURES:
        try:
            need_emulator(each)
        except BuildError as error:
            missing(str(error))

    def build(name):
        if name not in tags:
            tags[name] = f"localhost/vmibridge-both-{name}:1"
            engine.build(name, tag=tags[name], platforms=list(ARCHITECTURES))
        return tags[name]

    yield build
    for tag in tags.values():
        engine.run("manifest", "rm", tag, capture_output=True)
        own = [f"{tag}-{each}" for each in ARCHITECTURES.values()]
        engine.run("rmi", "--force", *own, capture_output=True)


def run_in(engine, image, platform, *arguments, entry=None):
    """A command of an image without a network: its status, and what it printed."""
    options = ["--rm", "--network=none", "--no-healthcheck", f"--platform={platform}"]
    options += [f"--entrypoint={entry}"] if entry else []
    done = engine.run(
        "run", *options, image, *arguments, seconds=SECONDS, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["bridge", "qemu"])
def test_the_list_has_an_image_for_each_platform(name, engine, built):
    listed = json.loads(engine.printed("manifest", "inspect", built(name)))["manifests"]
    found = {(each["platform"]["os"], each["platform"]["architecture"]) for each in listed}
    assert found == {tuple(each.split("/")) for each in ARCHITECTURES}
    assert len({each["digest"] for each in listed}) == len(listed) == 2
    for platform, architecture in ARCHITECTURES.items():
        form = "--format={{.Os}}/{{.Architecture}}"
        own = f"{built(name)}-{architecture}"
        assert engine.printed("image", "inspect", form, own) == platform


@pytest.mark.parametrize("platform", ARCHITECTURES)
def test_the_bridge_runs_and_has_all_of_its_extras(platform, engine, built):
    image = f"{built('bridge')}-{ARCHITECTURES[platform]}"
    same = run_in(engine, IMAGES["bridge"], next(iter(ARCHITECTURES)), "--version")
    assert run_in(engine, image, platform, "--version") == same
    imports = "import anyio, elftools, lz4, mcap, msgspec, nats, nkeys, trio, uvloop, zstandard"
    code = f"{imports}; import platform as p; print(p.machine())"
    machine = run_in(engine, image, platform, "-c", code, entry="python")
    named = {"amd64": "x86_64", "arm64": "aarch64"}[ARCHITECTURES[platform]]
    assert machine == (0, f"{named}\n")


@pytest.mark.parametrize("platform", ARCHITECTURES)
def test_qemu_runs_and_loads_the_plugin(platform, engine, built):
    image = f"{built('qemu')}-{ARCHITECTURES[platform]}"
    status, told = run_in(engine, image, platform, "--version")
    assert status == 0
    assert "QEMU emulator version 11.1" in told
    plugin = ["-plugin", "file=/usr/lib/vmibridge/plugin.so"]
    arguments = ["-M", "none", "-display", "none", "-accel", "tcg", *plugin]
    status, told = run_in(engine, image, platform, *arguments)
    assert status != 0
    assert "vmibridge plugin: needs socket=PATH, where the host listens" in told

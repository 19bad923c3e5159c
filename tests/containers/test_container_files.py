"""What can be said of Dockerfiles and compose.yaml without running them."""

import json
import os
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import build_images
import locked_install
import pytest
import yaml
from children import run
from container_engine import NPROC

from vmibridge import open_backend
from vmibridge.backends.device.arguments import device_arguments
from vmibridge.backends.device.backend import DeviceOptions
from vmibridge.backends.qemu.plugin.build import _FLAGS
from vmibridge.cli import main

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"

DOCKERFILES = sorted(DOCKER.glob("*.Dockerfile"))
PROFILES = {
    "plugin": {"qemu", "bridge"},
    "tls": {"qemu", "certificates", "agent", "server"},
    "nats": {"qemu", "nats", "agent-nats", "server-1", "server-2", "server-3"},
    "gdb": {"qemu-gdb", "bridge-gdb"},
    "kvm": {"qemu-kvm", "bridge-kvm"},
    "device": {"qemu-device", "bridge-device"},
}
GROUP = 10000
USERS = {"vmibridge": 10001, "vmibridge-qemu": 10002}


def by_name(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.name)


def lines_of(path, pattern):
    """What `pattern`, for a whole line, finds in a file."""
    return re.findall(f"^{pattern}$", path.read_text(), re.MULTILINE)


def stages(path):
    """The instructions of each stage of a Dockerfile."""
    text = re.sub(r"\\\n", " ", path.read_text())
    return [part.splitlines() for part in re.split(r"^FROM ", text, flags=re.MULTILINE)[1:]]


# --- Dockerfiles ------------------------------------------------------------------------


@by_name(DOCKERFILES)
def test_hadolint_finds_nothing(path):
    hadolint = Path(sys.executable).with_name("hadolint")
    done = run([hadolint, path])
    assert (done.returncode, done.stdout) == (0, "")


@by_name(DOCKERFILES)
def test_an_image_is_labelled_runs_as_a_user_of_its_own_and_builds_upon_a_version(path):
    last = stages(path)[-1]
    users = [line.split()[1] for line in last if line.startswith("USER ")]
    assert users
    assert re.fullmatch(rf"1\d{{4}}:{GROUP}", users[-1])
    assert any(line.startswith("ENTRYPOINT [") for line in last)
    labels = "".join(line for line in last if line.startswith("LABEL "))
    for label in ("title", "description", "licenses"):
        assert f"org.opencontainers.image.{label}=" in labels
    for image in build_images.bases(path.stem):
        assert re.search(r":(\d+\.\d+-slim-)?trixie(-slim)?$", image), image


@by_name([DOCKER / "bridge.Dockerfile", DOCKER / "qemu.Dockerfile"])
def test_what_is_built_is_built_in_a_stage_of_its_own(path):
    *before, last = stages(path)
    assert before
    assert not re.search(r"\b(gcc|pip|libc6-dev)\b", "\n".join(last))


@by_name(DOCKERFILES)
def test_the_context_has_what_is_used_and_no_more(path):
    allowed = lines_of(path.with_name(f"{path.name}.dockerignore"), "!(.*)")
    copied = set()
    for line in lines_of(path, "COPY (?!--from)(.*)"):
        copied |= {word for word in line.split()[:-1] if not word.startswith("--")}
    copied |= set(re.findall(r"--mount=type=bind,source=([^,]+)", path.read_text()))
    assert sorted(allowed) == sorted(copied)
    assert all((ROOT / name).exists() for name in copied)


def test_an_image_may_be_a_stage_of_another():
    for name, whole in build_images.STAGES.items():
        named = lines_of(DOCKER / f"{whole}.Dockerfile", r"FROM \S+ AS (\S+)")
        assert name in named
        assert build_images.bases(name) == build_images.bases(whole)


def test_the_bridge_has_a_health_check():
    assert 'CMD ["vmibridge", "health"]' in (DOCKER / "bridge.Dockerfile").read_text()


def test_the_plugin_is_built_as_vmibridge_builds_it():
    (line,) = lines_of(DOCKER / "qemu.Dockerfile", "RUN gcc (.*)")
    assert set(line.split()) - {"-Werror", "-o", "plugin.so", "./*.c"} == set(_FLAGS)


def test_qemu_is_of_one_minor_version():
    assert '"qemu-system-x86=1:11.1*"' in (DOCKER / "qemu.Dockerfile").read_text()


def test_the_extras_of_the_image_are_extras():
    (told,) = lines_of(DOCKER / "bridge.Dockerfile", "ARG EXTRAS=(.*)")
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(told.split(",")) <= set(known["optional-dependencies"])


def test_the_lock_has_what_makes_the_image():
    locked = locked_install.entries((ROOT / "requirements.lock").read_text())
    assert {"hatchling", "editables", "cyclonedx-bom", "cyclopts", "anyio"} <= set(locked)


def test_a_package_of_a_lock_comes_with_its_hashes():
    lock = (
        "# made by uv\n"
        'cffi==2.1 ; (platform != "x") \\\n    --hash=sha256:aa \\\n    --hash=sha256:bb\n'
        "Typing_Extensions==4.0 \\\n    --hash=sha256:cc\n"
        "nats-py[nkeys]==2.16 \\\n    --hash=sha256:dd\n"
    )
    found = locked_install.entries(lock)
    assert list(found) == ["cffi", "typing-extensions", "nats-py"]
    assert found["cffi"].count("--hash") == 2
    assert locked_install.constraint(found["cffi"]) == 'cffi==2.1 ; (platform != "x")\n'
    # pip refuses a constraint with an extra, and installs only what the line itself names.
    assert locked_install.constraint(found["nats-py"]) == "nats-py==2.16\n"
    assert found["nats-py"].startswith("nats-py[nkeys]==2.16")


# --- compose ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """compose.yaml with its variables and anchors resolved, of one profile."""
    # It wants to know podman's version before it reads a file.
    podman = tmp_path_factory.mktemp("compose") / "podman"
    podman.write_text("#!/bin/sh\necho podman version 5.0.0\n")
    podman.chmod(0o755)

    @cache
    def read(profile, **variables):
        command = [sys.executable, "-m", "podman_compose", f"--podman-path={podman}"]
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("COMPOSE_", "VMIBRIDGE_"))
        }
        if profile is not None:
            environment["COMPOSE_PROFILES"] = profile
        done = subprocess.run(
            [*command, "-f", DOCKER / "compose.yaml", "config"],
            env={**environment, **variables},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return yaml.safe_load(done.stdout)

    return read


every_profile = pytest.mark.parametrize("profile", PROFILES)


@every_profile
def test_a_profile_has_its_services(profile, config):
    assert config(profile)["services"].keys() == PROFILES[profile]


def test_without_a_profile_it_is_the_plugin(config):
    assert config(None)["services"].keys() == PROFILES["plugin"]


@every_profile
def test_each_service_is_confined(profile, config):
    for name, service in config(profile)["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges"], name
        assert int(service["user"].partition(":")[0]) >= 10000, name
        assert {"mem_limit", "cpus", "pids_limit"} <= service.keys(), name
        assert service["ulimits"] == {"nofile": 4096, "nproc": NPROC}, name
        assert not {"privileged", "cap_add", "ports"} & service.keys(), name


@every_profile
def test_what_a_service_records_and_prints_is_bounded(profile, config):
    for name, service in config(profile)["services"].items():
        assert service["logging"]["options"] == {"max-size": "10m", "max-file": "5"}, name
        command = service.get("command", [])
        if "--record" in command:
            assert command[command.index("--keep") + 1] == "1G", name
        if service["image"] == build_images.IMAGES["bridge"]:
            assert service["stop_grace_period"] == "15s", "more than the longest stop"
            assert service["environment"]["VMIBRIDGE_OUTCOMES"] == "false"


@every_profile
def test_qemu_has_no_network(profile, config):
    for name, service in config(profile)["services"].items():
        if name.startswith(("qemu", "bridge", "certificates")):
            assert service["network_mode"] == "none", name
            assert "networks" not in service, name


@every_profile
def test_networks_lead_nowhere_else(profile, config):
    read = config(profile)
    for name, service in read["services"].items():
        for network in service.get("networks", []):
            assert read["networks"][network]["internal"] is True, name


def test_a_device_is_passed_through_for_kvm_alone(config):
    for profile in PROFILES:
        for name, service in config(profile)["services"].items():
            assert service.get("devices", []) == (["/dev/kvm"] if name == "qemu-kvm" else []), name


def test_each_side_of_tls_has_its_own_key_and_no_other(config):
    services = config("tls")["services"]
    keys = {
        name: {volume for volume in service.get("volumes", []) if "-key:" in volume}
        for name, service in services.items()
    }
    assert keys.pop("certificates") == {"agent-key:/agent", "server-key:/server"}
    assert keys == {"agent": {"agent-key:/tls:ro"}, "server": {"server-key:/tls:ro"}, "qemu": set()}
    assert not any(volume.startswith("sockets:") for volume in services["server"]["volumes"])


@every_profile
def test_users_are_those_of_the_images(profile, config):
    for service in config(profile)["services"].values():
        image = service["image"].rpartition("/")[2].partition(":")[0]
        if image in USERS:
            assert service["user"] == f"{USERS[image]}:{GROUP}"


@every_profile
def test_commands_are_understood_by_vmibridge(profile, config, capsys):
    """Help tells an unknown option, too: it would fail before."""
    for name, service in config(profile)["services"].items():
        if service["image"] == build_images.IMAGES["bridge"]:
            words = [word for word in service["command"] if word.startswith("--")]
            main([service["command"][0], "--help"])
            known = capsys.readouterr().out
            assert all(word in known for word in words), name


def test_variables_say_what_is_run(config):
    read = config("plugin", VMIBRIDGE_GUEST="/srv/guest", VMIBRIDGE_MODULE="/handlers/own.py")
    assert "/srv/guest:/guest:ro" in read["services"]["qemu"]["volumes"]
    command = read["services"]["bridge"]["command"]
    assert command[command.index("--handlers") + 1] == "/handlers/own.py"


def test_an_image_of_ones_own_is_never_built_under_its_name(config):
    own = config("tls", VMIBRIDGE_IMAGE="localhost/own")["services"]
    for name, service in config("tls")["services"].items():
        assert (ROOT / service["build"]["dockerfile"]).exists()
        is_own = own[name]["image"] == "localhost/own"
        assert is_own == (name in ("agent", "server"))
        assert (ROOT / own[name]["build"]["dockerfile"]).exists() != is_own


def test_each_variable_is_documented():
    used = set(re.findall(r"\$\{(\w+)", (DOCKER / "compose.yaml").read_text()))
    told = set(lines_of(ROOT / "docs/deployment.md", r"\| `(VMIBRIDGE_\w+)` \|.*"))
    assert used == told


def test_the_device_is_that_of_the_bridge_and_has_memory_that_is_shared(config):
    services = config("device", VMIBRIDGE_MEMORY="512")["services"]
    command = services["qemu-device"]["command"]
    socket, timeout = Path("/run/vmibridge/device.sock"), DeviceOptions().timeout
    *memory, _, device = device_arguments(socket, timeout, 512 << 20)
    assert json.loads(command[command.index("-device") + 1]) == json.loads(device)
    shared = memory[1].replace(str(512 << 20), "512M")
    assert shared in command
    assert f"q35,{memory[3]}" in command
    assert services["qemu-device"]["environment"]["VMIBRIDGE_HOST_AT"] == str(socket)
    bridge = services["bridge-device"]
    assert bridge["restart"] == "no"
    spec = bridge["command"][bridge["command"].index("--backend") + 1].partition("=")[2]
    assert open_backend(spec).path == socket


def test_a_bridge_of_breakpoints_is_not_started_again_beside_a_qemu_that_has_ended(config):
    for profile in ("gdb", "kvm"):
        bridge = config(profile)["services"][f"bridge-{profile}"]
        assert bridge["restart"] == "no"
        assert "within=60" in bridge["command"][bridge["command"].index("--backend") + 1]


def test_a_guest_of_ones_own_is_given_by_variables(config):
    own = {"KERNEL": "", "INITRD": "", "DISK": "/disks/a.qcow2", "MEMORY": "512", "SMP": "4"}
    given = {f"VMIBRIDGE_{name}": value for name, value in own.items()}
    for profile in PROFILES:
        services = config(profile, VMIBRIDGE_DISKS="/srv/disks", **given)["services"]
        (qemu,) = [services[name] for name in services if name.startswith("qemu")]
        assert given.items() <= {**qemu["environment"]}.items()
        assert "/srv/disks:/disks" in qemu["volumes"]

"""What starts QEMU and compose: scripts and lists that need no container."""

import re
import socket
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import build_images
import pytest
from children import descendants, left_processes, run

from vmibridge.cli.app import COMMANDS, app_for
from vmibridge.cli.environment import variable_of

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"


@pytest.fixture
def programs(tmp_path):
    """`programs(NAME)`: a program that prints its arguments, one a line; gives a PATH with it."""

    def make(name, text='printf "%s\\n" "$@"'):
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return f"{path.parent}:/usr/bin:/bin"

    return make


# --- QEMU's container -------------------------------------------------------------------


@pytest.fixture
def entry(programs):
    """`entry(ARGUMENT..., NAME=VALUE...)`: QEMU's arguments by its entry point, or why not."""

    def start(*arguments, **variables):
        given = {f"VMIBRIDGE_{name}": str(value) for name, value in variables.items()}
        environment = {"PATH": programs("qemu-system-x86_64"), **given}
        done = run([DOCKER / "qemu-entrypoint", *arguments], env=environment)
        assert done.returncode in (0, 1)
        return done.stderr if done.returncode else done.stdout.splitlines()

    return start


def test_without_variables_arguments_are_those_of_qemu(entry):
    assert entry("--version") == ["--version"]
    assert entry("-m", "1 2", KERNEL="", APPEND="quiet", DISK="", MEMORY="") == ["-m", "1 2"]


def test_variables_are_arguments(entry, tmp_path):
    for name in ("kernel", "initrd", "a,b.qcow2", "raw.img"):
        (tmp_path / name).touch()
    assert entry(
        "-nodefaults",
        KERNEL=tmp_path / "kernel",
        INITRD=tmp_path / "initrd",
        APPEND="console=ttyS0 count=1",
        DISK=tmp_path / "a,b.qcow2",
        MEMORY=512,
        SMP="4,sockets=2",
        QEMU_OPTIONS="-cpu max -no-shutdown",
    ) == [
        *("-nodefaults", "-kernel", f"{tmp_path}/kernel", "-initrd", f"{tmp_path}/initrd"),
        *("-append", "console=ttyS0 count=1"),
        *("-drive", f"if=virtio,format=qcow2,file={tmp_path}/a,,b.qcow2"),
        *("-m", "512", "-smp", "4,sockets=2", "-cpu", "max", "-no-shutdown"),
    ]
    assert f"if=virtio,format=raw,file={tmp_path}/raw.img" in entry(DISK=tmp_path / "raw.img")


@pytest.mark.parametrize("name", ["KERNEL", "INITRD", "DISK"])
def test_a_file_that_is_not_there_is_named(entry, name):
    assert entry(**{name: "/none"}).startswith("qemu-entrypoint: /none: is not there, or ")


def test_qemu_is_started_when_a_host_listens(entry, tmp_path):
    """Not for a socket that a host has left behind when it was killed."""
    path = tmp_path / "device.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    ended = []
    with ThreadPoolExecutor() as pool:
        starting = pool.submit(lambda: ended.append(entry("-m", "1", HOST_AT=path)))
        assert not ended
        with socket.socket(socket.AF_UNIX) as host:
            path.unlink()
            host.bind(str(path))
            host.listen()
            starting.result(timeout=60)
            host.setblocking(False)
            with pytest.raises(BlockingIOError):
                host.accept()
    assert ended == [["-m", "1"]]


# --- docker/vm --------------------------------------------------------------------------


@pytest.fixture
def vm(programs, tmp_path):
    """`vm(WORD..., NAME=VALUE...)` with a compose that prints its words and four variables."""
    names = (
        *("COMPOSE_PROFILES", "COMPOSE_PROJECT_NAME"),
        *("VMIBRIDGE_KVM_GROUP", "VMIBRIDGE_ACCEL"),
    )
    lines = [f'echo "{name}=${{{name}:-}}"' for name in names]
    path = programs("compose", "\n".join(['echo "$@"', *lines, "exit ${STATUS:-0}"]))

    def start(*words, **variables):
        environment = {"PATH": path, "VMIBRIDGE_COMPOSE": "compose", **variables}
        return run([DOCKER / "vm", *words], env=environment)

    return start


def test_words_are_those_of_compose(vm):
    done = vm("up", "-d", COMPOSE_PROFILES="gdb", COMPOSE_PROJECT_NAME="web")
    assert done.stdout.splitlines()[:3] == [
        f"-f {DOCKER}/compose.yaml up -d",
        "COMPOSE_PROFILES=gdb",
        "COMPOSE_PROJECT_NAME=web",
    ]
    assert "COMPOSE_PROJECT_NAME=vmibridge" in vm("ps").stdout
    assert vm("ps", STATUS="3").returncode == 3


def test_the_group_of_kvm_is_that_of_this_host(vm):
    device = Path("/dev/kvm")
    group = str(device.stat().st_gid) if device.exists() else ""
    assert f"VMIBRIDGE_KVM_GROUP={group}\n" in vm("ps").stdout
    assert "VMIBRIDGE_KVM_GROUP=7\n" in vm("ps", VMIBRIDGE_KVM_GROUP="7").stdout


def test_the_device_is_on_kvm_where_this_host_has_it(vm):
    base, more = f"-f {DOCKER}/compose.yaml", f"-f {DOCKER}/kvm.yaml"
    for accel, files in (("tcg", base), ("kvm", f"{base} {more}")):
        done = vm("ps", COMPOSE_PROFILES="device", VMIBRIDGE_ACCEL=accel)
        assert (done.stdout.splitlines()[0], done.stderr) == (f"{files} ps", "")
        assert f"VMIBRIDGE_ACCEL={accel}\n" in done.stdout
    done = vm("ps", COMPOSE_PROFILES="device")
    if Path("/dev/kvm").exists():
        assert done.stdout.startswith(f"{base} {more} ps\n")
    else:
        assert done.stdout.startswith(f"{base} ps\n")
        assert done.stderr == "vm: there is no /dev/kvm here: QEMU runs under TCG\n"


@pytest.mark.parametrize("words", [(), ("up", "-d")])
def test_a_profile_that_there_is_not_is_named(vm, words):
    done = vm(*words, COMPOSE_PROFILES="gbd")
    assert (done.returncode, done.stdout) == (1, "")
    known = "plugin, tls, nats, gdb, kvm or device"
    assert done.stderr == f"vm: COMPOSE_PROFILES=gbd: gbd is not {known}\n"
    done = vm(*words, COMPOSE_PROFILES="gdb,gbd")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"vm: COMPOSE_PROFILES=gdb,gbd: gbd is not {known}\n"


def test_a_variable_that_is_not_used_is_named(vm):
    known = {"VMIBRIDGE_MEMORY": "512", "VMIBRIDGE_KVM_GROUP": "7"}
    assert vm("up", "-d", **known).stderr == ""
    done = vm("up", "-d", VMIBRIDGE_MEMROY="512", VMIBRIDGE_TIMEOUT="3", **known)
    assert done.returncode == 0
    why = "it is no variable of compose.yaml, and options go into the file VMIBRIDGE_ENV_FILE"
    assert sorted(done.stderr.splitlines()) == [
        f"vm: VMIBRIDGE_MEMROY is ignored: {why}",
        f"vm: VMIBRIDGE_TIMEOUT is ignored: {why}",
    ]
    # Which have variables of their own.
    assert vm("-f", "own.yaml", "up", VMIBRIDGE_OWN="1").stderr == ""


def test_compose_takes_several_profiles_and_those_of_other_files(vm):
    for profiles, words in (
        ("gdb,tls", ["down"]),
        ("*", ["down"]),
        ("tls,own", ["-f", "own.yaml", "up"]),
    ):
        done = vm(*words, COMPOSE_PROFILES=profiles)
        assert done.returncode == 0
        assert f"COMPOSE_PROFILES={profiles}\n" in done.stdout
    done = vm(COMPOSE_PROFILES="gdb,tls")
    assert (done.returncode, "gdb,tls: one at a time" in done.stderr) == (1, True)


@pytest.fixture
def engine(programs):
    """`engine(CASES)`: a docker whose containers have the names of their services.

    CASES, of a `case` of sh for all its words, go before what it does by itself.
    """

    def make(cases):
        lines = [
            'words="$*"',
            *("case $words in", cases),
            'ps*service=*) echo "${words##*service=}" ;;',
            '"logs --follow "*) echo "the console" ;;',
            '"inspect "* | "wait "*) echo 0 ;;',
            "esac",
        ]
        programs("docker", "\n".join(lines))

    return make


@pytest.mark.parametrize("words", [(), ("up", "-d"), ("-f", "own.yaml", "create")])
def test_an_image_that_is_not_there_is_named_before_compose_would_build_it(vm, engine, words):
    engine('"image inspect localhost/none") exit 1 ;;')
    done = vm(*words, VMIBRIDGE_IMAGE="localhost/none")
    assert (done.returncode, done.stdout, done.stderr) == (
        *(1, ""),
        "vm: there is no image localhost/none; build it, or pull it: docker pull localhost/none\n",
    )
    assert vm(*words, VMIBRIDGE_IMAGE="localhost/own").returncode == 0
    assert vm("down", VMIBRIDGE_IMAGE="localhost/none").returncode == 0


def test_a_server_that_is_started_again_is_named_once_while_qemu_goes_on(vm, engine, tmp_path):
    """QEMU ends when the engine was asked twice about the other one, so again after the first."""
    looks = tmp_path / "looks"
    looks.touch()
    engine(f"""
        "inspect "*" agent") echo 3 ;;
        "inspect "*" server") echo 0; echo look >>{looks} ;;
        "logs --tail "*" agent") printf '%s\\n' started "no such file" "no such file" ;;
        "wait qemu") until [ "$(wc -l <{looks})" -ge 2 ]; do sleep 0.05; done; echo 0 ;;
    """)
    done = vm(COMPOSE_PROFILES="tls")
    assert (done.returncode, done.stdout) == (0, "the console\n")
    (said,) = [line for line in done.stderr.splitlines() if line.startswith("vm: ")]
    assert said.startswith("vm: agent has ended and is started again")
    assert done.stderr.endswith(f"{said}\nstarted\nno such file\n")


def test_a_console_that_does_not_end_is_left_when_qemu_has_ended(vm, engine, tmp_path):
    """As that of podman may be, for a container that ends at once."""
    follower, known = tmp_path / "follower", descendants()
    engine(f"""
        "logs --follow "*) echo "the console"; echo $$ >{follower}; exec sleep 600 ;;
        "wait qemu") until [ -s {follower} ]; do sleep 0.05; done; echo 7 ;;
    """)
    done = vm()
    assert (done.returncode, done.stdout) == (7, "the console\n")
    assert "vm: QEMU has ended, and its console has not for 5 s" in done.stderr
    assert left_processes(known) == []


def test_a_container_that_was_started_again_while_all_were_taken_down_is_removed(
    vm, engine, tmp_path
):
    removed = tmp_path / "removed"
    engine(f"""
        "ps -aq --filter label="*.project=vmibridge) [ -e {removed} ] || echo again ;;
        "rm -f again") touch {removed} ;;
    """)
    assert vm().returncode == 0
    assert removed.exists()


def test_without_docker_and_podman_it_says_what_it_needs(programs, tmp_path):
    path = programs("nothing").partition(":")[0]
    for tool in ("sh", "dirname", "readlink"):
        (Path(path) / tool).symlink_to(Path("/usr/bin") / tool)
    done = run([DOCKER / "vm"], env={"PATH": path})
    assert (done.returncode, done.stderr) == (
        1,
        "vm: needs docker with its plugin compose, or podman-compose\n",
    )


# --- what is listed ---------------------------------------------------------------------


def test_scripts_can_be_executed():
    for name in ("vm", "qemu-entrypoint", "make-certificates"):
        assert (DOCKER / name).stat().st_mode & stat.S_IXUSR, name


def test_variables_of_the_list_are_those_of_options():
    known = set()
    for name in COMMANDS:
        command = app_for(name.split())
        for word in name.split():
            command = command[word]
        known |= {variable_of(each.name) for each in command.assemble_argument_collection()}
    named = re.findall(r"^# (VMIBRIDGE_\w+)=", (DOCKER / "options.env").read_text(), re.MULTILINE)
    assert named
    assert set(named) <= known


def test_images_are_those_that_the_profiles_use():
    text = (DOCKER / "compose.yaml").read_text()
    used = set(re.findall(r"^ +image: (?:\$\{\w+:-)?([\w./:-]+)", text, re.MULTILINE))
    assert used <= {*build_images.IMAGES.values(), *build_images.other_images()}
    assert build_images.other_images() == ["docker.io/library/nats:2.15-scratch"]


def test_what_containers_need_is_installed_by_the_makefile():
    text = (ROOT / "Makefile").read_text()
    target = text.partition("\nsystem-containers:\n")[2].partition("\n\n")[0]
    listed = " ".join(re.findall(r"for each in (.*?);", target)).split()
    assert listed == ["podman", "runc", "debootstrap", "iptables", "netavark", "aardvark-dns"]
    assert "test-containers: setup linux system-containers" in text

"""`vmibridge qemu run --via device`, `attach` and `device-args`, as users run them."""

import json
import os
import shlex
import signal
import socket
from pathlib import Path
from xml.etree import ElementTree

import anyio
import msgspec
import pytest
from children import run
from needs import has_kvm, needs
from probe_guest import command
from test_qemu_command import ALL_RIGHT, HANDLERS, MACHINE, ended

from vmibridge.aio import sockets
from vmibridge.backends.device.arguments import DEVICE_NAME
from vmibridge.backends.device.migration import BLOCKER_NAME
from vmibridge.backends.qemu.qmp import Qmp
from vmibridge.errors import QmpError

GUESTS = Path(__file__).parents[1] / "integration/guests"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "handlers.py").write_text(HANDLERS)
    return tmp_path


@pytest.fixture
def guest(folder):
    def build(**defines):
        options = [f"-D{name}={value}" for name, value in defines.items()]
        line = [needs("nasm"), "-f", "bin", f"-I{GUESTS}/", *options, GUESTS / "device.asm"]
        run([*line, "-o", str(folder / "guest.bin")], check=True)

    return build


@pytest.fixture
def start(children, folder, qemu):
    environment = {**os.environ, "VMIBRIDGE_QEMU": qemu}

    def start(*line):
        return children.start(command("qemu", *line), cwd=folder, env=environment)

    return start


def test_run_starts_qemu_with_the_device_and_answers(start, guest):
    guest(COUNT=50)
    options = ["--via", "device", "--accel", "tcg", "--handlers", "handlers.py"]
    status, out, err = ended(start("run", *options, "--", "-M", "q35", *MACHINE))
    assert (status, out) == (ALL_RIGHT, "")
    assert err.splitlines()[-1] == "50 traps: 50 handled"


@has_kvm
@pytest.mark.parametrize("accel", [None, "kvm", "tcg"])
def test_run_says_that_it_takes_kvm_and_how_it_would_not(start, folder, accel):
    fake = folder / "qemu"
    version = "case $1 in --version) echo QEMU emulator version 11.1.0; exit;; esac"
    fake.write_text(f'#!/bin/sh\n{version}\nprintf "%s\\n" "$@" >arguments\n')
    fake.chmod(0o700)
    options = ["--via", "device", "--handlers", "handlers.py", "--qemu", str(fake)]
    _, _, err = ended(start("run", *options, *([] if accel is None else ["--accel", accel])))
    says = "vmibridge: QEMU runs under KVM; --accel tcg selects TCG\n"
    assert err.startswith(says) is (accel is None)
    assert "QEMU runs under" not in err.removeprefix(says)
    arguments = (folder / "arguments").read_text().splitlines()
    assert arguments[:2] == ["-accel", accel or "kvm"]


def logged(process, text):
    """Read standard error until a line has `text`; returns all of it."""
    lines = []
    while not lines or text not in lines[-1]:
        lines.append(process.stderr.readline())
        assert lines[-1], "".join(lines)
    return "".join(lines)


def migration_error(monitor):
    """What QEMU says against a migration; `None`: it migrates."""

    async def migrate():
        async with Qmp(await sockets.connect(socket.AF_UNIX, str(monitor))) as qmp:
            try:
                await qmp.execute("migrate", uri="exec:cat >/dev/null")
            except QmpError as error:
                return str(error)
            return None

    return anyio.run(migrate)


def test_run_has_qemu_refuse_to_migrate_what_the_device_does_not_go_with(start, guest, folder):
    guest(PLUG=1)
    options = ["--via", "device", "--accel", "tcg", "--handlers", "handlers.py", "--json"]
    monitor = f"unix:{folder / 'qmp'},server=on,wait=off"
    running = start("run", *options, "--", "-M", "q35", "-qmp", monitor, *MACHINE)
    logged(running, '"outcome":"handled"')
    assert BLOCKER_NAME in migration_error(folder / "qmp")
    running.send_signal(signal.SIGINT)
    status, _, err = ended(running)
    assert status == 130
    assert "unplug and plug" not in err, "QEMU ends with it"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--patience", "3"], "--via plugin only"),
        (["--absent", "wait"], "--via plugin only"),
        (["--plugin", "p.so"], "--via plugin only"),
        (["--backend-options", "slots=0"], "slots=0"),
        (["--backend-options", "hold=1s&timeout=1s"], "well below"),
    ],
)
def test_run_refuses_what_does_not_go_with_the_device(start, options, told):
    status, _, err = ended(start("run", "--via", "device", "--handlers", "handlers.py", *options))
    assert status == 2
    assert told in err.replace("\n", " ")


def test_attach_plugs_the_device_in_and_out_of_a_qemu_that_runs(
    children, start, guest, folder, qemu
):
    guest(PLUG=1)
    ram = "memory-backend-memfd,id=ram,size=32M,share=on"
    monitor = f"unix:{folder / 'qmp'},server=on,wait=off"
    other = f"unix:{folder / 'other'},server=on,wait=off"
    options = ["-accel", "tcg", "-M", "pc,memory-backend=ram", "-object", ram]
    options += ["-qmp", monitor, "-qmp", other]
    machine = children.start([qemu, *options, *MACHINE], cwd=folder)
    while not (folder / "other").exists():
        assert machine.poll() is None
    for _ in range(2):
        attached = start("attach", "--qmp", "qmp", "--handlers", "handlers.py", "--json")
        for _ in range(20):
            assert json.loads(attached.stdout.readline())["outcome"] == "handled"
        assert BLOCKER_NAME in migration_error(folder / "other")
        attached.send_signal(signal.SIGINT)
        status, out, err = ended(attached)
        assert status == 130
        assert json.loads(out.splitlines()[-1])["summary"]["guest"][0]["reason"] == "stopped"
        assert "not let go" not in err
        assert "not unplugged" not in err
        assert "unplug and plug" not in err
        assert machine.poll() is None, "QEMU lives on"
    assert migration_error(folder / "other") is None
    machine.kill_all()
    machine.wait()


@pytest.mark.no_cover
def test_attach_says_where_a_q35_takes_the_device(children, start, guest, folder, qemu):
    guest(PLUG=1)
    monitor = f"unix:{folder / 'qmp'},server=on,wait=off"
    port = ["-device", "pcie-root-port,id=rp0,chassis=1"]
    options = ["-accel", "tcg", "-M", "q35", "-S", "-qmp", monitor, *port]
    machine = children.start([qemu, *options, *MACHINE], cwd=folder)
    while not (folder / "qmp").exists():
        assert machine.poll() is None
    attach = ["attach", "--qmp", "qmp", "--handlers", "handlers.py"]
    status, _, err = ended(start(*attach))
    assert status == 1
    assert err.splitlines()[-1] == (
        "vmibridge: device_add: Bus 'pcie.0' does not support hotplugging: start QEMU with"
        " -device pcie-root-port,id=rp0,chassis=1, and give --bus rp0"
    )
    attached = start(*attach, "--bus", "rp0")
    logged(attached, "the device is plugged in")
    machine.kill_all()
    machine.wait()
    ended(attached)


def test_attach_says_what_qemu_says(start, folder):
    status, _, err = ended(start("attach", "--qmp", "none", "--handlers", "handlers.py"))
    assert (status, err) == (1, "vmibridge: none: No such file or directory\n")


def test_device_args_are_arguments_for_a_shell(start):
    status, out, _ = ended(start("device-args", "/run/it's.sock", "--memory", "512MiB"))
    assert status == 0
    arguments = shlex.split(out)
    assert "size=536870912,share=on" in arguments[1]
    assert ended(start("device-args", "/run/it's.sock", "--memory", "512M"))[1] == out
    device = json.loads(arguments[-1])
    assert (device["id"], device["x-msg-timeout"]) == (DEVICE_NAME, 5000)
    assert device["socket"] == {"type": "unix", "path": "/run/it's.sock"}


def test_device_args_are_lines_of_a_domain(start):
    status, out, _ = ended(start("device-args", '/run/<"&.sock', "--libvirt", "--timeout", "1"))
    assert status == 0
    domain = ElementTree.fromstring(out)
    assert domain.find("memoryBacking/access").get("mode") == "shared"
    names = {"qemu": "http://libvirt.org/schemas/domain/qemu/1.0"}
    values = [each.get("value") for each in domain.iterfind("qemu:commandline/qemu:arg", names)]
    assert values[0] == "-device"
    assert json.loads(values[1])["socket"]["path"] == '/run/<"&.sock'
    assert json.loads(values[1])["x-msg-timeout"] == 1000


def test_device_args_have_what_qemu_refuses_to_migrate(start, folder):
    status, out, _ = ended(start("device-args", "/run/s", "--refuse-migration", "image.vdi"))
    assert status == 0
    arguments = shlex.split(out)
    node = json.loads(arguments[arguments.index("-blockdev") + 1])
    assert (node["node-name"], node["file"]["filename"]) == (
        BLOCKER_NAME,
        str(folder / "image.vdi"),
    )
    assert (folder / "image.vdi").stat().st_size == 1024


@pytest.mark.parametrize("slots", [64, 3])
def test_device_args_for_ivshmem_agree_with_its_host(children, start, folder, qemu, slots):
    """QEMU refuses more vectors than it has; the host counts as many slots."""
    given = [] if slots == 64 else ["--slots", str(slots)]
    memory = ["--memory", "32M", "--memory-file", str(folder / "ra,m")]
    status, out, _ = ended(start("device-args", "s,ock", "--ivshmem", *given, *memory))
    assert status == 0
    arguments = shlex.split(out)
    ram = f"memory-backend-file,id=vmibridge-ram,size=33554432,mem-path={folder}/ra,,m,share=on"
    assert arguments[:4] == ["-object", ram, "-machine", "memory-backend=vmibridge-ram"]
    options = f"slots={slots}&memory=ra,m"
    host = children.start(
        command("run", "--backend", f"ivshmem:unix:s,ock?{options}", "--handlers", "handlers.py"),
        cwd=folder,
    )
    logged(host, "listening at unix:s,ock")
    monitor = f"unix:{folder / 'qmp'},server=on,wait=off"
    machine = [qemu, "-accel", "tcg", "-M", "q35", "-S", "-m", "32", "-display", "none"]
    running = children.start([*machine, "-qmp", monitor, *arguments], cwd=folder)
    assert anyio.run(answers, folder / "qmp") == "prelaunch"
    assert (folder / "ra,m").stat().st_size == 32 << 20
    host.send_signal(signal.SIGINT)
    assert ended(host)[0] == 130
    running.kill_all()
    running.wait()


async def answers(monitor):
    """The state that QEMU's monitor reports."""

    class Status(msgspec.Struct):
        status: str

    with anyio.fail_after(60):
        while not monitor.exists():
            await anyio.sleep(0.01)
        async with Qmp(await sockets.connect(socket.AF_UNIX, str(monitor))) as qmp:
            return (await qmp.execute("query-status", Status)).status


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("", "the path of the socket is empty"),
        ("ivshmem:unix:/x/s.sock", "is a spec of a backend: give the path of its socket alone"),
        ("vfio-user:unix:/x/s.sock", "is a spec of a backend"),
        ("unix:/x/s.sock", "is a spec of a backend"),
        ("/" + 107 * "a", "has 108 bytes from the root on: the path of a socket has at most 107"),
    ],
)
def test_device_args_refuses_what_is_no_path_of_a_socket(start, path, told):
    status, out, err = ended(start("device-args", path))
    assert (status, out) == (2, "")
    assert told in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--memory", "512"], "--memory 512: is less than 1048576 bytes; give one as in 512MiB"),
        (["--memory", "0"], "--memory 0: is not a size; give one as in 512MiB"),
        (["--memory-file", "f"], "--memory-file goes with --ivshmem only"),
        (["--slots", "3"], "--slots goes with --ivshmem only"),
        (["--ivshmem", "--slots", "257"], "--slots 257: give a number from 1 to 256"),
        (["--ivshmem", "--slots", "0"], "--slots 0: give a number from 1 to 256"),
        (["--ivshmem", "--memory", "1G"], "give both or neither"),
        (["--ivshmem", "--memory-file", "f"], "give both or neither"),
        (["--ivshmem", "--timeout", "5"], "--timeout goes without --ivshmem"),
        (["--ivshmem", "--libvirt"], "--libvirt goes without --ivshmem"),
        (["--ivshmem", "--refuse-migration", "f"], "--refuse-migration goes without --ivshmem"),
    ],
)
def test_device_args_says_what_does_not_go_together(start, options, told):
    status, _, err = ended(start("device-args", "/run/s", *options))
    assert status == 2
    assert told in err


@pytest.mark.parametrize(
    "options",
    [
        ["--memory", "x"],
        ["--timeout", "0"],
        ["--libvirt", "--memory", "1GiB"],
        ["--libvirt", "--refuse-migration", "image.vdi"],
        ["--refuse-migration", "no/folder"],
    ],
)
def test_device_args_refuses_what_makes_no_sense(start, options):
    assert ended(start("device-args", "/run/s", *options))[0] == 2

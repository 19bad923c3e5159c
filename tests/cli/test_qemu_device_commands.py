"""`vmibridge qemu run --via device`, `attach` and `device-args`, as users run them."""

import json
import os
import shlex
import signal
import socket
from pathlib import Path
from xml.etree import ElementTree

import anyio
import pytest
from children import run
from needs import needs
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
    assert json.loads(running.stderr.readline())["outcome"] == "handled"
    assert BLOCKER_NAME in migration_error(folder / "qmp")
    running.send_signal(signal.SIGINT)
    assert ended(running)[0] == 130


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--patience", "3"], "--via plugin only"),
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
        assert machine.poll() is None, "QEMU lives on"
    assert migration_error(folder / "other") is None
    machine.kill_all()
    machine.wait()


def test_attach_says_what_qemu_says(start, folder):
    status, _, err = ended(start("attach", "--qmp", "none", "--handlers", "handlers.py"))
    assert (status, err) == (1, "vmibridge: none: No such file or directory\n")


def test_device_args_are_arguments_for_a_shell(start):
    status, out, _ = ended(start("device-args", "/run/it's.sock", "--memory", "512MiB"))
    assert status == 0
    arguments = shlex.split(out)
    assert "size=536870912,share=on" in arguments[1]
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

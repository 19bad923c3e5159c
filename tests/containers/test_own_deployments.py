"""docs/deployment.md: one's own handlers, options, secrets, guest and VMs, and what ends what."""

import json
import re
import shutil
import subprocess
import zipfile
from contextlib import ExitStack
from pathlib import Path

import pytest
from children import Child
from container_parts import KERNEL, composed, inspected, kernel, planned

pytestmark = pytest.mark.containers

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/deployment.md"
EXCHANGE = ROOT / "guest/linux/exchange.py"
COUNT = 20


def block(name):
    """A file of the page."""
    text = PAGE.read_text()
    found = re.search(rf"<!-- file: {re.escape(name)} -->\n```\w+\n(.*?)```", text, re.DOTALL)
    return found[1]


def told(lines):
    return [line.partition("vmibridge: ")[2].rstrip() for line in lines if "vmibridge: " in line]


# --- what ends what ---------------------------------------------------------------------


def assert_all_right(engine, profile, guest, **chosen):
    """A VM of that profile ends with its guest's status, after four lines, and leaves nothing."""
    with planned(engine, profile, guest, **chosen) as plan:
        done = plan.vm()
        left = plan.containers()
    assert done.returncode == 0, done.stderr
    said = told(done.stdout.splitlines())
    assert (said[-1], sum("right" in line for line in said)) == ("all right", 4)
    assert left == []


def test_the_end_of_qemu_is_that_of_the_composition(engine, guest):
    """With a processor's breakpoints, as under KVM: three suffice for the program that calls."""
    chosen = {
        "VMIBRIDGE_SITES": "sites=/guest/sites-few&breakpoints=hardware",
        "VMIBRIDGE_APPEND": f"{KERNEL} nokaslr vmibridge=few count={COUNT}",
    }
    assert_all_right(engine, "gdb", guest, **chosen)


def test_a_site_that_holds_no_trap_instruction_fails_the_composition(engine, guest):
    cpuid = next(line for line in (guest / "sites-few").read_text().splitlines() if "cpuid" in line)
    behind = int(cpuid.split()[0], 16) + 2
    chosen = {
        "VMIBRIDGE_SITES": f"site={behind:#x}",
        "VMIBRIDGE_APPEND": f"{KERNEL} nokaslr vmibridge=few count=1",
    }
    with planned(engine, "gdb", guest, **chosen) as plan:
        done = plan.vm()
        left = plan.containers()
    assert done.returncode == 1, done.stdout
    assert f"site={behind:#x} held no CPUID, VMCALL or VMMCALL" in done.stderr
    assert "bridge-gdb has ended with 1" in done.stderr
    assert left == []


def test_the_end_of_qemu_is_that_of_a_composition_with_the_device(engine, guest):
    append = f"{KERNEL} vmibridge=sysfs count={COUNT} programs=2"
    chosen = {"VMIBRIDGE_APPEND": append, "VMIBRIDGE_ACCEL": "tcg"}
    assert_all_right(engine, "device", guest, **chosen)


def test_without_its_bridge_a_device_is_dead_and_the_guest_goes_on(engine, guest):
    """QEMU does not connect again: the bridge says so when it stops."""
    append = f"{KERNEL} vmibridge=sysfs count=1000000"
    with composed(engine, "device", guest, VMIBRIDGE_APPEND=append) as pair:
        pair.await_traps("bridge-device", 100)
        assert pair.stop("bridge-device") == 0
        assert pair.wait("qemu-device") == 0
        said = told(pair.logs("qemu-device"))
        lines = pair.logs("bridge-device")
    assert said[-1] == "WRONG"
    assert [line for line in lines if "QEMU does not connect again" in line]


@pytest.mark.parametrize("profile", ["plugin", "gdb", "device"])
def test_a_qemu_that_does_not_start_ends_the_composition_with_its_status(engine, guest, profile):
    with planned(engine, profile, guest, VMIBRIDGE_KERNEL="/guest/none") as plan:
        done = plan.vm()
        left = plan.containers()
    assert done.returncode == 1, done.stdout
    assert "/guest/none: is not there" in done.stderr
    assert left == []


def test_a_bridge_that_cannot_serve_ends_a_vm_that_waits_for_it(engine, guest):
    with planned(engine, "gdb", guest, VMIBRIDGE_MODULE="/handlers/none.py") as plan:
        done = plan.vm()
    assert done.returncode == 1, done.stdout
    assert "bridge-gdb has ended with 2, and QEMU has not" in done.stderr
    assert "/handlers/none.py: there is no such file" in done.stderr


def test_a_bridge_that_is_started_again_and_again_is_named_while_qemu_waits(engine, guest):
    """Without settings of podman, which may ask for more open files than this host allows."""
    with planned(engine, "plugin", guest, VMIBRIDGE_MODULE="/handlers/none.py") as plan:
        plan.environment.pop("CONTAINERS_CONF", None)
        command = [ROOT / "docker/vm"]
        with Child(command, env=plan.environment, seconds=300, stderr=subprocess.STDOUT) as vm:
            lines = iter(vm.stdout)
            named = next((line for line in lines if line.startswith("vm: bridge has ended")), None)
            reason = next((line for line in lines if "/handlers/none.py: there is" in line), None)
            vm.terminate()
            rest = vm.stdout.read()
            status = vm.wait()
        left = plan.containers()
    assert named, rest
    assert reason, rest
    assert (status, left) == (143, [])


# --- many VMs ---------------------------------------------------------------------------


def test_two_vms_beside_each_other_have_sockets_and_recordings_of_their_own(
    engine, guest, tmp_path
):
    append = kernel(vmibridge="user", count=COUNT)
    own = {"web": {"VMIBRIDGE_SMP": "1", "VMIBRIDGE_MEMORY": "192"}, "db": {}}
    with ExitStack() as stack:
        vms = {
            name: stack.enter_context(
                composed(
                    engine,
                    *("plugin", guest),
                    name=name,
                    VMIBRIDGE_VM=name,
                    VMIBRIDGE_APPEND=append,
                    **more,
                )
            )
            for name, more in own.items()
        }
        for name, vm in vms.items():
            assert vm.wait("qemu") == 0
            said = told(vm.logs("qemu"))
            cpus = 1 if name == "web" else 2
            assert said[0].startswith(f"up, {cpus} cpus")
            assert (said[-1], sum("right," in line for line in said)) == ("all right", 6 * cpus)
            assert f"vm {name}: listening at unix:/run/vmibridge/vmi.sock" in str(vm.logs("bridge"))
            vm.stop("bridge")
            (recording,) = vm.recordings("bridge", tmp_path / name)
            assert len(inspected(recording)[0]) >= 6 * cpus * COUNT


# --- handlers of one's own --------------------------------------------------------------


def make_wheel(folder):
    """A package without code of anybody else's, which no index has."""
    folder.mkdir()
    about = "own_words-1.0.dist-info"
    with zipfile.ZipFile(folder / "own_words-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("own_words.py", "def inverted(value):\n    return ~value & (1 << 64) - 1\n")
        wheel.writestr(
            f"{about}/METADATA", "Metadata-Version: 2.1\nName: own-words\nVersion: 1.0\n"
        )
        wheel.writestr(
            f"{about}/WHEEL",
            "Wheel-Version: 1.0\nGenerator: none\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        wheel.writestr(f"{about}/RECORD", f"own_words.py,,\n{about}/METADATA,,\n{about}/WHEEL,,\n")


HANDLER = """
import msgspec
from own_words import inverted


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    password_file: str


class Own(Exchange):
    name = "own"
    Settings = Settings

    def __init__(self, settings):
        with open(settings.password_file) as file:
            self.password = file.read().strip()

    @method(0x0001)
    async def invert(self, vmi, packet):
        total = (packet.value1 + packet.value2) & MASK
        return BridgeResponse(inverted(packet.value1), total, output=f"by {len(self.password)}")


def handlers():
    return [Own(Settings("/run/secrets/database"))]
"""


@pytest.fixture
def own_image(engine, tmp_path):
    """As the page says, with a package that is on this machine alone; gives the image's name."""
    make_wheel(tmp_path / "wheels")
    (tmp_path / "pip.conf").write_text("[global]\nno-index = true\nfind-links = /wheels\n")
    context = tmp_path / "context"
    (context / "handlers").mkdir(parents=True)
    (context / "own.Dockerfile").write_text(block("own.Dockerfile"))
    (context / "requirements.txt").write_text("own-words\n")
    (context / "handlers/own.py").write_text(EXCHANGE.read_text() + HANDLER)
    name = "localhost/vmibridge-own:latest"
    done = engine.run(
        *("build", "--format", "docker", "--network=none", "--tag", name),
        f"--volume={tmp_path}/wheels:/wheels:ro",
        f"--volume={tmp_path}/pip.conf:/etc/pip.conf:ro",
        *("-f", str(context / "own.Dockerfile"), str(context)),
        capture_output=True,
        text=True,
        seconds=300,
    )
    assert done.returncode == 0, done.stderr
    yield name
    engine.run("rmi", "--force", name, capture_output=True)


def test_handlers_with_a_package_a_secret_a_network_and_options(engine, guest, tmp_path, own_image):
    (tmp_path / "own.env").write_text("VMIBRIDGE_TIMEOUT=10\nVMIBRIDGE_LOG_LEVEL=debug\n")
    (tmp_path / "own.yaml").write_text(block("own.yaml"))
    (tmp_path / "password").write_text("s3cret\n")
    chosen = {
        "VMIBRIDGE_IMAGE": own_image,
        "VMIBRIDGE_MODULE": "/opt/handlers/own.py",
        "VMIBRIDGE_ENV_FILE": str(tmp_path / "own.env"),
        "VMIBRIDGE_NETWORK": "bridge",
        "VMIBRIDGE_APPEND": kernel(vmibridge="few", count=COUNT),
        "OWN_PASSWORD_FILE": str(tmp_path / "password"),
    }
    with composed(engine, "plugin", guest, tmp_path / "own.yaml", **chosen) as pair:
        assert pair.wait("qemu") == 0
        assert told(pair.logs("qemu"))[-1] == "all right"
        networks = pair.run("bridge", "cat", "/proc/net/dev").stdout
        variables = json.dumps(pair.inspect("bridge", "{{json .Config.Env}}"))
        logs = pair.logs("bridge")
    assert sum(" own " in line and "handled" in line for line in logs) >= 3 * COUNT
    assert "eth0" in networks
    assert "VMIBRIDGE_TIMEOUT=10" in variables
    assert "s3cret" not in variables


# --- upgrades ---------------------------------------------------------------------------


def test_new_handlers_and_a_new_bridge_lose_no_trap(engine, guest, tmp_path):
    """The guest calls all the while, checks each answer, and would say what is wrong with one."""
    folder = tmp_path / "handlers"
    folder.mkdir()
    shutil.copy(EXCHANGE, folder)
    chosen = {
        "VMIBRIDGE_APPEND": kernel(vmibridge="user", count=1_000_000),
        "VMIBRIDGE_HANDLERS": str(folder),
    }
    with composed(engine, "plugin", guest, **chosen) as pair:
        pair.await_traps("bridge", 100)
        with (folder / "exchange.py").open("a") as source:
            source.write("\n\nExchange.name = 'new'\n")
        assert pair.vm("kill", "-s", "SIGHUP", "bridge").returncode == 0
        pair.await_line("bridge", "handlers reloaded")
        pair.await_line("bridge", " new ")
        before = pair.inspect("bridge", "{{json .Created}}")
        done = pair.vm("up", "-d", "--no-build", "--no-deps", "--force-recreate", "bridge")
        assert done.returncode == 0, done.stderr
        assert pair.inspect("bridge", "{{json .Created}}") != before
        pair.await_traps("bridge", 100)
        assert pair.inspect("qemu", "{{json .RestartCount}}") == 0
        said = told(pair.logs("qemu"))
    assert [line.partition(",")[0] for line in said] == ["up"], said

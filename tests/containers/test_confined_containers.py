"""What the processes in the containers may do, and what their health checks tell."""

import json

import pytest
from build_images import IMAGES
from container_parts import composed, kernel

pytestmark = pytest.mark.containers

CONFINED = """
import json, os, pathlib, shutil
status = dict(line.split(":", 1) for line in open("/proc/1/status"))
def writable(folder):
    try:
        pathlib.Path(folder, "probe").write_text("")
    except OSError:
        return False
    pathlib.Path(folder, "probe").unlink()
    return True
folders = [root for root, _, _ in os.walk("/") if not root.startswith(("/proc", "/sys", "/dev"))]
print(json.dumps({
    "command": open("/proc/1/cmdline").read().split("\\0")[1],
    "users": status["Uid"].split(),
    "capabilities": [status[name].strip() for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb")],
    "no new privileges": status["NoNewPrivs"].strip(),
    "writable": [folder for folder in folders if writable(folder)],
    "networks": [line.split(":")[0].strip() for line in open("/proc/net/dev") if ":" in line],
    "compilers": [name for name in ("cc", "gcc", "clang", "tcc", "as", "ld") if shutil.which(name)],
}))
"""


@pytest.fixture(scope="module")
def running(engine, guest):
    """A pair whose guest has enough to do."""
    endless = kernel(vmibridge="user", count=1_000_000)
    with composed(engine, "plugin", guest, VMIBRIDGE_APPEND=endless) as pair:
        pair.await_traps("bridge", 1)
        yield pair


def test_the_bridge_is_confined(running):
    seen = running.python("bridge", CONFINED)
    # With a read-only root podman makes this one, too; it is in memory.
    seen["writable"] = sorted({*seen["writable"]} - {"/var/tmp"})
    assert seen.pop("command").endswith("/vmibridge"), "the first process is the bridge itself"
    assert seen == {
        "users": ["10001"] * 4,
        "capabilities": ["0000000000000000"] * 4,
        "no new privileges": "1",
        "writable": ["/recordings", "/run/vmibridge", "/tmp"],
        "networks": ["lo"],
        "compilers": [],
    }


def test_qemu_is_confined(running):
    seen = running.run("qemu", "sh", "-c", "cat /proc/1/status /proc/net/dev").stdout
    fields = dict(line.split(":", 1) for line in seen.splitlines() if ":" in line)
    assert fields["Name"].strip().startswith("qemu-system")
    assert fields["Uid"].split() == ["10002"] * 4
    assert {fields[f"Cap{kind}"].strip() for kind in ("Prm", "Eff", "Bnd")} == {"0" * 16}
    assert fields["NoNewPrivs"].strip() == "1"
    assert "eth0" not in seen
    assert running.run("qemu", "touch", "/probe").returncode == 1


def test_limits_are_set(running):
    for service, memory in (("bridge", 256 << 20), ("qemu", 1 << 30)):
        assert running.inspect(service, "{{json .HostConfig.Memory}}") == memory
        assert running.inspect(service, "{{json .HostConfig.PidsLimit}}") == 64


# --- health -----------------------------------------------------------------------------


def test_a_bridge_that_listens_is_healthy(running):
    running.await_health("bridge")
    log = running.inspect("bridge", "{{json .State.Health.Log}}")
    assert "unix:/run/vmibridge/vmi.sock: listening" in log[-1]["Output"]


@pytest.fixture
def start_bridge(engine):
    """`start_bridge(BACKEND)` runs it alone; gives the name of the container."""
    started = []

    def start(backend):
        options = ["--detach", "--read-only", "--cap-drop=ALL", "--network=none"]
        options += ["--volume=/run/vmibridge"]
        command = ["run", "--backend", backend, "--handlers", "vmibridge.handlers.hello"]
        done = engine.run(
            "run", *options, IMAGES["bridge"], *command, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        started.append(done.stdout.strip())
        return started[-1]

    yield start
    for name in started:
        engine.run("rm", "--force", "--volumes", "--time=5", name, capture_output=True)


def test_a_wrong_socket_path_fails_the_health_check_before_the_start_period_is_over(
    engine, start_bridge
):
    name = start_bridge("qemu-plugin:unix:/run/vmibridge/wrong.sock")
    assert engine.run("healthcheck", "run", name, capture_output=True).returncode == 1
    told = engine.run("inspect", "--format={{json .State.Health}}", name, capture_output=True)
    health = json.loads(told.stdout)
    assert health["Status"] == "starting"
    told = "vmibridge: unix:/run/vmibridge/vmi.sock: there is no such file"
    assert told in health["Log"][-1]["Output"]


def test_a_socket_that_cannot_be_made_ends_the_bridge_with_one_line(engine, start_bridge):
    name = start_bridge("qemu-plugin:unix:/nowhere/vmi.sock")
    assert engine.run("wait", name, capture_output=True, text=True).stdout.strip() == "1"
    logs = engine.run("logs", name, capture_output=True, text=True)
    assert "vmibridge: qemu-plugin:unix:/nowhere/vmi.sock: there is no folder" in logs.stderr

"""What the processes in the containers may do, and what their health checks tell."""

import json
import shlex
import time

import pytest
from build_images import IMAGES
from container_parts import SECONDS, composed, kernel

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


def test_a_bridge_that_serves_is_ready(running):
    running.await_health("bridge")
    log = running.inspect("bridge", "{{json .State.Health.Log}}")
    assert log[-1]["Output"].strip() == "ready"


class Alone:
    """One container of the bridge's image, confined as the compositions have it."""

    def __init__(self, engine, name):
        self._engine, self._name = engine, name

    def podman(self, *arguments):
        return self._engine.run(*arguments, capture_output=True, text=True)

    def kill(self, name):
        assert self.podman("kill", f"--signal={name}", self._name).returncode == 0

    def wait(self):
        return int(self.podman("wait", self._name).stdout)

    def logs(self):
        return self.podman("logs", self._name).stderr

    def health(self):
        """What its health check has said, if it failed; else nothing."""
        status = self.podman("healthcheck", "run", self._name).returncode
        told = self.podman("inspect", "--format={{json .State.Health.Log}}", self._name).stdout
        line = json.loads(told)[-1]["Output"].strip()
        assert line == "ready" or status == 1
        return line if status else ""

    def await_health(self, words):
        """Until its check says them: it takes a moment to start."""
        deadline = time.monotonic() + SECONDS
        while words not in (line := self.health()) or bool(words) != bool(line):
            assert time.monotonic() < deadline, (line, self.logs())

    def run(self, *command):
        return self.podman("exec", self._name, *command)

    def is_live(self):
        return self.run("vmibridge", "health", "--live").returncode == 0


@pytest.fixture
def start(engine):
    """`start(COMMAND...)` runs it in a container of its own."""
    started = []

    def run(*command, options=()):
        confined = ["--detach", "--read-only", "--cap-drop=ALL", "--network=none"]
        confined += ["--volume=/run/vmibridge", *options]
        done = engine.run(
            "run", *confined, IMAGES["bridge"], *command, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        started.append(done.stdout.strip())
        return Alone(engine, started[-1])

    yield run
    for name in started:
        engine.run("rm", "--force", "--volumes", "--time=0", name, capture_output=True)


SPEC = "qemu-plugin:unix:/run/vmibridge/vmi.sock"
BRIDGE = ("run", "--backend", SPEC, "--handlers", "vmibridge.handlers.hello")


def test_a_bridge_that_is_stopped_is_not_ready_until_it_goes_on(start):
    bridge = start(*BRIDGE)
    bridge.await_health("")
    bridge.kill("STOP")
    assert "process-stopped: process 1 is stopped by a signal" in bridge.health()
    assert not bridge.is_live()
    bridge.kill("CONT")
    bridge.await_health("")


BLOCKS = """
import time
from vmibridge import StandardHandler

class Blocks(StandardHandler[int]):
    REQUEST = 1

    async def __aenter__(self):
        time.sleep(600)

    async def __aexit__(self, *error):
        pass

    async def handle(self, vmi, packet):
        pass
"""


def test_a_handler_that_blocks_the_loop_is_not_live(start, tmp_path):
    tmp_path.chmod(0o755)
    (tmp_path / "blocks.py").write_text(BLOCKS)
    command = ("run", "--backend", SPEC, "--handlers", "/handlers/blocks.py")
    bridge = start(*command, options=[f"--volume={tmp_path}:/handlers:ro"])
    bridge.await_health("loop-blocked: no answer in 3 s: the event loop of process 1 is blocked")
    assert not bridge.is_live()


def test_an_agent_whose_server_is_gone_is_live_and_not_ready(start):
    agent = start("agent", "--backend", SPEC, "--connect", "unix:/run/vmibridge/none.sock")
    agent.await_health("server-unreachable: vm ")
    assert agent.is_live()


def test_a_bridge_whose_recordings_have_no_room_is_live_and_not_ready(start):
    filled = "head -c 4096 /dev/zero > /full/filler; exec vmibridge "
    command = filled + shlex.join([*BRIDGE, "--record", "/full"])
    volume = ["--tmpfs=/full:size=4k,mode=1777", "--entrypoint=sh"]
    bridge = start("-c", command, options=volume)
    bridge.await_health("disk-full: /full: No space left on device")
    assert bridge.is_live()
    assert bridge.run("rm", "/full/filler").returncode == 0
    bridge.await_health("")


def test_a_socket_that_cannot_be_made_ends_the_bridge_with_one_line(start):
    bridge = start(
        "run", "--backend", "qemu-plugin:unix:/nowhere/vmi.sock",
        "--handlers", "vmibridge.handlers.hello",
    )  # fmt: skip
    assert bridge.wait() == 1
    assert "vmibridge: qemu-plugin:unix:/nowhere/vmi.sock: there is no folder" in bridge.logs()

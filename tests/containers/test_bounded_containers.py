"""A bridge by itself in its container: what it prints, a full volume, and how it stops.

A recording stands for the guest, so that nothing of QEMU is needed.
"""

import time
from contextlib import contextmanager

import anyio
import pytest
from build_images import IMAGES
from recorder_parts import calls, record

from vmibridge.recording import RecordingReader, recorded_traps

pytestmark = [pytest.mark.containers, pytest.mark.no_cover]

SECONDS = 120
CALLS = 500
HANDLERS = """
import time
from vmibridge import BridgeHandler, BridgeResponse

class Probe(BridgeHandler[None]):
    MAGIC = 0x1234_5678
    REQUEST = 2
    VERIFY_VALUE4 = 0x5747

    async def handle(self, vmi, packet):
        if packet.value1 == BLOCKS_AT:
            print("at it", flush=True)
            time.sleep(3600)
        return BridgeResponse(packet.value1)
"""


class Bridge:
    """A container that runs."""

    def __init__(self, engine, name):
        self._engine = engine
        self.name = name

    def podman(self, *arguments):
        done = self._engine.run(*arguments, seconds=SECONDS, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def logs(self):
        done = self._engine.run("logs", self.name, capture_output=True, text=True)
        return done.stdout + done.stderr

    def await_log(self, words, times=1):
        deadline = time.monotonic() + SECONDS
        while self.logs().count(words) < times:
            assert time.monotonic() < deadline, self.logs()
            time.sleep(0.1)

    def state(self, what):
        return self.podman("inspect", "--format", f"{{{{.State.{what}}}}}", self.name).strip()

    def stop(self):
        """As compose.yaml has it; returns the exit status."""
        self.podman("stop", "-t", "15", self.name)
        return int(self.state("ExitCode"))

    def python(self, code):
        return self.podman("exec", self.name, "/opt/vmibridge/bin/python", "-c", code)


@pytest.fixture
def bridge(engine, tmp_path):
    """`with bridge(...)`: `vmibridge run`, whose guest makes the same calls again and again."""
    work = tmp_path / "work"
    work.mkdir()
    anyio.run(record, work / "guest.mcap", calls(CALLS))
    (work / "guest.mcap").chmod(0o644)

    @contextmanager
    def run(*options, mount="type=volume,dst=/recordings", loop=1, blocks_at=-1):
        (work / "probe.py").write_text(HANDLERS.replace("BLOCKS_AT", str(blocks_at)))
        words = ["--detach", "--read-only", "--cap-drop=ALL", "--network=none"]
        words += [f"--volume={work}:/files:ro", f"--mount={mount}", IMAGES["bridge"], "run"]
        words += ["--backend", f"replay:/files/guest.mcap?loop={loop}"]
        words += ["--handlers", "/files/probe.py", *options]
        done = engine.run("run", *words, seconds=SECONDS, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        name = done.stdout.strip()
        try:
            yield Bridge(engine, name)
        finally:
            engine.run("rm", "--force", "--volumes", "--time=1", name, capture_output=True)

    return run


def test_it_prints_no_line_for_a_trap_unless_it_is_asked_to(bridge):
    with bridge() as quiet:
        assert quiet.podman("wait", quiet.name).strip() == "0"
        assert f"{CALLS} traps: {CALLS} handled" in quiet.logs()
        assert len(quiet.logs().splitlines()) < 10
    with bridge("--outcomes") as loud:
        assert loud.podman("wait", loud.name).strip() == "0"
        assert len(loud.logs().splitlines()) > CALLS


def test_a_full_volume_holds_the_guest_and_restarts_nothing(bridge):
    options = ["--record", "/volume", "--rotate", "128K"]
    # tmpfs counts what is in it, and this is in memory.
    mount = "type=tmpfs,dst=/volume,tmpfs-size=1m,tmpfs-mode=1777"
    with bridge(*options, mount=mount, loop=0) as held:
        full = "No space left on device: the guests are held until there is room"
        held.await_log(full)
        held.python(
            "import pathlib\n"
            "for path in sorted(pathlib.Path('/volume').iterdir(), key=lambda each:"
            " each.stat().st_mtime)[:-2]: path.unlink()"
        )
        held.await_log(": nothing is missing, the guests go on")
        held.await_log(full, times=2)
        assert held.state("Running") == "true"
        assert "ERROR vmibridge.recording" in held.logs()
        assert held.stop() == 1, "what is not written yet is not recorded, and that is told"
        assert ": the recording ends here: " in held.logs()


def test_a_stop_of_a_bridge_that_works_is_a_success(bridge):
    with bridge("--record", "/recordings", "--keep", "2", loop=0) as working:
        while not int(working.python("import os; print(len(os.listdir('/recordings')))")):
            time.sleep(0.1)
        assert working.stop() == 0


def test_a_stop_under_a_handler_that_holds_up_the_loop_is_in_time(bridge, tmp_path):
    kept = tmp_path / "kept"
    kept.mkdir(mode=0o777)
    kept.chmod(0o777)
    mount = f"type=bind,src={kept},dst=/recordings"
    with bridge("--record", "/recordings", mount=mount, blocks_at=CALLS - 1) as blocked:
        blocked.await_log("at it")
        assert blocked.stop() == 143, "not 137: it was not killed"
        assert "SIGTERM: not ended after 6 s" in blocked.logs()
    (path,) = kept.iterdir()
    with RecordingReader(path) as reader:
        seqs = [trap.event.seq for trap in recorded_traps(reader.messages())]
        assert (reader.problems, reader.complete) == ([], True)
    assert len(seqs) == CALLS

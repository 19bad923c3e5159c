"""A command that is stopped has ended in time, whatever its handlers and its name servers do.

Recordings are whole then; what is asked of it after that has the status that was asked for.
"""

import signal
import sys

import pytest
from needs import own_namespaces
from probe_guest import COUNTING, command

from vmibridge.recording import RecordingReader, recorded_traps

pytestmark = pytest.mark.no_cover

LOOPS = [["--async-backend", "asyncio"], ["--async-backend", "trio"], ["--uvloop"]]
every_loop = pytest.mark.parametrize("loop", LOOPS, ids=["asyncio", "trio", "uvloop"])
CALLS = 50

HANDLERS = f'''
import sys
import threading
import time

import anyio
import anyio.to_thread
from vmibridge import BridgeHandler, BridgeResponse, method

class Blocks(BridgeHandler[None]):
    """Answers, until it is asked for the last time."""
    MAGIC = 0x42494D56
    REQUEST = 0x0100
    VERIFY_VALUE3 = VERIFY_VALUE4 = None

    async def handle(self, vmi, packet):
        if packet.value1 == {CALLS}:
            print("at it", file=sys.stderr, flush=True)
            await self.block()
        return BridgeResponse(packet.value1)

    async def block(self):
        time.sleep(3600)
'''
INSTEAD = {
    "computes": "while True: pass",
    "shields itself": "with anyio.CancelScope(shield=True): await anyio.sleep_forever()",
    "waits for a thread": "await anyio.to_thread.run_sync(time.sleep, 3600)",
    "leaves a thread": """
        await anyio.to_thread.run_sync(time.sleep, 3600, abandon_on_cancel=True)""",
}
"""What a handler may do in the place of `time.sleep`."""
SETTINGS = "[server]\ntimeout = 3600\ngrace = 0.2\nstop_timeout = 0.6\nblocked_after = 0.1\n"
GUEST = f"{COUNTING}    jmp again\n"


@pytest.fixture
def blocks(tmp_path):
    def write(how="time.sleep(3600)"):
        (tmp_path / "server.toml").write_text(SETTINGS)
        path = tmp_path / "blocks.py"
        path.write_text(HANDLERS.replace("time.sleep(3600)", how))
        return ["--handlers", path, "--config", tmp_path / "server.toml"]

    return write


def stopped(process, line="at it", *, by=signal.SIGTERM):
    """Stop it when it has said that; returns its status and all that it has said."""
    while line not in process.stderr.readline():
        pass
    process.send_signal(by)
    out, told = process.communicate()
    return process.returncode, out + told


def check_the_recording(path):
    with RecordingReader(path) as reader:
        traps = list(recorded_traps(reader.messages()))
        assert (reader.problems, reader.complete) == ([], True)
    assert [trap.event.seq for trap in traps] == list(range(1, CALLS + 1))
    assert [trap.event.seq for trap in traps if trap.reply is None] in ([], [CALLS])


@every_loop
def test_one_whose_loop_is_held_up(children, image, blocks, tmp_path, loop):
    arguments = ["--backend", f"unicorn:{image(GUEST)}", *blocks(), "--record", "run.mcap", *loop]
    with children.start(command("run", *arguments), cwd=tmp_path) as process:
        status, told = stopped(process)
    assert status == 128 + signal.SIGTERM
    assert "SIGTERM: not ended after 0.8 s: a handler, or a thread, does not end" in told
    check_the_recording(tmp_path / "run.mcap")


@pytest.mark.parametrize("how", ["computes", "shields itself", "waits for a thread"])
def test_one_whose_handler_does_not_end_for_another_reason(children, image, blocks, tmp_path, how):
    arguments = ["--backend", f"unicorn:{image(GUEST)}", *blocks(INSTEAD[how])]
    arguments += ["--record", ".", "--rotate", "1M"]
    with children.start(command("run", *arguments), cwd=tmp_path) as process:
        status, told = stopped(process)
    assert status == 128 + signal.SIGTERM
    assert ": not ended after 0.8 s" in told
    check_the_recording(tmp_path / "run-1.mcap")


@pytest.mark.parametrize("options", [[], ["--exit-zero"]], ids=str)
def test_one_that_leaves_a_thread_behind_is_done_by_then(
    children, image, blocks, tmp_path, options
):
    arguments = ["--backend", f"unicorn:{image(GUEST)}", *blocks(INSTEAD["leaves a thread"])]
    with children.start(command("run", *arguments, *options), cwd=tmp_path) as process:
        status, told = stopped(process)
    assert status == (0 if options else 128 + signal.SIGTERM)
    assert f"{CALLS} traps: {CALLS - 1} handled, 1 cancelled" in told


def test_a_server_whose_loop_is_held_up(children, vmibridge, image, blocks, tmp_path):
    where = "unix:x.sock"
    server = command("serve", "--listen", where, *blocks(), "--record", "runs")
    with children.start(server, cwd=tmp_path) as process:
        while "listening" not in process.stderr.readline():
            pass
        agent = command("agent", "--backend", f"web=unicorn:{image(GUEST)}", "--connect", where)
        with children.start(agent, cwd=tmp_path) as beside:
            status, told = stopped(process)
            beside.send_signal(signal.SIGTERM)
            assert beside.wait() == 128 + signal.SIGTERM
    assert status == 128 + signal.SIGTERM
    assert ": not ended after 0.8 s" in told
    check_the_recording(tmp_path / "runs" / "web-1.mcap")


# --- the status -----------------------------------------------------------------------------


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
@pytest.mark.parametrize(
    ("options", "variable", "zero"),
    [([], "", False), (["--exit-zero"], "", True), ([], "1", True), ([], "true", True)],
    ids=str,
)
def test_a_stop_that_was_asked_for_is_a_success_where_that_is_asked_for(
    children, tmp_path, handlers, monkeypatch, by, options, variable, zero
):
    if variable:
        monkeypatch.setenv("VMIBRIDGE_EXIT_ZERO", variable)
    server = command("serve", "--listen", "unix:x.sock", "--handlers", handlers, *options)
    with children.start(server, cwd=tmp_path) as process:
        status, _ = stopped(process, "listening", by=by)
    assert status == (0 if zero else 128 + by)


def test_so_it_is_for_a_run_and_an_agent(children, image, blocks, tmp_path):
    guest = f"unicorn:{image('jmp $')}"
    run = ["run", "--backend", guest, *blocks(), "--exit-zero", "--log-level", "debug"]
    with children.start(command(*run, "--record", "r.mcap"), cwd=tmp_path) as process:
        while not (tmp_path / "r.mcap").exists():
            pass
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0
    agent = ["agent", "--backend", guest, "--connect", "unix:no.sock", "--exit-zero"]
    with children.start(command(*agent), cwd=tmp_path) as process:
        status, _ = stopped(process, "no.sock")
    assert status == 0


# --- while it starts ------------------------------------------------------------------------


@pytest.mark.parametrize("command_line", ["run", "agent"])
def test_a_backend_that_waits_for_its_vm_is_not_waited_for(
    children, handlers, tmp_path, command_line
):
    others = {"run": ["--handlers", handlers], "agent": ["--connect", "unix:no.sock"]}
    backend = "qemu-gdb:unix:no-qemu.sock?within=3600&site=0x1000"
    line = command(command_line, "--backend", backend, *others[command_line])
    with children.start(line, cwd=tmp_path) as process:
        status, told = stopped(process, "waiting for QEMU")
    assert status == 128 + signal.SIGTERM
    assert "not ended" not in told


AS_INIT = """
import os, subprocess, sys
with subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE, text=True) as outer:
    assert outer.stdout.readline() == "loading\\n"
    with open(f"/proc/{outer.pid}/task/{outer.pid}/children") as children:
        os.kill(int(children.read()), 15)
    sys.exit(outer.wait())
"""


def test_the_first_process_of_a_container_ends_while_it_loads_handlers(children, image, tmp_path):
    (tmp_path / "slow.py").write_text(
        "import time\nprint('loading', flush=True)\ntime.sleep(3600)\n"
    )
    inside = own_namespaces("--pid", "--fork", "--mount-proc")
    line = command("run", "--backend", f"unicorn:{image('hlt')}", "--handlers", "slow.py")
    outer = [sys.executable, "-c", AS_INIT, *inside, *line]
    with children.start(outer, cwd=tmp_path) as process:
        assert process.wait() == 128 + signal.SIGTERM


# --- a name server that is silent -----------------------------------------------------------

SILENT = '''
"""In namespaces of its own: a name server that never answers, and a command that asks it."""
import fcntl, socket, struct, subprocess, sys

with socket.socket() as any_socket:
    # SIOCSIFFLAGS: IFF_UP | IFF_RUNNING (netdevice(7)).
    fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh14x", b"lo", 0x41))
for name, text in (
    # Ten minutes and more, for whoever waits for it.
    ("resolv.conf", "nameserver 127.0.0.1\\noptions timeout:30 attempts:5 ndots:1\\n"),
    ("nsswitch.conf", "hosts: dns\\n"),
    ("hosts", ""),
):
    with open(name, "w") as file:
        file.write(text)
    subprocess.run(["mount", "--bind", name, f"/etc/{name}"], check=True)
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
    server.bind(("127.0.0.1", 53))
    with subprocess.Popen(sys.argv[1:], stderr=subprocess.PIPE, text=True) as process:
        server.settimeout(0.2)
        while process.poll() is None:
            try:
                server.recv(4096)
                break
            except TimeoutError:
                pass
        process.terminate()
        _, told = process.communicate()
sys.stderr.write(told)
sys.exit(process.returncode)
'''


@pytest.fixture
def silent(tmp_path):
    path = tmp_path / "silent.py"
    path.write_text(SILENT)
    return [*own_namespaces("--net", "--mount"), sys.executable, path]


TCP = "tcp:server.example:7443?anywhere=true"


@pytest.mark.parametrize(
    ("where", "loop"),
    [("nats://nats.example", []), ("nats://nats.example", LOOPS[2]), (TCP, []), (TCP, LOOPS[1])],
    ids=str,
)
def test_a_name_server_that_is_silent_is_not_waited_for(
    children, image, tmp_path, silent, where, loop
):
    agent = ["agent", "--backend", f"unicorn:{image('hlt')}", "--connect", where, *loop]
    with children.start([*silent, *command(*agent)], cwd=tmp_path) as process:
        _, told = process.communicate()
    assert (process.returncode, "not ended" in told) == (128 + signal.SIGTERM, False), told


def test_nor_is_it_by_a_server_at_nats(children, handlers, tmp_path, silent):
    server = ["serve", "--listen", "nats://nats.example", "--handlers", handlers]
    with children.start([*silent, *command(*server)], cwd=tmp_path) as process:
        _, told = process.communicate()
    assert (process.returncode, "not ended" in told) == (128 + signal.SIGTERM, False), told

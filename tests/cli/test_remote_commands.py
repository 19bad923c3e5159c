"""`vmibridge serve` and `vmibridge agent` as processes of their own."""

import json
import signal
import threading
from contextlib import ExitStack, contextmanager

import pytest
from probe_guest import calls, command

PASSED = 0x600D

# Asks for 1 + r12 until it has an answer with the stamp, COUNT times.
GUEST = """
    mov r13d, {count}
next:
    mov r12, r13
again:
    mov r8, r12
    mov ecx, 0x42494d56
    mov edx, 0x10100
    xor eax, eax
    mov rbx, 0
    mov r14, 0
    vmcall
    mov r15, 0x213353522d494d56
    cmp rcx, r15
    jne again
    lea rbx, [r12 + 1]
    mov rsi, 1
    cmp rax, rbx
    jne done
    mov r9d, {spin}
spin:
    dec r9d
    jnz spin
    dec r13d
    jnz next
    mov rsi, 0x600d
done:
    mov rax, rsi
    hlt
"""

HANDLER = '''
import sys
from pathlib import Path
from vmibridge import BridgeHandler, BridgeResponse, method

class Adds(BridgeHandler[int]):
    """Adds."""
    MAGIC = 0x42494D56
    REQUEST = 0x0100
    VERIFY_VALUE3 = 0x213353522D494D56

    @method(1)
    async def add(self, vmi, packet):
        """Adds {number}."""
        return BridgeResponse(value1=packet.value1 + {number}).with_output({number})
'''


SHARED = """
import sys
from vmibridge import BridgeHandler, BridgeResponse, method

class Counts(BridgeHandler[int]):
    MAGIC = 0x42494D56
    REQUEST = 0x0100
    VERIFY_VALUE3 = 0x213353522D494D56
    shared = serial = True
    count = {count}

    async def __aenter__(self):
        print("entered {count}", file=sys.stderr, flush=True)
        return self

    async def __aexit__(self, *error):
        print("left {count}", file=sys.stderr, flush=True)

    @method(1)
    async def add(self, vmi, packet):
        self.count += 1
        return BridgeResponse(value1=packet.value1 + 1).with_output(self.count)
"""


@pytest.fixture
def started(children, tmp_path):
    """`with started(ARGUMENTS) as run`: a command of its own, which is killed at the end."""

    @contextmanager
    def start(*arguments, wait_for=None):
        with children.start(command(*arguments), cwd=tmp_path) as run:
            run.before = []
            while wait_for and wait_for not in (line := run.stderr.readline()):
                assert line, f"it has ended: {run.told()}"
                run.before.append(line)
            yield run

    return start


@pytest.fixture
def serve_options(tmp_path):
    (tmp_path / "adds.py").write_text(HANDLER.format(number=1))
    return ["serve", "--listen", "unix:x.sock", "--handlers", "adds.py"]


def agent_options(image, *more, vm="web"):
    return [
        "agent",
        "--backend",
        f"{vm}=unicorn:{image}",
        "--connect",
        "unix:x.sock",
        "--json",
        *more,
    ]


def ended(run):
    """Its exit status, the lines of its standard output, and what else it printed, from here on."""
    out, told = run.communicate()
    return run.returncode, [json.loads(line) for line in out.splitlines()], told


LISTENS = "listening at unix:x.sock"
LOOPS = {"asyncio": [], "uvloop": ["--uvloop"], "trio": ["--async-backend", "trio"]}


class TestTogether:
    @pytest.mark.parametrize("there", LOOPS)
    @pytest.mark.parametrize("here", ["asyncio", "trio"])
    def test_a_guest_is_served_whatever_loops_the_ends_run_on(
        self, started, image, serve_options, here, there
    ):
        guest = image(GUEST.format(count=20, spin=1))
        with started(*serve_options, "--json", *LOOPS[there], wait_for=LISTENS) as server:
            with started(*agent_options(guest, *LOOPS[here])) as agent:
                status, lines, told = ended(agent)
            assert status == 0, told
            assert lines[-1]["summary"]["answered"] == 20
            assert lines[-1]["summary"]["guest"][0]["registers"]["rax"] == PASSED
            server.send_signal(signal.SIGTERM)
            status, lines, _ = ended(server)
        assert status == 143
        assert len(lines) == 21
        assert {line["vm"] for line in lines[:20]} == {"web"}
        summary = lines[-1]["summary"]
        assert (summary["vm"], summary["handled"]) == ("web", 20)
        assert summary["agent"]["connections"] == 1

    def test_the_agent_may_come_first(self, started, image, serve_options):
        guest = image(GUEST.format(count=3, spin=1))
        with (
            started(*agent_options(guest), wait_for="trying again") as agent,
            started(*serve_options, wait_for=LISTENS) as server,
        ):
            assert ended(agent)[0] == 0
            server.send_signal(signal.SIGINT)
            assert server.wait() == 130

    def test_people_get_plain_lines(self, started, image, serve_options):
        guest = image(GUEST.format(count=3, spin=1))
        with started(*serve_options, wait_for=LISTENS) as server:
            options = agent_options(guest)
            options.remove("--json")
            with started(*options) as agent:
                out, _ = agent.communicate()
            assert out == "3 traps: 3 answered by the server, 0 here; 1 connection\n"
            server.send_signal(signal.SIGTERM)
            out, _ = server.communicate()
        assert "vm web: 3 traps: 3 handled\n" in out

    def test_a_guest_that_exits_ends_its_session_and_not_the_server(
        self, started, image, serve_options
    ):
        source = calls("0xffff", value=3, request="0x111")
        guest = image(source)
        served = [*serve_options, "vmibridge.handlers.exit", "--json"]
        with started(*served, wait_for=LISTENS) as server:
            for vm in ("red", "blue"):
                with started(*agent_options(guest, vm=vm)) as agent:
                    status, _, told = ended(agent)
                    assert status == 0, told
            server.send_signal(signal.SIGTERM)
            status, lines, told = ended(server)
        assert status == 143
        assert [line["summary"]["exits"] for line in lines if "summary" in line] == [
            [{"vm": vm, "status": 3, "reason": None}] for vm in ("red", "blue")
        ]
        for vm in ("red", "blue"):
            assert f"vm {vm}: exited with status 3" in told

    def test_each_vm_is_recorded_in_a_file_of_its_own(
        self, started, image, serve_options, tmp_path, vmibridge
    ):
        guest = image(GUEST.format(count=3, spin=1))
        with started(*serve_options, "--record", "runs", wait_for=LISTENS) as server:
            for _ in range(2):
                with started(*agent_options(guest)) as agent:
                    assert ended(agent)[0] == 0
            server.send_signal(signal.SIGTERM)
            server.communicate()
        for name in ("web-1", "web-2"):
            done = vmibridge("replay", str(tmp_path / f"runs/{name}.mcap"), "--handlers", "adds.py")
            assert done.returncode == 0, done.stderr


class TestShared:
    def test_one_handler_serves_all_vms_until_handlers_are_loaded_anew(
        self, started, image, serve_options, tmp_path
    ):
        (tmp_path / "adds.py").write_text(SHARED.format(count=0))
        guest = image(GUEST.format(count=5, spin=1))
        with started(*serve_options, "--json", wait_for=LISTENS) as server:
            for count in (0, 100):
                for vm in ("red", "blue"):
                    with started(*agent_options(guest, vm=vm)) as agent:
                        assert ended(agent)[0] == 0
                if count == 0:
                    (tmp_path / "adds.py").write_text(SHARED.format(count=100))
                    server.send_signal(signal.SIGHUP)
                    while "handlers reloaded" not in (line := server.stderr.readline()):
                        assert line
                        server.before.append(line)
            server.send_signal(signal.SIGTERM)
            _, lines, told = ended(server)
        outputs = [line["output"] for line in lines if "output" in line]
        assert outputs == [*range(1, 11), *range(101, 111)]
        lives = [line for line in ("".join(server.before) + told).splitlines() if line[-1:] == "0"]
        assert lives == ["entered 0", "left 0", "entered 100", "left 100"]


class TestSignals:
    def test_a_stop_lets_the_guest_of_an_agent_go(self, started, image, serve_options):
        guest = image("again: mov ecx, 0x42494d56\n mov edx, 0x10100\n vmcall\n jmp again")
        with (
            started(*serve_options, "--log-level", "info", wait_for=LISTENS) as server,
            started(*agent_options(guest), wait_for="connected") as agent,
        ):
            read_on(server)
            agent.send_signal(signal.SIGTERM)
            status, lines, _ = ended(agent)
        assert status == 143
        assert lines[-1]["summary"]["guest"][0]["reason"] == "stopped"

    def test_sighup_loads_handlers_anew_while_a_guest_runs(
        self, started, image, serve_options, tmp_path
    ):
        guest = image("again: mov ecx, 0x42494d56\n mov edx, 0x10100\n vmcall\n jmp again")
        with (
            started(*serve_options, "--json", wait_for=LISTENS) as server,
            started(*agent_options(guest), wait_for="connected"),
        ):

            def output_becomes(number):
                while json.loads(server.stdout.readline())["output"] != number:
                    pass

            output_becomes(1)
            (tmp_path / "adds.py").write_text(HANDLER.format(number=2))
            server.send_signal(signal.SIGHUP)
            output_becomes(2)
            (tmp_path / "adds.py").write_text("this is no Python")
            server.send_signal(signal.SIGHUP)
            # Standard output has to be read, or the server waits for us.
            read_on(server)
            while "stay as they are" not in (line := server.stderr.readline()):
                assert line
            assert "adds.py:1: SyntaxError" in line


class TestWrongUsage:
    @pytest.mark.parametrize(
        ("arguments", "status", "why"),
        [
            (["--listen", "tcp:0.0.0.0:1", "--handlers", "adds.py"], 2, "anyone there"),
            (["--listen", "unix:no/such/x.sock", "--handlers", "adds.py"], 1, "no folder no/such"),
            (["--listen", "unix:x.sock", "--handlers", "none.py"], 2, "none.py"),
            (["--listen", "unix:x.sock", "--handlers", "adds.py", "--keep-vm", "0"], 2, "keep-vm"),
            (["--listen", "unix:x.sock", "--handlers", "adds.py", "--redact", "memory"], 2,
             "--record FOLDER"),
        ],
    )  # fmt: skip
    def test_of_serve_is_told(self, vmibridge, serve_options, arguments, status, why):
        done = vmibridge("serve", *arguments)
        assert done.returncode == status
        assert done.stderr.startswith("vmibridge: ")
        assert why in done.stderr

    @pytest.mark.parametrize(
        ("arguments", "status", "why"),
        [
            (["--backend", "none:", "--connect", "unix:x"], 2, "no backend"),
            (["--backend", "=unicorn:x", "--connect", "unix:x"], 2, "name of the VM"),
            (["--backend", "unicorn:x", "--connect", "x"], 2, "a URL is"),
            (["--backend", "unicorn:x", "--connect", "unix:x", "--deadline", "0"], 2,
             "vmibridge: --deadline: must be above 0 seconds, got 0.0\n"),
            (["--backend", "unicorn:none.bin", "--connect", "unix:x"], 1, "no such file"),
        ],
    )  # fmt: skip
    def test_of_agent_is_told(self, vmibridge, arguments, status, why):
        done = vmibridge("agent", *arguments)
        assert done.returncode in (status, 2)
        assert why in done.stderr

    def test_a_guest_that_crashes_is_told_at_both_ends(self, started, image, serve_options):
        with (
            started(*serve_options, "--json", wait_for=LISTENS),
            started(*agent_options(image("mov rax, [0x7fffffff]"))) as agent,
        ):
            status, _, told = ended(agent)
        assert status == 1
        assert "crashed" in told


def read_on(run):
    """Read what a command writes, so that it does not wait for us."""
    threading.Thread(target=run.stdout.read, daemon=True).start()


def kill_the_server(started, image, serve_options, times, count):
    """Kill it again and again while a guest runs; how often, and how the agent ended."""
    guest = image(GUEST.format(count=count, spin=2000))
    options = [*serve_options, "--timeout", "60"]
    kills = 0
    with ExitStack() as servers, started(*agent_options(guest)) as agent:
        server = servers.enter_context(started(*options, wait_for=LISTENS))
        while kills < times and agent.poll() is None:
            for _ in range(20):
                server.stdout.readline()
            server.kill()
            server.communicate()
            kills += 1
            server = servers.enter_context(started(*options, wait_for=LISTENS))
        read_on(server)
        status, lines, told = ended(agent)
    assert lines, told
    return kills, status, lines[-1]["summary"]


class TestKills:
    def test_a_guest_finishes_with_right_answers_though_its_server_is_killed_4_times(
        self, started, image, serve_options
    ):
        kills, status, summary = kill_the_server(started, image, serve_options, 4, 3000)
        assert status == 0, summary
        assert kills == 4
        assert summary["guest"][0]["registers"]["rax"] == PASSED
        assert summary["connections"] == 5
        assert summary["own"] == 0

    @pytest.mark.slow
    @pytest.mark.no_cover
    def test_and_50_times(self, started, image, serve_options):
        kills, status, summary = kill_the_server(started, image, serve_options, 50, 60_000)
        assert status == 0, summary
        assert kills == 50
        assert summary["guest"][0]["registers"]["rax"] == PASSED
        assert summary["own"] == 0

"""SIGINT and SIGTERM to `vmibridge run` while a handler is pending: one, and two.

The first lets handlers end by themselves, for the grace period; the second cuts that short.
Either way the vCPU is answered and goes on, and the summary tells how it ended.
"""

import json
import signal
import sys
from contextlib import contextmanager

import pytest
from probe_guest import command

LOOPS = [["--async-backend", "asyncio"], ["--async-backend", "trio"], ["--uvloop"]]
every_loop = pytest.mark.parametrize("loop", LOOPS, ids=["asyncio", "trio", "uvloop"])
NUMBERS = [signal.SIGINT, signal.SIGTERM]
every_signal = pytest.mark.parametrize("number", NUMBERS, ids=lambda number: number.name)

PENDING = '''
import sys
from pathlib import Path

import anyio
from vmibridge import BridgeHandler, BridgeResponse

class Pending(BridgeHandler[str]):
    """Ends when there is a file `end`. Says on standard error where it is."""
    MAGIC = 0x42494D56
    REQUEST = 0x0100
    VERIFY_VALUE3 = VERIFY_VALUE4 = None
    may_wait = True

    async def handle(self, vmi, packet):
        say("pending")
        try:
            while not Path("end").exists():
                await anyio.sleep(0.01)
        except anyio.get_cancelled_exc_class():
            say("cancelled")
            raise
        say("ended")
        return BridgeResponse(value1=0x600D).with_output("in time")

def say(what):
    print(what, file=sys.stderr, flush=True)
'''

# No test runs into these: what ends, ends for another reason.
SETTINGS = """
[server]
timeout = 3600
grace = 3600
stop_timeout = 3600
fallback = { value1 = 0xBAD }
"""

# Keeps its answer in rax, and goes on until it is stopped.
GUEST = """
    mov ecx, 0x42494d56
    mov edx, 0x100
    vmcall
    jmp $
"""

# Asks again for as long as it is told to wait.
POLLING_GUEST = """
again:
    mov ecx, 0x42494d56
    mov edx, 0x100
    vmcall
    cmp eax, 1
    je again
    hlt
"""

# Runs what follows as `nohup` does, or a shell in the background.
IGNORES = """
import os, signal, sys
for number in (signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
os.execv(sys.argv[1], sys.argv[1:])
"""

GRACE = "SIG: stopping; handlers have their grace period, again to cancel them"
NOW = "SIG: stopping; handlers are cancelled, again to end at once"


@pytest.fixture
def started(children, image, tmp_path):
    """`with started(CODE, *OPTIONS) as run`: the command, with its handler pending."""

    @contextmanager
    def start(code, *options, before=()):
        (tmp_path / "pending.py").write_text(PENDING)
        (tmp_path / "settings.toml").write_text(SETTINGS)
        line = command(
            *("run", "--backend", f"unicorn:{image(code)}", "--handlers", "pending.py"),
            *("--config", "settings.toml", "--json", "--log-level", "info", *options),
        )
        with children.start([*before, *line], cwd=tmp_path) as run:
            wait_for("pending", run.stderr)
            yield run

    return start


def wait_for(words, stream):
    """Read lines up to the first with these words in it."""
    for line in stream:
        if words in line:
            return
    pytest.fail(f"ended without {words!r}")


def result_of(run):
    """The rest of what it shows: the traps, the summary, the end of its vCPU, and the log."""
    out, told = run.communicate()
    *traps, last = [json.loads(line) for line in out.splitlines()]
    (end,) = last["summary"]["guest"]
    return traps, last["summary"], end, told


@every_loop
@every_signal
def test_after_the_first_signal_a_handler_may_end_by_itself(started, tmp_path, loop, number):
    with started(GUEST, *loop) as run:
        run.send_signal(number)
        wait_for(GRACE.replace("SIG", number.name), run.stderr)
        (tmp_path / "end").touch()
        traps, summary, end, told = result_of(run)
    assert run.returncode == 128 + number
    assert [(trap["outcome"], trap["output"]) for trap in traps] == [("handled", "in time")]
    assert (summary["handled"], summary["cancelled"]) == (1, 0)
    assert (end["reason"], end["registers"]["rax"]) == ("stopped", 0x600D)
    assert "ended" in told
    assert "cancelled" not in told


@every_loop
@every_signal
def test_the_second_signal_cuts_the_grace_period_short(started, loop, number):
    with started(GUEST, *loop) as run:
        run.send_signal(number)
        wait_for(GRACE.replace("SIG", number.name), run.stderr)
        assert run.poll() is None
        run.send_signal(number)
        traps, summary, end, told = result_of(run)
    assert run.returncode == 128 + number
    assert [trap["outcome"] for trap in traps] == ["cancelled"]
    # The vCPU is answered all the same.
    assert (end["reason"], end["registers"]["rax"]) == ("stopped", 0xBAD)
    assert (summary["handled"], summary["cancelled"]) == (0, 1)
    assert NOW.replace("SIG", number.name) in told
    assert "cancelled\n" in told
    assert "ended" not in told


@every_loop
def test_the_second_signal_may_be_another_one(started, loop):
    with started(GUEST, *loop) as run:
        run.send_signal(signal.SIGTERM)
        wait_for(GRACE.replace("SIG", "SIGTERM"), run.stderr)
        run.send_signal(signal.SIGINT)
        traps, _, _, _ = result_of(run)
    assert run.returncode == 128 + signal.SIGTERM  # the one that made it stop
    assert [trap["outcome"] for trap in traps] == ["cancelled"]


@every_loop
def test_the_first_signal_lets_a_guest_go_that_polls(started, loop):
    # Nobody will come for the result of its handler, so that one has no grace period.
    with started(POLLING_GUEST, "--soft-timeout", "0.05", *loop) as run:
        assert json.loads(run.stdout.readline())["outcome"] == "waiting"
        run.send_signal(signal.SIGINT)
        traps, summary, end, told = result_of(run)
    assert run.returncode == 128 + signal.SIGINT
    # A poll that was queued, and not taken yet, is answered too.
    outcomes = ["waiting", *[trap["outcome"] for trap in traps]]
    assert set(outcomes[:-1]) <= {"waiting"}
    assert outcomes[-1] in ("waiting", "cancelled")
    assert summary["total"] == len(outcomes)
    assert summary["abandoned"] == 1
    assert end["reason"] in ("stopped", "halted")
    assert "cancelled\n" in told


@every_loop
def test_sigterm_stops_one_that_is_to_ignore_the_signals_of_a_terminal(started, tmp_path, loop):
    with started(GUEST, *loop, before=[sys.executable, "-c", IGNORES]) as run:
        run.send_signal(signal.SIGHUP)
        run.send_signal(signal.SIGTERM)
        wait_for(GRACE.replace("SIG", "SIGTERM"), run.stderr)
        (tmp_path / "end").touch()
        traps, _, end, _ = result_of(run)
    assert run.returncode == 128 + signal.SIGTERM
    assert [(trap["outcome"], trap["output"]) for trap in traps] == [("handled", "in time")]
    assert end["reason"] == "stopped"


@every_loop
@every_signal
def test_a_signal_ends_the_wait_for_a_vm_that_is_not_there(loop, number, children):
    spec = "qemu-gdb:unix:none.sock?site=1&within=3600"
    line = ["run", "--backend", spec, "--handlers", "vmibridge.handlers.hello", *loop]
    child = children.start(command(*line))
    assert "waiting for QEMU at unix:none.sock, for 3600 s" in child.stderr.readline()
    child.send_signal(number)
    assert child.wait() == 128 + number

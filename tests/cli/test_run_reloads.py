"""`vmibridge run` loads its handlers again: at SIGHUP, and with `--reload` when a file changes."""

import os
import signal
import sys
from contextlib import contextmanager
from subprocess import DEVNULL

import pytest
from probe_guest import command

HANDLERS = """
import anyio
from shown import VALUE
from vmibridge import StandardHandler, U32, method

class Asked(StandardHandler[int]):
    REQUEST = 0x100

    @method(1)
    async def value(self) -> U32:
        await anyio.sleep(0.1)
        return VALUE
"""

# Asks until it is told 9.
GUEST = """
again:
    mov ecx, 0x42494d56
    mov edx, 0x10100
    vmcall
    cmp ebx, 9
    jne again
    hlt
"""

# Runs what follows in a session whose terminal is standard input.
AT_A_TERMINAL = """
import fcntl, os, sys, termios
if os.getsid(0) != os.getpid():
    os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""

every_loop = pytest.mark.parametrize("loop", [[], ["--async-backend", "trio"]], ids=str)


@pytest.fixture
def started(children, image, tmp_path):
    """`with started(*OPTIONS) as run`: the command, which has answered its guest once."""

    @contextmanager
    def start(*options, before=(), stdin=DEVNULL):
        (tmp_path / "asked.py").write_text(HANDLERS)
        (tmp_path / "shown.py").write_text("VALUE = 1")
        spec = f"unicorn:{image(GUEST)}"
        line = command("run", "--backend", spec, "--handlers", "asked.py", *options)
        with children.start([*before, *line], cwd=tmp_path, stdin=stdin) as run:
            run.stdout.readline()
            assert "handled" in run.stdout.readline()
            yield run

    return start


def wait_for(words, run):
    for line in run.stderr:
        if words in line:
            return line
    raise AssertionError(run.told())


@every_loop
def test_a_change_of_a_file_is_loaded_and_a_broken_one_keeps_what_is_there(started, tmp_path, loop):
    with started("--reload", *loop) as run:
        (tmp_path / "shown.py").write_text("VALUE =")
        line = wait_for("stay as they are", run)
        assert "shown.py changed: the handlers stay as they are: " in line
        assert "shown.py:1: SyntaxError" in line
        (tmp_path / "shown.py").write_text("VALUE = 9")
        wait_for("shown.py changed: handlers reloaded, for 1 running VM", run)
        run.communicate()
    assert run.returncode == 0


@every_loop
def test_sighup_reloads_without_the_option(started, tmp_path, loop):
    with started(*loop) as run:
        (tmp_path / "shown.py").write_text("VALUE = 9")
        run.send_signal(signal.SIGHUP)
        wait_for("SIGHUP: handlers reloaded, for 1 running VM", run)
        run.communicate()
    assert run.returncode == 0


def test_sighup_while_it_starts_is_made_good_by_a_reload(children, image, tmp_path):
    told = "import sys\nprint('imported', VALUE, file=sys.stderr, flush=True)\n"
    waits = "import os, time\nwhile os.path.exists('wait'): time.sleep(0.001)\n"
    (tmp_path / "asked.py").write_text(HANDLERS + told + waits)
    (tmp_path / "shown.py").write_text("VALUE = 1")
    (tmp_path / "wait").touch()
    line = command("run", "--backend", f"unicorn:{image(GUEST)}", "--handlers", "asked.py")
    with children.start(line, cwd=tmp_path) as run:
        wait_for("imported 1", run)
        (tmp_path / "shown.py").write_text("VALUE = 9")
        run.send_signal(signal.SIGHUP)
        (tmp_path / "wait").unlink()
        wait_for("SIGHUP: handlers reloaded, for 1 running VM", run)
        run.communicate()
    assert run.returncode == 0


def test_a_terminal_that_is_closed_stops_it(started):
    ours, its = os.openpty()
    with started(before=[sys.executable, "-c", AT_A_TERMINAL], stdin=its) as run:
        os.close(its)
        os.close(ours)
        wait_for("SIGHUP: the terminal was closed: stopping", run)
        run.communicate()
    assert run.returncode == 128 + signal.SIGHUP


def test_sighup_stops_an_agent_in_good_order(children, image, tmp_path):
    """It has nothing to reload."""
    line = command("agent", "--backend", f"unicorn:{image(GUEST)}", "--connect", "unix:none.sock")
    with children.start(line, cwd=tmp_path) as agent:
        wait_for("trying again", agent)
        agent.send_signal(signal.SIGHUP)
        out, err = agent.communicate()
    assert agent.returncode == 128 + signal.SIGHUP
    assert "SIGHUP: stopping the guest" in err
    assert "0 traps" in out


def test_each_set_of_handlers_has_a_recording_of_its_own(started, tmp_path, vmibridge):
    with started("--reload", "--record", "run.mcap") as run:
        (tmp_path / "shown.py").write_text("VALUE = 9")
        wait_for("handlers reloaded", run)
        run.communicate()
    assert run.returncode == 0
    done = vmibridge("replay", "run-2.mcap", "--handlers", "asked.py")
    assert done.returncode == 0, done.stderr
    assert "0 different" in done.stdout

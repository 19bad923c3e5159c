"""A command that a fork server has started is what it is when it is started by itself."""

import os
import signal
import sys

import pytest
from children import Child
from children import run as run_child
from forked import ForkedChild
from probe_guest import PAUSE, command

pytestmark = pytest.mark.no_cover

TELLS = f"""
import os, sys
{PAUSE}
print(os.getcwd(), sys.path[0], sys.argv, os.environ.get("TOLD"), os.getsid(0) == os.getpid())
for stream in (sys.stdin, sys.stdout, sys.stderr):
    print(stream.encoding, stream.errors, stream.line_buffering, stream.write_through)
print(sorted(os.listdir("/proc/self/fd"))[:3], sys.stdin.read())
print(sys.flags, sys.warnoptions, sys.getrecursionlimit(), __name__)
sys.stdout.flush()
raise SystemExit({{status}})
"""


@pytest.fixture(params=[Child, None], ids=["alone", "forked"])
def kind(request, forks):
    return request.param or forks.start


@pytest.fixture
def both(forks, tmp_path):
    """What both say: exit status, standard output and standard error."""

    def run(*arguments, **options):
        told = []
        for kind in (Child, forks.start):
            done = run_child(command(*arguments), kind=kind, cwd=tmp_path, **options)
            told.append((done.returncode, done.stdout, done.stderr))
        return told

    return run


@pytest.mark.parametrize("status", [0, 3, "'a text'", "None"])
def test_it_has_the_same_directory_streams_environment_and_status(both, tmp_path, status):
    (tmp_path / "tells.py").write_text(TELLS.format(status=status))
    alone, forked = both("handlers", "list", "tells.py", env={**os.environ, "TOLD": "x"})
    assert alone == forked
    assert str(tmp_path) in alone[1]


@pytest.mark.parametrize("arguments", [["--version"], ["run", "--help"], ["nonsense"], ["run"]])
def test_it_says_the_same(both, arguments):
    alone, forked = both(*arguments)
    assert alone == forked


def test_it_reads_its_standard_input(forks, tmp_path):
    (tmp_path / "reads.py").write_text("import sys\nprint(sys.stdin.read())\n")
    (tmp_path / "in").write_text("what it reads")
    with (tmp_path / "in").open() as given:
        done = run_child(
            command("handlers", "list", "reads.py"), kind=forks.start, cwd=tmp_path, stdin=given
        )
    assert done.stdout == "what it reads\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_a_signal_ends_it(kind, tmp_path, number):
    (tmp_path / "waits.py").write_text(f"{PAUSE}print('waits', flush=True)\npause()\n")
    with kind(command("handlers", "list", "waits.py"), cwd=tmp_path) as child:
        assert child.stdout.readline() == "waits\n"
        child.send_signal(number)
        child.communicate()
    assert child.returncode == (130 if number == signal.SIGINT else -number)


def test_it_is_killed_at_its_limit(forks, tmp_path):
    (tmp_path / "waits.py").write_text(f"{PAUSE}print('waits', flush=True)\npause()\n")
    child = forks.start(command("handlers", "list", "waits.py"), cwd=tmp_path, seconds=3600)
    assert child.stdout.readline() == "waits\n"
    child.expire()
    with pytest.raises(AssertionError, match=r"killed after 3600 s: .*\nwaits"), child:
        child.communicate()


def test_what_an_interpreter_would_see_when_it_starts_needs_one(forks, tmp_path):
    line = command("--version")
    assert forks.may_fork(line, cwd=tmp_path)
    with forks.start(line, cwd=tmp_path) as child:
        assert isinstance(child, ForkedChild)
        child.communicate()
    assert not forks.may_fork([sys.executable, "-c", "pass"], cwd=tmp_path)
    assert not forks.may_fork(line, cwd=tmp_path, pass_fds=[0])
    assert not forks.may_fork(line, cwd=tmp_path, env={**os.environ, "PYTHONUTF8": "1"})
    (tmp_path / "rich.py").touch()
    assert not forks.may_fork(line, cwd=tmp_path)

"""The helper for children, and what a run is held to: it ends what is left and says so."""

import os
import signal
import sys
from pathlib import Path

import pytest
from children import Child, Children, descendants, left_processes, run

pytestmark = pytest.mark.no_cover

TESTS = Path(__file__).parents[1]

SLEEPS = "import time; print('asleep', flush=True); time.sleep(3600)"
STARTS_ONE = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {SLEEPS!r}], stdout=subprocess.PIPE, text=True)
print(child.stdout.readline(), end="", flush=True)
"""


def python(code):
    return [sys.executable, "-c", code]


@pytest.fixture
def run_pytest(tmp_path):
    """Run pytest on a file of these tests, with the `conftest.py` of ours."""

    def run_file(text, *, before=""):
        file = tmp_path / "test_file.py"
        file.write_text(text)
        options = ["-p", "conftest", "-p", "no:cacheprovider", "--rootdir", str(tmp_path)]
        arguments = [sys.executable, "-m", "pytest", "-q", "-ra", *options, str(file)]
        code = f"import os, signal\n{before}\nos.execv({sys.executable!r}, {arguments!r})"
        kept = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
        return run(
            python(code), cwd=tmp_path, env={**kept, "PYTHONPATH": f"{TESTS}:{TESTS / 'helpers'}"}
        )

    return run_file


class TestAChild:
    def test_is_killed_at_its_limit_with_what_it_started_and_it_is_said_what_it_printed(self):
        known = descendants()
        with (
            pytest.raises(AssertionError, match=r"killed after 120 s: (.|\n)*\nasleep\n$"),
            Child(python(f"{STARTS_ONE}child.wait()")) as child,
        ):
            assert child.stdout.readline() == "asleep\n"
            child.expire()
            child.wait()
        assert left_processes(known) == []

    def test_is_quoted_with_what_nobody_read(self):
        code = f"import sys; print('why', file=sys.stderr, flush=True); {SLEEPS}"
        with (
            pytest.raises(AssertionError, match=r"killed after 120 s: (.|\n)*\nwhy\n"),
            Child(python(code)) as child,
        ):
            assert child.stdout.readline() == "asleep\n"
            child.expire()
            child.stdout.readline()

    def test_ends_what_reads_its_output_when_the_limit_has_passed(self):
        with pytest.raises(AssertionError, match=r"killed after 0\.1 s: "):
            run(python("import time; time.sleep(3600)"), seconds=0.1)

    def test_is_killed_at_the_end_of_a_block(self):
        with Child(python(SLEEPS)) as child:
            child.stdout.readline()
        assert child.returncode == -signal.SIGKILL

    def test_that_was_not_ended_is_a_failure(self):
        children = Children()
        child = children.start(python(SLEEPS))
        child.stdout.readline()
        with pytest.raises(AssertionError, match="left running: "):
            children.end()
        assert child.returncode == -signal.SIGKILL

    def test_gives_all_that_it_prints_also_what_was_read_ahead(self, children):
        code = "import sys; print('a\\nb\\nc'); print('d', file=sys.stderr)"
        child = children.start(python(code))
        assert child.stdout.readline() == "a\n"
        assert child.communicate() == ("b\nc\n", "d\n")

    def test_that_fails_is_said_with_what_it_printed(self):
        with pytest.raises(AssertionError, match=r"ended with 3: (.|\n)*why"):
            run(python("print('why'); raise SystemExit(3)"), check=True)


class TestARun:
    def test_fails_where_a_test_leaves_a_process_and_names_both(self, run_pytest):
        done = run_pytest(
            "import subprocess, sys, children\n"
            "children._GRACE = 0.2\n"
            "def test_leaves_one():\n"
            # Of a process that is gone by then: an orphan.
            f"    subprocess.run([sys.executable, '-c', {STARTS_ONE!r}])\n"
            "def test_leaves_none(): pass\n"
        )
        assert done.returncode == 1, done.stdout
        assert "ERROR test_file.py::test_leaves_one" in done.stdout
        assert "time.sleep(3600)" in done.stdout
        assert "2 passed, 1 error" in done.stdout

    def test_fails_where_all_was_skipped(self, run_pytest):
        done = run_pytest("import pytest\ndef test_it(): pytest.skip('no such program')\n")
        assert (done.returncode, "every test was skipped" in done.stdout) == (1, True)
        done = run_pytest(
            "import pytest\ndef test_it(): pytest.skip('so')\ndef test_other(): pass\n"
        )
        assert done.returncode == 0

    @pytest.mark.parametrize("name", ["SIGINT", "SIGHUP", "SIGQUIT", "SIGTERM"])
    def test_starts_children_with_the_default_of_a_signal_that_it_was_to_ignore(
        self, run_pytest, name
    ):
        done = run_pytest(
            "import signal, sys\n"
            "from children import Child\n"
            "def test_it():\n"
            f"    with Child([sys.executable, '-c', {SLEEPS!r}]) as child:\n"
            "        child.stdout.readline()\n"
            f"        child.send_signal(signal.{name})\n"
            f"        assert child.wait() == -signal.{name}\n",
            before=f"signal.signal(signal.{name}, signal.SIG_IGN)\n"
            f"signal.pthread_sigmask(signal.SIG_BLOCK, [signal.{name}])",
        )
        assert done.returncode == 0, done.stdout


class TestNeeds:
    """Where a program of the system is missing."""

    FILE = (
        "import os, needs\n"
        "os.geteuid = lambda: {user}\n"
        "os.environ.pop('CI', None)\n"
        "os.environ.update({environment})\n"
        "needs.PACKAGES['no-such'] = 'some-package'\n"
        "def test_it(): needs.needs('no-such')\n"
        "def test_other(): pass\n"
    )

    @pytest.mark.parametrize(
        ("user", "environment", "status"), [(1000, {}, 0), (0, {}, 1), (1000, {"CI": "1"}, 1)]
    )
    def test_a_plain_user_skips_and_root_and_ci_fail(self, run_pytest, user, environment, status):
        done = run_pytest(self.FILE.format(user=user, environment=environment))
        assert done.returncode == status, done.stdout
        assert "no no-such: as root, apt-get install some-package" in done.stdout

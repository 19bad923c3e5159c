"""What the command imports before it knows what it is asked for, and where its help comes from.

A start costs what it imports: 0.2 s of CPU for the engine and its event loop, 0.1 s for cyclopts.
"""

import importlib
import subprocess
import sys

import pytest
from probe_guest import command

from vmibridge.cli.app import COMMANDS

pytestmark = pytest.mark.no_cover

LOADED = "import sys\n{code}\nprint(*sorted(sys.modules))"
RUN = (
    "import contextlib, io\n"
    "from vmibridge.cli import main\n"
    "with contextlib.redirect_stdout(io.StringIO()):\n"
    "    assert main({arguments!r}) == 0"
)


def loaded(code):
    """The modules that are there when `code` has run."""
    done = subprocess.run(
        [sys.executable, "-c", LOADED.format(code=code)],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    return set(done.stdout.split())


HEAVY = {"anyio", "asyncio", "msgspec", "ssl", "vmibridge.engine.server", "vmibridge.backends"}


def test_the_package_alone_imports_nothing_heavy():
    assert not loaded("import vmibridge") & HEAVY


def test_the_version_needs_no_command_line():
    found = loaded(RUN.format(arguments=["--version"]))
    assert not found & {*HEAVY, "cyclopts", "rich"}


def test_a_health_check_imports_next_to_nothing():
    """It runs every few seconds for as long as a container lives."""
    asked = (
        "from vmibridge.__main__ import main\n"
        "sys.argv = ['vmibridge', 'health', '--health-socket', 'none.sock']\n"
        "sys.stderr = open('/dev/null', 'w')\n"
        "assert main() == 1"
    )
    added = loaded(asked) - loaded("")
    ours = {"vmibridge", "vmibridge.__main__", "vmibridge.health", "vmibridge.health.ask"}
    assert added - {"_socket", "time"} == ours


@pytest.mark.parametrize("arguments", [["--help"], ["qemu", "--help"], []], ids=str)
def test_help_imports_no_command(arguments):
    found = loaded(RUN.format(arguments=arguments))
    modules = {f"vmibridge.cli.{function.partition(':')[0]}" for function, _ in COMMANDS.values()}
    assert not found & {*HEAVY, *modules}


def doc_of(name):
    module, _, function = COMMANDS[name][0].partition(":")
    return getattr(importlib.import_module(f"vmibridge.cli.{module}"), function).__doc__


# Imported while tests are collected, where coverage sees it: those of a fork server are there
# before it is gathered.
DOCS = {name: doc_of(name) for name in COMMANDS}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_summary_is_what_its_command_says(name):
    assert DOCS[name].splitlines()[0] == COMMANDS[name][1]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_begins_with_its_whole_docstring(vmibridge, name):
    told = " ".join(vmibridge(*name.split(), "--help", check=True).stdout.split())
    assert told.startswith(f"Usage: vmibridge {name} ")
    assert COMMANDS[name][1] in told
    assert " ".join(DOCS[name].split()) in told


def test_help_fits_a_narrow_terminal(vmibridge, monkeypatch):
    done = subprocess.run(
        command("qemu", "run", "--help"),
        capture_output=True, text=True, timeout=60, check=True, env={"COLUMNS": "60"},
    )  # fmt: skip
    assert max(map(len, done.stdout.splitlines())) <= 60


def test_every_summary_is_in_the_help(vmibridge):
    for group, *arguments in ([""], ["handlers"], ["qemu"], ["recordings"]):
        told = " ".join(vmibridge(*filter(None, [group]), *arguments, "--help").stdout.split())
        for name, (_, summary) in COMMANDS.items():
            if name.rpartition(" ")[0] == group:
                assert f"{name.rpartition(' ')[2]} {summary}" in told

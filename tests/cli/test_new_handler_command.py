"""`vmibridge new handler`: what it makes runs as it is, and names that would not are refused."""

import os
import sys

import pytest
from children import run as run_child
from needs import needs

from vmibridge.cli.new_handler import _TEMPLATES
from vmibridge.fixtures.images import C_FLAGS


@pytest.fixture
def environment(root):
    return {**os.environ, "PYTHONPATH": str(root)}


# The second is not what the class would be called by itself.
@pytest.mark.parametrize("name", ["greeter", "a_b"])
def test_the_guest_runs_and_the_tests_pass(vmibridge, tmp_path, environment, name):
    needs("gcc")
    done = vmibridge("new", "handler", name)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (
        f"{name}: {name}.py, test_{name}.py, guest.c, Makefile\n"
        f"run the guest: cd {name} && make\n"
        f"run the tests: cd {name} && make test\n"
    )
    make = [needs("make"), "-C", tmp_path / name, f"PYTHON={sys.executable}"]
    run = run_child(make, env=environment)
    assert run.returncode == 0, run.stderr
    assert "2 traps: 2 handled" in run.stdout
    if name == "greeter":
        tests = run_child([*make, "test"], env=environment)
        assert tests.returncode == 0, tests.stdout
        assert "8 passed" in tests.stdout
        clean = run_child([*make, "clean"], env=environment)
        assert clean.returncode == 0
        files = sorted(path.name for path in (tmp_path / name).iterdir())
        assert files == [".gitignore", "Makefile", "greeter.py", "guest.c", "test_greeter.py"]


def test_a_guest_that_is_answered_wrongly_fails(vmibridge, tmp_path, environment):
    needs("gcc")
    vmibridge("new", "handler", "wrong", "--folder", ".")
    handler = tmp_path / "wrong/wrong.py"
    handler.write_text(handler.read_text().replace("one + other", "one - other"))
    make = [needs("make"), "-C", tmp_path / "wrong", f"PYTHON={sys.executable}"]
    run = run_child(make, env=environment)
    assert run.returncode == 2
    assert "vmibridge: vcpu 0: main returned 1\n" in run.stderr


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("MyNotes", "'MyNotes' is no name of a handler: give a word of a-z, 0-9 and _"),
        ("MyNotes", "of at most 40 characters, such as my_notes"),
        ("my-notes", "such as my_notes"),
        ("../away", "such as away"),
        ("n" * 41, "of at most 40 characters\n"),
        ("", "'' is no name of a handler"),
        ("class", "class is a word of Python"),
        ("json", "json is a module that is installed"),
        ("msgspec", "msgspec is a module that is installed"),
        ("start", "start is the name of another file of a handler"),
        ("stdint", "stdint is the name of a header of C"),
        ("failed", "failed would be the class Failed, which vmibridge has"),
        ("status_kind", "status_kind would be the class StatusKind, which vmibridge has"),
        ("there", "there: is there already: choose another name, or --folder"),
    ],
)
def test_a_name_that_would_not_work_is_refused(vmibridge, tmp_path, name, why):
    (tmp_path / "there").mkdir()
    done = vmibridge("new", "handler", name)
    assert done.returncode == 2
    assert why in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_what_it_says_to_run_can_be_pasted(vmibridge, tmp_path):
    (tmp_path / "a b; $x").mkdir()
    done = vmibridge("new", "handler", "greeter", "--folder", "a b; $x")
    assert "run the guest: cd 'a b; $x/greeter' && make\n" in done.stdout


def test_the_makefile_compiles_as_the_fixture_does():
    """Else a guest could do other things in its tests."""
    makefile = (_TEMPLATES / "Makefile.in").read_text().replace("\\\n", " ")
    (flags,) = (line for line in makefile.splitlines() if line.startswith("CFLAGS = "))
    assert flags.split()[2:] == list(C_FLAGS)

"""`vmibridge`: the public names, each imported when it is first used."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import vmibridge

pytestmark = pytest.mark.no_cover

PACKAGE = Path(vmibridge.__file__).parent


def imported_for_type_checkers():
    """From a name to the module that type checkers take it from."""
    tree = ast.parse(Path(vmibridge.__file__).read_text())
    return {
        name.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("vmibridge.")
        for name in node.names
    }


def test_type_checkers_and_the_interpreter_see_the_same():
    seen = imported_for_type_checkers()
    assert {*seen, "__version__"} == set(vmibridge.__all__)
    for name, module in seen.items():
        assert getattr(vmibridge, name) is getattr(importlib.import_module(module), name)


def test_all_names_come_with_a_star():
    names = {}
    exec("from vmibridge import *", names)
    assert set(vmibridge.__all__) <= set(names)


def test_all_names_are_listed():
    assert set(vmibridge.__all__) <= set(dir(vmibridge))


def test_another_name_is_an_error():
    with pytest.raises(AttributeError, match="'vmibridge' has no attribute 'Brigde'"):
        _ = vmibridge.Brigde
    with pytest.raises(ImportError, match="Brigde"):
        exec("from vmibridge import Brigde", {})


def test_what_packs_an_initramfs_needs_nothing_but_python():
    """guest/linux/build-guest runs it with the Python of the system, without any package."""
    code = "import sys, vmibridge.backends.qemu.initramfs; print('anyio' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={"PYTHONPATH": str(PACKAGE.parent)},
    )
    assert (done.returncode, done.stdout) == (0, "False\n"), done.stderr


def test_every_module_can_be_imported_first():
    """No module needs that another one was imported before it."""
    # What others made is imported once, before the forks.
    code = """
import os, sys, anyio, asyncio, cyclopts, mcap, msgspec, rich.console, ssl, unicorn
for name in sys.argv[1:]:
    child = os.fork()
    if not child:
        try:
            __import__(name)
        except BaseException as error:
            print(f"{name}: {error!r}", flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""
    files = [path.relative_to(PACKAGE.parent) for path in PACKAGE.rglob("*.py")]
    names = {".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in files}
    done = subprocess.run(
        [sys.executable, "-c", code, *sorted(names)],
        capture_output=True, text=True, timeout=300, check=True,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("", "")

"""`vmibridge`: the public names, each imported when it is first used."""

import ast
import graphlib
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


def modules():
    """From the name of each module to its file."""
    files = {path.relative_to(PACKAGE.parent): path for path in PACKAGE.rglob("*.py")}
    return {
        ".".join(name.with_suffix("").parts).removesuffix(".__init__"): path
        for name, path in files.items()
    }


def run_when_imported(tree):
    """The import statements of a module that are not in a function, nor for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            yield from (each for other in node.orelse for each in run_when_imported(other))
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from run_when_imported(node)


def imports(name, path, known):
    """The modules that one imports, with those of the names that `vmibridge` imports lazily."""
    lazy = imported_for_type_checkers()
    for node in run_when_imported(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found = [each.name for each in node.names]
        else:
            assert not node.level, f"{name}: a relative import"
            # A module, or a name in one; the package of a module is there before it.
            inner = [f"{node.module}.{each.name}" for each in node.names]
            found = [each if each in known else node.module for each in inner]
            if node.module == "vmibridge":
                found = [lazy.get(each.name, each.name) for each in node.names]
        yield from (each for each in found if each in known and each != name)


def test_every_module_can_be_imported_first():
    """No module needs that another one was imported before it: none imports itself by others."""
    known = modules()
    graph = {name: {*imports(name, path, known)} for name, path in known.items()}
    assert len(graph["vmibridge.engine.server"]) > 5
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError
    code = "import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]"
    done = subprocess.run(
        [sys.executable, "-c", code, *sorted({*known} - {"vmibridge.__main__"})],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

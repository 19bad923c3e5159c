"""What is public: the modules whose `__all__` is relied on from outside, and nothing else.

The documentation and the ready-made handlers use these names only.
"""

import ast
import importlib
import inspect
import re
from itertools import pairwise
from pathlib import Path

import pytest

import vmibridge

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
HANDLERS = sorted((ROOT / "handlers").glob("*.py"))
PUBLIC = [
    "vmibridge",
    "vmibridge.bridge",
    "vmibridge.config",
    "vmibridge.engine.access_policy",
    "vmibridge.engine.server",
    "vmibridge.engine.settings",
    "vmibridge.engine.summary",
    "vmibridge.engine.taps",
    "vmibridge.errors",
    "vmibridge.recording",
    "vmibridge.testing",
    "vmibridge.text",
    "vmibridge.transport",
    "vmibridge.vm.backend",
    "vmibridge.vm.memory",
    "vmibridge.vm.trap",
]

modules = pytest.mark.parametrize("name", PUBLIC)


@modules
def test_every_name_is_there_and_each_once(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__all__
    assert len(set(module.__all__)) == len(module.__all__)
    assert [each for each in module.__all__ if not hasattr(module, each)] == []


@modules
def test_names_are_sorted_constants_then_classes_then_functions(name: str) -> None:
    names = importlib.import_module(name).__all__
    assert names == sorted(names, key=kind_and_name)


@modules
def test_every_name_is_documented(name: str) -> None:
    """By its own docstring: an inherited one says what another class is."""
    module = importlib.import_module(name)
    assert module.__doc__
    pages = "\n".join(page.read_text("utf-8") for page in DOCUMENTS)
    undocumented = [
        each
        for each in module.__all__
        if not has_docstring(getattr(module, each))
        and each not in documented_constants(module)
        and not re.search(rf"\b{re.escape(each)}\b", pages)
    ]
    assert undocumented == []


@pytest.mark.parametrize(
    "page", [*DOCUMENTS, *HANDLERS], ids=lambda path: str(path.relative_to(ROOT))
)
def test_pages_and_handlers_import_public_names_only(page: Path) -> None:
    imported = re.findall(
        r"^[ \t]*from (vmibridge[\w.]*) import (\([^)]*\)|[^\n(]+)",
        page.read_text("utf-8"),
        re.MULTILINE,
    )
    names = [(name, each) for name, what in imported for each in re.findall(r"\w+", what)]
    assert [
        f"{name}.{each}"
        for name, each in names
        if not name.startswith("vmibridge.handlers._")  # parts of a handler
        and (name not in PUBLIC or each not in importlib.import_module(name).__all__)
    ] == []


def test_what_the_package_offers_is_public_where_it_is_made() -> None:
    """So that a name has the same promise by whichever module it is imported."""
    for name in vmibridge.__all__:
        thing = getattr(vmibridge, name)
        made_in = getattr(thing, "__module__", None)
        if made_in in PUBLIC and (inspect.isclass(thing) or inspect.isroutine(thing)):
            assert name in importlib.import_module(made_in).__all__, f"{made_in}.{name}"


def kind_and_name(name: str) -> tuple[int, str]:
    """The order of an import list: CONSTANTS, Classes, functions; I8 before I16."""
    kind = 0 if name.isupper() else 1 if name[0].isupper() else 2
    return kind, re.sub(r"\d+", lambda number: number[0].zfill(9), name)


def has_docstring(thing: object) -> bool:
    if inspect.isclass(thing):
        return bool(vars(thing).get("__doc__"))
    return inspect.isroutine(thing) and bool(inspect.getdoc(thing))


def documented_constants(module: object) -> set[str]:
    """Names that a string follows, in the module itself and where it imports them from."""
    found = set()
    for name in {module.__name__, *PUBLIC}:
        file = importlib.import_module(name).__file__
        body = ast.parse(Path(file).read_text("utf-8")).body
        for node, after in pairwise(body):
            if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(after, ast.Expr):
                target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
                found.add(getattr(target, "id", ""))
    return found

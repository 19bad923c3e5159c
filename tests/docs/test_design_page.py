"""docs/design.md: its layers are those of the contract, and the code that it names is there."""

import ast
import builtins
import re
import tomllib
from itertools import chain, pairwise

from documents import ROOT, prose, section


def test_every_layer_is_there():
    """Each module of the contract is in the table of the design, in the order of its layers."""
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    layers = [layer.split(" | ") for layer in contract["contracts"][0]["layers"]]
    lines = section("docs/design.md", "## Layers").splitlines()
    table = [re.findall(r"`(\w+)`", line.split(" | ")[0]) for line in lines if line[:3] == "| `"]
    assert sorted(chain(*table)) == sorted(chain(*layers))
    row_of = {module: row for row, modules in enumerate(table) for module in modules}
    for above, below in pairwise(layers):
        assert max(row_of[module] for module in above) <= min(row_of[module] for module in below)


def classes_of_the_code():
    """From each class of vmibridge to the names in its body, also those that methods set."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / "vmibridge").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, set()).update(
                    each.name
                    if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)
                    else each.id
                    if isinstance(each, ast.Name)
                    else each.attr
                    for each in ast.walk(node)
                    if isinstance(
                        each, ast.FunctionDef | ast.AsyncFunctionDef | ast.Name | ast.Attribute
                    )
                )
    return found


def test_code_that_the_design_names_is_there():
    classes = classes_of_the_code()
    told = re.findall(r"`([A-Za-z_][\w/.]*)(?:\(\))?`", prose(ROOT / "docs/design.md"))
    wrong = []
    for name in dict.fromkeys(told):
        first, _, second = name.partition(".")
        if name.endswith(".py"):
            is_there = (ROOT / "vmibridge" / name).exists() or (ROOT / name).exists()
        elif re.match(r"[A-Z][a-z]", first) and not hasattr(builtins, first):
            is_there = first in classes and second in {"", *classes[first]}
        else:
            continue
        if not is_there:
            wrong.append(name)
    assert wrong == []

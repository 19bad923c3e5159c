"""SECURITY.md: the limits that it names are those of the code."""

import importlib
import re
from pathlib import Path

import pytest

import vmibridge

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "SECURITY.md").read_text("utf-8")
LIMIT = re.compile(r"^\| (.+) \| (\d+)(?: (KiB|MiB|s))? \| `(vmibridge\.[\w.]+)` \|$", re.MULTILINE)
UNITS = {"": 1, "s": 1, "KiB": 1 << 10, "MiB": 1 << 20}
LIMITS = LIMIT.findall(PAGE)


@pytest.mark.parametrize(
    ("value", "unit", "name"), [row[1:] for row in LIMITS], ids=[row[3] for row in LIMITS]
)
def test_a_limit_is_what_the_page_says(value: str, unit: str, name: str) -> None:
    assert value_of(name) == int(value) * UNITS[unit]


def test_every_row_of_the_table_is_looked_at() -> None:
    rows = PAGE.partition("name in the code |\n")[2].partition("\n\n")[0].splitlines()
    assert len(rows) - 1 == len(LIMITS) > 20


def test_this_release_is_supported() -> None:
    series = ".".join(vmibridge.__version__.split(".")[:2])
    assert re.search(rf"^\| {re.escape(series)}\.x \| yes \|$", PAGE, re.MULTILINE)


def value_of(name: str) -> object:
    """The constant, or the default of the field, of a dotted name."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        break
    for place, part in enumerate(parts[end:], end):
        # A struct's field is a descriptor of its class: its default is with the others.
        fields = getattr(found, "__struct_fields__", ())
        if part in fields and place == len(parts) - 1:
            defaults = found.__struct_defaults__
            return defaults[fields.index(part) - len(fields)]
        found = getattr(found, part)
    return found

"""Guest text on a terminal: nothing in it may steer, reorder or start a line. Counts in words."""

import ast
import re
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import vmibridge
from vmibridge.text import counted, printable

PACKAGE = Path(vmibridge.__file__).parent
COUNTING = [
    *sorted((PACKAGE / "cli").rglob("*.py")),
    *sorted((PACKAGE / "recording").rglob("*.py")),
]
NOUNS = ("traps", "requests", "recordings", "messages", "replies", "problems", "connections")


@given(st.text(st.characters(codec=None)))
def test_it_is_printable_and_printable_text_is_unchanged(text):
    escaped = printable(text)
    assert escaped.isprintable()
    assert len(escaped.splitlines()) <= 1
    assert escaped.encode().decode() == escaped
    if text.isprintable():
        assert escaped == text


@pytest.mark.parametrize(
    ("count", "words", "told"),
    [
        (0, ("trap",), "0 traps"),
        (1, ("trap",), "1 trap"),
        (2, ("trap",), "2 traps"),
        (1, ("reply",), "1 reply"),
        (2, ("reply",), "2 replies"),
        (2, ("memory access",), "2 memory accesses"),
        (1, ("trap was", "traps were"), "1 trap was"),
        (3, ("trap was", "traps were"), "3 traps were"),
    ],
)
def test_counts_are_in_words(count, words, told):
    assert counted(count, *words) == told


def test_messages_of_commands_and_recordings_count_in_one_way():
    assert [
        f"{path.name}:{line}: {text}" for path in COUNTING for line, text in plurals_in(path)
    ] == []


def plurals_in(path):
    """Each f-string with a value and one of `NOUNS` behind it; a constant may be the value."""
    for node in ast.walk(ast.parse(path.read_text())):
        parts = node.values if isinstance(node, ast.JoinedStr) else []
        for value, behind in pairwise(parts):
            if isinstance(value, ast.FormattedValue) and isinstance(behind, ast.Constant):
                shown = ast.unparse(value.value)
                counts = re.match(f" ({'|'.join(NOUNS)})(?![\\w/])", behind.value)
                if counts and not shown.lstrip("_").isupper():
                    yield node.lineno, shown + behind.value

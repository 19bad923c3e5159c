"""Guest text on a terminal: nothing in it may steer, reorder or start a line."""

from hypothesis import given
from hypothesis import strategies as st

from vmibridge.text import counted, printable


@given(st.text(st.characters(codec=None)))
def test_it_is_printable_and_printable_text_is_unchanged(text):
    escaped = printable(text)
    assert escaped.isprintable()
    assert len(escaped.splitlines()) <= 1
    assert escaped.encode().decode() == escaped
    if text.isprintable():
        assert escaped == text


def test_a_count_has_a_singular_and_a_plural():
    assert [counted(count, "trap") for count in (0, 1, 2)] == ["0 traps", "1 trap", "2 traps"]

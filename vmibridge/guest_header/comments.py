"""Docstrings as comments: whatever stands in them, the comment ends where its emitter ends it."""

from vmibridge.text import printable

__all__ = ["comment_lines"]

_ENDS = (("*/", "* /"), ("/*", "/ *"), ("??", "? ?"))
"""What ends or begins a comment of C or Rust, and what begins a trigraph of C."""


def comment_lines(doc: str) -> list[str]:
    """The lines of a docstring, fit for a comment of C, NASM and Rust.

    A backslash at the end of a line would join it with the next one.
    """
    lines = [_safe(line.rstrip()) for line in doc.expandtabs().splitlines()]
    while lines and not lines[-1]:
        lines.pop()
    while lines and not lines[0]:
        lines.pop(0)
    return lines


def _safe(line: str) -> str:
    line = printable(line)
    for what, instead in _ENDS:
        # One pair may be made of what is left of another: `**//`, `????`.
        while what in line:
            line = line.replace(what, instead)
    return f"{line}." if line.endswith("\\") else line

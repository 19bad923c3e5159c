"""Names of files as a guest gives them: read once, and in one way.

A name leads to a place below one folder. What two systems might read in two ways is refused, so
that a file which a guest left is safe to open, to copy and to serve on any of them:

| refused | since |
|---|---|
| an empty part, `.` and `..` | they lead elsewhere |
| `\\` and `:` | a separator, a drive or a stream on Windows |
| `< > " \\| ? *` | no characters of a name there; shells expand some |
| control characters, line separators, what reverses the order of text | they steer a terminal |
| a lone surrogate | no text |
| a device of DOS, with any extension: `con`, `NUL.txt`, `com1 .log` | Windows opens the device |
| a dot or a space at the end of a part, a space at its beginning | Windows drops it: another name |
| more than 255 bytes of UTF-8, or 255 units of UTF-16, in a part; more than 16 parts | `NAME_MAX` |
| what begins with `.vmibridge-` | names of the store itself |
"""

import re

__all__ = ["MAX_NAME", "MAX_PARTS", "RESERVED", "is_part", "parse_name"]

MAX_NAME = 4096
"""Bytes of a name, in UTF-8 or UTF-16, without its NUL."""
MAX_PARTS = 16
"""Folders on the way, and the file."""
RESERVED = ".vmibridge-"
"""What names of the store itself begin with."""

_MAX_PART = 255
"""Bytes on Linux, units of UTF-16 on Windows."""
_FORBIDDEN = re.compile(
    r'[<>:"|?*\\/]'
    # Control characters, and the separators of lines and paragraphs.
    "|[\\x00-\\x1f\\x7f-\\x9f\\u2028\\u2029]"
    # Unicode Standard Annex 9: what sets the direction of text.
    "|[\\u061c\\u200e\\u200f\\u202a-\\u202e\\u2066-\\u2069]"
    "|[\\ud800-\\udfff]"
)
# Windows documentation, "Naming Files, Paths, and Namespaces": superscript digits, too.
_DIGITS = "0123456789\u00b9\u00b2\u00b3"
_DEVICES = frozenset(
    ["con", "prn", "aux", "nul", "conin$", "conout$", "clock$"]
    + [f"{port}{digit}" for port in ("com", "lpt") for digit in _DIGITS]
)


def parse_name(name: str) -> tuple[str, ...]:
    """The parts of a name, with `/` between them; at least one.

    Raises `ValueError`, which says what is wrong with it.
    """
    parts = tuple(name.split("/"))
    if len(parts) > MAX_PARTS:
        raise ValueError(f"more than {MAX_PARTS} parts")
    for part in parts:
        _check_part(part)
    return parts


def is_part(part: str) -> bool:
    """Whether this is a name that a guest may give, or a part of one."""
    try:
        _check_part(part)
    except ValueError:
        return False
    return True


def _check_part(part: str) -> None:
    if part in ("", ".", ".."):
        raise ValueError("a part that is empty, . or ..")
    if _FORBIDDEN.search(part):
        raise ValueError("a character that is not allowed")
    if part[-1] in ". " or part[0] == " ":
        raise ValueError("a part with a dot at its end, or a space at an end")
    if len(part.encode()) > _MAX_PART or len(part.encode("utf-16-le")) > 2 * _MAX_PART:
        raise ValueError(f"a part of more than {_MAX_PART} bytes")
    # In the opinion of Windows a device ends at the first dot or colon, without spaces before it.
    if part.partition(".")[0].rstrip(" ").lower() in _DEVICES:
        raise ValueError("a device of DOS")
    if part.lower().startswith(RESERVED):
        raise ValueError(f"a part that begins with {RESERVED}")

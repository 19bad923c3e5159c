"""Text that may come from a guest, made fit for a terminal and a log.

Nothing that a guest sends may move a cursor, change a colour, reorder a line or
start a new one.
"""

__all__ = ["printable", "printable_json"]


def printable(text: str) -> str:
    """`text` with everything that is not printable as a backslash escape."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def printable_json(line: bytes, *, ascii_only: bool = False) -> bytes:
    """JSON that means the same, with an escape for each character that is not printable.

    An encoder escapes what JSON demands: not DEL, C1 controls, U+2028 or U+202E. Such characters
    stand inside strings alone, so an escape fits wherever one is. `ascii_only`: escape all beyond
    ASCII, for where the encoding may lack a character. Line feeds stay.
    """
    if line.isascii() and b"\x7f" not in line:
        return line
    text = line.decode()
    return "".join(
        c if c == "\n" or (c.isprintable() and (c.isascii() or not ascii_only)) else _escaped(c)
        for c in text
    ).encode()


def _escaped(character: str) -> str:
    units = character.encode("utf-16-be")
    return "".join(f"\\u{units[at : at + 2].hex()}" for at in range(0, len(units), 2))

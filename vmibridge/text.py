"""Text that may come from a guest, made fit for a terminal and a log.

Nothing that a guest sends may move a cursor, change a colour, reorder a line or
start a new one.
"""

__all__ = ["printable"]


def printable(text: str) -> str:
    """`text` with everything that is not printable as a backslash escape."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)

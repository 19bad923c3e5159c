"""Text that may come from a guest, made fit for a terminal and a log; and objects of other people
as text; and counts in words.

Nothing that a guest sends may move a cursor, change a colour, reorder a line or
start a new one. Nothing that an object does when it is asked for its text is raised.
"""

from collections.abc import Callable

__all__ = ["counted", "fault_of", "printable", "printable_json", "repr_of", "str_of", "type_name"]


def counted(count: int, one: str, many: str | None = None) -> str:
    """A number of things in words: `1 trap`, `2 traps`, `3 replies`, `4 accesses`. `many`: where
    more than the last word changes, as in `1 trap was cut`, `2 traps were cut`."""
    if count == 1:
        return f"1 {one}"
    if many is not None:
        return f"{count} {many}"
    if one.endswith("y"):
        return f"{count} {one[:-1]}ies"
    return f"{count} {one}{'es' if one.endswith('s') else 's'}"


def printable(text: str) -> str:
    """`text` with everything that is not printable as a backslash escape."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def repr_of(value: object) -> str:
    """The `repr` of any object, which UTF-8 can hold; it says so where that raises."""
    return _asked(repr, value)


def str_of(value: object) -> str:
    """The `str` of any object, which UTF-8 can hold; it says so where that raises."""
    return _asked(str, value)


def type_name(value: object) -> str:
    """The name of an object's type, without asking the object or its type."""
    # Past a metaclass that has a `__name__` of its own, and an object that has a `__class__`.
    name: str = type.__dict__["__name__"].__get__(type(value))
    return name


def _asked(ask: Callable[[object], str], value: object) -> str:
    try:
        # `repr` and `str` may return a subclass of str, whose methods are other people's, too.
        text = str.__str__(ask(value))
        if text.isprintable():  # so there are no surrogates, which UTF-8 cannot hold
            return text
        return text.encode("utf-8", "backslashreplace").decode()
    except BaseException as error:  # whatever it raises is about this text alone
        return f"<{type_name(value)}: its {ask.__name__} raised {type_name(error)}>"


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


def fault_of(error: Exception) -> str:
    """Why a decoder refused its input, in the same words on every Python."""
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)

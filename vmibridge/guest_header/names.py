"""From names of Python to identifiers, and the check that no two things get one.

A name of Python may have letters beyond ASCII, and the name of a handler any printable character.
What is no letter, digit or underscore becomes an underscore; a letter beyond ASCII becomes its
number, so that two names in another script stay two.
"""

import re

from vmibridge.errors import HandlerLoadError
from vmibridge.text import printable

__all__ = ["Names", "ascii_name", "camel_name", "free_name", "snake_name"]


def ascii_name(name: str) -> str:
    """`name` in letters, digits and underscores."""
    return "".join(
        c if c.isascii() and (c.isalnum() or c == "_") else f"u{ord(c):04x}" if c.isalnum() else "_"
        for c in name
    )


def snake_name(name: str) -> str:
    """The name of a class or a member in words with underscores: `FileMode` is `file_mode`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", ascii_name(name)).lower()


def camel_name(name: str) -> str:
    """A name in words that each begin with a capital: `file_mode` is `FileMode`."""
    return "".join(word[:1].upper() + word[1:] for word in ascii_name(name).split("_"))


def free_name(name: str, taken: set[str] | frozenset[str]) -> str:
    """`name`, with underscores behind it until it is none of those that are taken."""
    while name in taken:
        name += "_"
    return name


class Names:
    """The names of one file, each of one thing."""

    def __init__(self, language: str, taken: dict[str, str] | None = None) -> None:
        self._language = language
        self._of = dict(taken or {})

    def add(self, name: str, what: str) -> str:
        """Take a name for something. Raises `HandlerLoadError` if something else has it."""
        other = self._of.setdefault(name, what)
        if other != what:
            raise HandlerLoadError(
                f"{printable(what)} and {printable(other)} would both be {name} in"
                f" {self._language}; rename one"
            )
        return name

"""Options by environment variables: `--soft-timeout` is `VMIBRIDGE_SOFT_TIMEOUT`, and so on.

- The rule makes the name; no list does. Each option of each command has one.
- An option that is given stands over its variable. An empty variable is as one that is not set.
- An option that may be given several times has its values with blanks between.
- What is wrong with a value names the variable, and not the option that nobody wrote.
- A variable that begins as ours and is of no option is ignored, with a warning: `variables.py`.
"""

import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from cyclopts import Token

from vmibridge.cli.variables import PREFIX, warnings_for

if TYPE_CHECKING:
    from cyclopts import App, ArgumentCollection

_WITHOUT = ("--help", "--version")
_MIN_PART = 3
"""Characters of a value by which a message may be recognized as being about it."""


def variable_of(option: str) -> str | None:
    """The variable of an option by its long name; `None` for what has none."""
    if not option.startswith("--") or option in _WITHOUT:
        return None
    return PREFIX + option[2:].upper().replace("-", "_")


class Environment:
    """The variables of one run of the command; a `config` of cyclopts."""

    def __init__(self, variables: Mapping[str, str] = os.environ) -> None:
        self._variables = variables
        self._used: dict[str, str] = {}
        """From the option to the value that its variable gave it."""

    def __call__(
        self, app: "App", commands: tuple[str, ...], arguments: "ArgumentCollection"
    ) -> None:
        """Give each option that was not given the value of its variable."""
        for argument in arguments:
            variable = variable_of(argument.name)
            value = self._variables.get(variable or "", "")
            if not value or argument.tokens or argument.children:
                continue
            self._used[argument.name] = value
            for index, part in enumerate(argument.env_var_split(value)):
                argument.append(Token(keyword=variable, value=part, index=index))

    def warnings(self) -> list[str]:
        """A line for each variable that is misspelt."""
        return warnings_for(self._variables)

    def explained(self, message: str) -> str:
        """A message about an option, where the option came from here: with the variable's name."""
        used = [(variable_of(option), option, value) for option, value in self._used.items()]
        for variable, option, _ in used:
            assert variable is not None, "it was used"
            told = re.sub(rf"{re.escape(option)}(?![\w-])", variable, message)
            if told != message:
                return told
        for variable, _, value in used:
            assert variable is not None, "it was used"
            if variable not in message and any(part in message for part in _parts(value)):
                return f"{variable}: {message}"
        return message


def _parts(value: str) -> list[str]:
    """What a message may show of a value: a spec without its options and its name, too."""
    places = [word.partition("?")[0] for word in value.split()]
    return [
        part
        for place in places
        for part in (place, place.partition("=")[2])
        if len(part) >= _MIN_PART
    ]

"""The command line. `main` is the console script; the commands are in modules of their own.

| exit | means |
|---|---|
| 0 | the guest ended by itself, or the command did what it says |
| 1 | the guest, its backend, or a handler module failed |
| 2 | wrong usage: an option, a spec, a source or the configuration; a recording that is none |
| 129, 130, 143 | ended by SIGHUP, SIGINT, SIGTERM, after answering what was pending |

An error is one line on standard error that says what to do.
"""

import errno
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vmibridge import __version__
from vmibridge.cli.hangups import end_at_sigterm_as_init, note_hangups
from vmibridge.cli.streams import is_of_stdout, prepare_streams, quiet_stdout
from vmibridge.errors import (
    BackendSpecError,
    ConfigError,
    HandlerSourceError,
    MissingExtraError,
    NotReplayedError,
    RecordingReadError,
    VmiBridgeError,
)
from vmibridge.text import printable

if TYPE_CHECKING:
    from cyclopts import CycloptsError

_USAGE_ERRORS = (
    BackendSpecError,
    ConfigError,
    HandlerSourceError,
    NotReplayedError,
    RecordingReadError,
)


_KINDS = {
    "int": "is no whole number",
    "float": "is no number",
    "bool": "is neither true nor false",
}
"""What is wrong with a value that is not of its type."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    tokens = sys.argv[1:] if arguments is None else list(arguments)
    prepare_streams()
    try:
        status = _run(tokens)
        sys.stdout.flush()
    except OSError as error:
        if not is_of_stdout(error):
            if error.errno != errno.ENAMETOOLONG:
                raise
            # Of a path that was given; pathlib answers other questions about it with "no".
            return _fail(f"{str(error.filename)[:40]}...: {error.strerror}", 2)
        quiet_stdout()
        if isinstance(error, BrokenPipeError):
            return 0  # the reader has gone, as behind `head`
        return _fail(f"standard output: {error.strerror}", 1)
    return status


def _run(tokens: list[str]) -> int:
    if tokens == ["--version"]:
        sys.stdout.write(f"{__version__}\n")
        return 0
    end_at_sigterm_as_init()
    serving = (["serve"], ["run"], ["qemu", "run"], ["qemu", "attach"])
    if tokens[:1] in serving or tokens[:2] in serving:
        # Before the imports, which take most of the time in which SIGHUP would end it.
        note_hangups()
    try:
        from cyclopts import CycloptsError

        from vmibridge.cli.app import app_for
        from vmibridge.cli.environment import Environment
    except ModuleNotFoundError:
        return _fail(str(MissingExtraError("the command line", "cli")), 2)
    environment = Environment()
    if not {"--help", "-h"} & set(tokens):
        for line in environment.warnings():
            _warn(line)
    try:
        status = app_for(tokens, environment)(
            tokens, exit_on_error=False, print_error=False, result_action="return_value"
        )
    except CycloptsError as error:
        return _fail(f"{_wrong_usage(error, tokens)}; see 'vmibridge {_command(tokens)}--help'", 2)
    except _USAGE_ERRORS as error:
        return _fail(environment.explained(str(error)), 2)
    except VmiBridgeError as error:
        return _fail(str(error), 1)
    except ImportError as error:
        # cyclopts raises one of its own when the module of a command cannot be imported.
        cause = error.__cause__ or error
        if isinstance(cause, MissingExtraError):
            return _fail(str(cause), 1)
        if isinstance(cause, ModuleNotFoundError) and cause.name == "rich":
            return _fail(str(MissingExtraError("the command line", "cli")), 2)
        raise
    except KeyboardInterrupt:
        # Before there is a run to stop, as while handlers are loaded.
        return 130
    return status if isinstance(status, int) else 0


def _wrong_usage(error: "CycloptsError", tokens: list[str]) -> str:
    """What is wrong with the arguments, where cyclopts has words of its own for it."""
    from cyclopts import CoercionError, MissingArgumentError, UnusedCliTokensError

    if isinstance(error, UnusedCliTokensError):
        return f"there is no place for {' '.join(map(repr, error.unused_tokens or ()))}"
    text = str(error)
    missing = re.search(r" parameter (\S+) requires an argument", text)
    if isinstance(error, MissingArgumentError) and missing and missing[1] not in tokens:
        return f"{missing[1]} is missing"
    wrong = re.search(r"Invalid value for (\S+): unable to convert \"(.*)\" into (\w+)", text)
    if isinstance(error, CoercionError) and wrong and wrong[3] in _KINDS:
        return f"{wrong[1]} {wrong[2]!r}: {_KINDS[wrong[3]]}"
    return text if text.endswith("...") else text.removesuffix(".")


def _command(tokens: list[str]) -> str:
    """The command that was meant, or the group of commands, with a blank behind it; nothing for one
    that is not there."""
    from vmibridge.cli.app import COMMANDS

    known = {*COMMANDS, *(name.partition(" ")[0] for name in COMMANDS)}
    named = (" ".join(tokens[:count]) for count in (2, 1))
    return next((f"{name} " for name in named if name in known), "")


def _fail(message: str, status: int) -> int:
    _warn(message)
    return status


def _warn(message: str) -> None:
    line = " ".join(printable(part.strip()) for part in message.splitlines() if part.strip())
    sys.stderr.write(f"vmibridge: {line}\n")

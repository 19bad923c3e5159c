"""The command line. `main` is the console script; the commands are in modules of their own.

| exit | means |
|---|---|
| 0 | the guest ended by itself, or the command did what it says |
| 1 | the guest, its backend, or a handler module failed |
| 2 | wrong usage: an option, a spec, a source or the configuration; a recording that is none |
| 130, 143 | ended by SIGINT, SIGTERM, after answering what was pending |

An error is one line on standard error that says what to do.
"""

import sys
from collections.abc import Sequence

from vmibridge.errors import (
    BackendSpecError,
    ConfigError,
    HandlerSourceError,
    NotReplayedError,
    RecordingReadError,
    VmiBridgeError,
)
from vmibridge.text import printable

_COMMANDS = (
    *("run", "agent", "serve", "handlers", "replay", "inspect", "report", "export", "recover"),
    *("qemu", "health", "recordings"),
)
_USAGE_ERRORS = (
    BackendSpecError,
    ConfigError,
    HandlerSourceError,
    NotReplayedError,
    RecordingReadError,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    try:
        from cyclopts import CycloptsError

        from vmibridge.cli.app import app
    except ModuleNotFoundError as error:
        return _fail(f"{error.name} is missing: pip install 'vmibridge[cli]'", 2)
    tokens = sys.argv[1:] if arguments is None else list(arguments)
    try:
        status = app(tokens, exit_on_error=False, print_error=False, result_action="return_value")
    except CycloptsError as error:
        told = str(error).rstrip(".")
        return _fail(f"{told}; see 'vmibridge {''.join(_commands(tokens))}--help'", 2)
    except _USAGE_ERRORS as error:
        return _fail(str(error), 2)
    except VmiBridgeError as error:
        return _fail(str(error), 1)
    except KeyboardInterrupt:
        # Before there is a run to stop, as while handlers are loaded.
        return 130
    return status if isinstance(status, int) else 0


def _commands(tokens: list[str]) -> list[str]:
    return [f"{token} " for token in tokens[:1] if token in _COMMANDS]


def _fail(message: str, status: int) -> int:
    line = " ".join(printable(part.strip()) for part in message.splitlines() if part.strip())
    sys.stderr.write(f"vmibridge: {line}\n")
    return status

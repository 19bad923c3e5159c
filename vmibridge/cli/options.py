"""What several commands have, declared once: options, and what they mean together.

A command that says something else of an option puts a `Parameter` of its own behind the shared
type: `json: Annotated[Json, Parameter(help="One JSON object a handler.")] = False`.

Options that are settings of a server are in `setting_options`.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from cyclopts import CycloptsError, Group, Parameter

from vmibridge.errors import BackendSpecError, ConfigError

if TYPE_CHECKING:
    from vmibridge.vm.backend import Backend

Loop: TypeAlias = Literal["asyncio", "uvloop", "trio"]

CHECKS = Group("Looking at what happens")
RECORDING = Group("Recording")


def no_option(_kind: object, given: object) -> None:
    """What begins like an option is none of the files, but for `-`."""
    for each in given if isinstance(given, tuple | list) else (given,):
        if str(each).startswith("-") and str(each) != "-":
            raise CycloptsError(msg=f"Unknown option: {str(each)[:40]}")


HANDLERS = Parameter(
    consume_multiple=True,
    negative=(),
    help="Python files, folders or dotted modules that offer handlers.",
)
OUTPUT = Parameter(
    name=("--output", "-o"),
    allow_leading_hyphen=True,
    help="The file to make; - is standard output.",
)
PIPED = Parameter(
    allow_leading_hyphen=True, validator=no_option, help="A recording; - is standard input."
)
REDACT = Parameter(
    group=RECORDING,
    negative=(),
    show_default=False,
    help="Leave out memory, value1 to value4, outside, settings of handlers, or one of them of one"
    " request, as in 0x0002:value3; may be given several times.",
)
RENAME = Parameter(
    negative=(),
    show_default=False,
    help="OLD=NEW: the VM OLD is called NEW; may be given several times.",
)

HEALTH_SOCKET = Parameter(
    group=CHECKS,
    help="A unix socket where the event loop answers vmibridge health; an empty path is none.",
)

HealthSocket: TypeAlias = Annotated[str | None, HEALTH_SOCKET]
MonitorSocket: TypeAlias = Annotated[
    Path,
    Parameter(help="The socket of QEMU's monitor, as of -qmp unix:PATH,server=on,wait=off."),
]
BackendOptions: TypeAlias = Annotated[
    str, Parameter(help="Further options of the backend, as behind the ? of a spec.")
]

Sources: TypeAlias = Annotated[list[str], HANDLERS]
OptionalSources: TypeAlias = Annotated[list[str] | None, HANDLERS]
Recording: TypeAlias = Annotated[Path, PIPED]
Output: TypeAlias = Annotated[Path, OUTPUT]
OptionalOutput: TypeAlias = Annotated[Path | None, OUTPUT]
Json: TypeAlias = Annotated[bool, Parameter(group=CHECKS, negative=())]
Level: TypeAlias = Literal["debug", "info", "warning", "error"]
LogLevel: TypeAlias = Annotated[
    Level, Parameter(group=CHECKS, help="What goes to standard error; debug shows tracebacks.")
]
Outcomes: TypeAlias = Annotated[
    bool,
    Parameter(
        name="--outcomes",
        negative="--quiet",
        group=CHECKS,
        help="Show each trap; --quiet: failures, one line a minute, and the summary.",
    ),
]
ExitZero: TypeAlias = Annotated[
    bool,
    Parameter(
        negative=(),
        help="End with status 0, and not 129, 130 or 143, after a signal that stops.",
    ),
]


@Parameter(name="*")
@dataclass(frozen=True)
class LoopOptions:
    """As given."""

    async_backend: Annotated[Literal["asyncio", "trio"], Parameter(help="The event loop.")] = (
        "asyncio"
    )
    uvloop: Annotated[bool, Parameter(negative=(), help="asyncio on uvloop.")] = False

    @property
    def loop(self) -> Loop:
        """What they mean. Raises `ConfigError`: `--uvloop` does not go with trio."""
        if not self.uvloop:
            return self.async_backend
        if self.async_backend == "trio":
            raise ConfigError("--uvloop: uvloop is for asyncio, so it does not go with trio")
        return "uvloop"


def bytes_of(
    option: str, text: str | None, *, least: int = 1, such_as: str = "256MiB"
) -> int | None:
    """A size as options have it: 1048576, 0x100000, 1M, 1MiB; `None`: not given.

    Raises `ConfigError`, which shows `such_as`, also for less than `least` bytes.
    """
    if text is None:
        return None
    from vmibridge.vm.spec import parse_size

    try:
        size = parse_size(text)
    except ValueError:
        size = 0
    if size < least:
        what = f"is less than {least} bytes" if size > 0 else "is not a size"
        raise ConfigError(f"{option} {text[:40]}: {what}; give one as in {such_as}")
    return size


def check_seconds(option: str, given: float, within: tuple[float, float] | None = None) -> None:
    """Raises `ConfigError` for what is outside of `within`, by default for what is not above 0."""
    least, most = within or (0.0, sys.float_info.max)
    if not least <= given <= most or (within is None and not given):
        wanted = "above 0" if within is None else f"from {least:g} to {most:g}"
        raise ConfigError(f"{option} {given:g}: give seconds {wanted}")


def named_backend(text: str, unnamed: str) -> "Backend":
    """The VM of a `--backend`: `NAME=SPEC` names it; without, it is called `unnamed`.

    Raises `BackendSpecError`.
    """
    from vmibridge.backends import open_backend

    name, named, spec = text.partition("=")
    if not named or ":" in name:
        # What is before the first `=` is a part of the spec.
        return open_backend(text, vm=unnamed)
    if not name:
        raise BackendSpecError(f"{text}: the name of the VM is missing before '='")
    return open_backend(spec, vm=name)


def renamed(pairs: list[str]) -> dict[str, str]:
    """From the old to the new name of VMs, of `OLD=NEW`. Raises `ConfigError`."""
    names: dict[str, str] = {}
    for pair in pairs:
        old, equals, new = pair.partition("=")
        if not (old and equals and new.isprintable() and 0 < len(new) <= 64):
            raise ConfigError(f"--rename {pair[:80]!r}: is not OLD=NEW, two names of a VM")
        names[old] = new
    return names

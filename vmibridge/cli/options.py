"""What several commands have: groups of options, and options that are the same for each."""

from typing import Annotated, Literal, TypeAlias

from cyclopts import Group, Parameter

from vmibridge.errors import ConfigError

Loop: TypeAlias = Literal["asyncio", "uvloop", "trio"]

CHECKS = Group("Looking at what happens")
RECORDING = Group("Recording")

Sources: TypeAlias = Annotated[
    list[str],
    Parameter(
        consume_multiple=True,
        negative=(),
        help="Python files, folders or dotted modules that offer handlers.",
    ),
]
AsyncBackend: TypeAlias = Annotated[Literal["asyncio", "trio"], Parameter(help="The event loop.")]
Uvloop: TypeAlias = Annotated[bool, Parameter(negative=(), help="asyncio on uvloop.")]


def chosen_loop(async_backend: Literal["asyncio", "trio"], *, uvloop: bool) -> Loop:
    """What `--async-backend` and `--uvloop` mean. Raises `ConfigError`: they do not go together."""
    if not uvloop:
        return async_backend
    if async_backend == "trio":
        raise ConfigError("--uvloop: uvloop is for asyncio, so it does not go with trio")
    return "uvloop"

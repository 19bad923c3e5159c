"""`vmibridge inspect`: what a recording holds, trap by trap."""

import sys
import time
from collections.abc import Callable
from typing import Annotated, BinaryIO

from cyclopts import Parameter, validators

from vmibridge.cli.options import Json, Recording
from vmibridge.cli.selection import SelectionOptions
from vmibridge.errors import ConfigError

_PERIOD = 0.1
"""Seconds from one look at a growing file to the next."""


def inspect(
    file: Recording,
    /,
    *,
    selection: SelectionOptions | None = None,
    limit: Annotated[
        int | None,
        Parameter(
            validator=validators.Number(gte=1, lte=sys.maxsize), help="Stop after so many traps."
        ),
    ] = None,
    full: Annotated[
        bool, Parameter(negative=(), help="Registers and accesses to memory, too.")
    ] = False,
    follow: Annotated[
        bool,
        Parameter(negative=(), help="Go on with what is written, until the recording is finished."),
    ] = False,
    json: Annotated[
        Json, Parameter(help="One JSON object a session and a trap, then a summary.")
    ] = False,
) -> int:
    """List the traps of a recording, in the order of their replies.

    Example: vmibridge inspect run.mcap --outcome failed --since 2.5
    """
    chosen = (selection or SelectionOptions()).selection()
    from vmibridge.cli.listing import Listing
    from vmibridge.cli.output import standard_output
    from vmibridge.cli.pipes import STDOUT
    from vmibridge.cli.problems import say_unmatched
    from vmibridge.recording.file.reader import RecordingReader

    if follow and (file == STDOUT or (file.exists() and not file.is_file())):
        raise ConfigError(f"--follow {file}: is for a file that is being written")
    with standard_output() as out, RecordingReader(file, wait=_wait(out, follow)) as reader:
        if not Listing(reader, chosen, out, as_json=json, full=full).show(limit):
            say_unmatched(reader, chosen)
    return 0


def _wait(out: BinaryIO, follow: bool) -> Callable[[], object] | None:
    """What to do where a file ends that is being written."""
    if not follow:
        return None

    def wait() -> None:
        out.flush()
        time.sleep(_PERIOD)

    return wait

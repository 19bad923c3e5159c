"""`vmibridge inspect`: what a recording holds, trap by trap."""

import sys
from typing import Annotated

from cyclopts import Parameter, validators

from vmibridge.cli.options import Json, Recording
from vmibridge.cli.selection import SelectionOptions


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
    from vmibridge.recording.file.reader import RecordingReader

    with RecordingReader(file) as reader, standard_output() as out:
        Listing(reader, chosen, out, as_json=json, full=full).show(limit)
    return 0

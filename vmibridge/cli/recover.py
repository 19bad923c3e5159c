"""`vmibridge recover`: a clean file made of a damaged recording."""

import sys
from typing import Annotated

from cyclopts import Parameter

from vmibridge.cli.options import Json, Output, Recording
from vmibridge.cli.pipes import STDOUT, output_file
from vmibridge.cli.streams import json_line
from vmibridge.text import printable


def recover(
    file: Annotated[Recording, Parameter(help="A recording that was cut short or damaged.")],
    /,
    *,
    output: Output,
    json: Annotated[Json, Parameter(help="What was kept, as one JSON object.")] = False,
) -> int:
    """Make a clean recording of a damaged one, with all of it that can be read.

    Exit status: 0 when it was made, 2 when there is nothing to make it of.

    Example: vmibridge recover run.mcap -o clean.mcap
    """
    from msgspec.json import encode

    from vmibridge.cli.problems import counts_text
    from vmibridge.cli.progress import with_progress
    from vmibridge.recording.file.damage import problem_lines
    from vmibridge.recording.file.recover import recover as recover_recording

    with output_file(output) as path:
        done = recover_recording(
            file, path, lambda messages, reader: with_progress(messages, reader, "reading")
        )
    # Standard output may be the recording.
    out = sys.stderr if output == STDOUT else sys.stdout
    if json:
        out.write(json_line(encode(done)).decode())
        return 0
    lines = problem_lines(done.problems, done.problem_count, f"{file}: ")
    if done.complete:
        lines.append(f"{file}: is whole; there was nothing to recover")
    lines.append(f"{output}: {counts_text(done.messages)} kept")
    out.write("".join(f"{printable(line)}\n" for line in lines))
    return 0

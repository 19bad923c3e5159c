"""`vmibridge import`: a recording made of JSON lines."""

from typing import Annotated

from cyclopts import Parameter

from vmibridge.cli.options import Output, Recording
from vmibridge.errors import RecordingReadError


def import_lines(
    file: Annotated[
        Recording,
        Parameter(help="JSON lines, of an export or made by hand; - is standard input."),
    ],
    /,
    *,
    output: Output,
) -> int:
    """Make a recording of JSON lines: those of an export, or your own.

    Exit status: 0 when it was made, 2 when a line is none of a recording.

    Example: vmibridge import run.jsonl -o run.mcap
    """
    from vmibridge.cli.pipes import clean_up_at_sigterm, output_file, say, stdin_or
    from vmibridge.cli.problems import counts_text
    from vmibridge.recording.json_lines import messages_of_lines
    from vmibridge.recording.new_recording import NewRecording

    clean_up_at_sigterm()
    name = "standard input" if str(file) == "-" else str(file)
    try:
        with (
            stdin_or(file) as lines,
            output_file(output) as path,
            NewRecording(path, made_by="vmibridge import") as recording,
        ):
            for time, message in messages_of_lines(lines, name):
                recording.copy(time, message)
            if not any(recording.counts.values()):
                raise RecordingReadError(f"{name}: has no line of a recording")
    except OSError as error:
        raise RecordingReadError(f"{name}: {error.strerror}") from error
    say(f"{output}: {counts_text(recording.counts)}")
    return 0

"""`vmibridge export`: a recording in the format of another tool."""

from collections.abc import Generator
from contextlib import closing
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from vmibridge.cli.options import OptionalOutput, Recording
from vmibridge.cli.selection import SelectionOptions
from vmibridge.errors import ConfigError
from vmibridge.text import counted

if TYPE_CHECKING:
    from vmibridge.recording.file.reader import RecordingReader
    from vmibridge.recording.traps import RecordedTrap


def export(
    file: Recording,
    /,
    *,
    to: Annotated[
        Literal["jsonl", "foxglove", "perfetto", "sqlite", "parquet"],
        Parameter(help="The format."),
    ],
    output: Annotated[
        OptionalOutput,
        Parameter(
            help="The file to make; by default FILE with another suffix. - is standard output,"
            " for jsonl and perfetto.",
        ),
    ] = None,
    selection: SelectionOptions | None = None,
) -> int:
    """Write the traps of a recording in the format of another tool.

    Example: vmibridge export run.mcap --to sqlite -o run.sqlite
    """
    chosen = (selection or SelectionOptions()).selection()
    from vmibridge.cli.output import standard_output
    from vmibridge.cli.pipes import STDOUT, clean_up_at_sigterm, output_file, say
    from vmibridge.cli.problems import say_problems, say_unmatched
    from vmibridge.recording.export import Export, target_of, write_all
    from vmibridge.recording.export.jsonl import JsonLines
    from vmibridge.recording.file.reader import RecordingReader

    clean_up_at_sigterm()
    if output is None and file == STDOUT:
        raise ConfigError("-: name the file to make with -o")
    if output == STDOUT and to not in ("jsonl", "perfetto"):
        raise ConfigError(f"-o -: {to} needs a file; jsonl and perfetto go to standard output")
    count: int | None = None  # it stays so where the reader of standard output has gone
    with RecordingReader(file) as reader:
        if output == STDOUT and to == "jsonl":
            with standard_output() as out:
                count = _count(write_all(JsonLines(out), reader, chosen), reader)
        elif output == STDOUT:
            with output_file(output) as path:
                count = _count(Export(reader, to, path, chosen).write(), reader)
        else:
            made = Export(reader, to, output or target_of(file, to), chosen)
            count = _count(made.write(), reader)
            names = " and ".join(map(str, made.targets))
            say(f"{counted(count, 'trap')} to {names}")
        say_problems(reader)
        if count == 0:
            say_unmatched(reader, chosen)
    return 0


def _count(traps: "Generator[RecordedTrap, None, None]", reader: "RecordingReader") -> int:
    from vmibridge.cli.progress import ReadingBar

    count = 0
    # Closed here, so that an export that is stopped cleans up at once.
    with closing(traps), ReadingBar(reader, "exporting") as bar:
        for _ in traps:
            bar.step()
            count += 1
    return count

"""`vmibridge report`: a recording as one HTML page.

A file that already exists is written over only when asked, and the recording itself never.
"""

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter, validators

from vmibridge.cli.options import OptionalOutput, Recording
from vmibridge.cli.pipes import STDOUT, output_file, say
from vmibridge.errors import ConfigError
from vmibridge.text import counted, printable


def report(
    file: Recording,
    /,
    *,
    output: Annotated[
        OptionalOutput,
        Parameter(help="The page to make; by default FILE with .html at its end."),
    ] = None,
    limit: Annotated[
        int,
        Parameter(
            validator=validators.Number(gte=1, lte=500_000),
            help="Show so many traps, and of the rest the slowest and up to 1000 that failed;"
            " totals and latencies count all.",
        ),
    ] = 100_000,
    title: Annotated[str | None, Parameter(help="The heading of the page.")] = None,
    force: Annotated[
        bool, Parameter(negative=(), help="Write over a page that already exists.")
    ] = False,
) -> int:
    """Make one HTML page of a recording, which needs no network.

    Example: vmibridge report run.mcap -o report.html
    """
    from vmibridge.cli.progress import with_progress
    from vmibridge.recording.export import new_files
    from vmibridge.recording.file.reader import RecordingReader
    from vmibridge.recording.report.collect import Collector
    from vmibridge.recording.report.page import render
    from vmibridge.recording.selection import SelectedTraps, Selection

    if output is None and file == STDOUT:
        raise ConfigError("-: name the page to make with -o")
    target = output or file.with_suffix(".html")
    tell = say if target == STDOUT else _say
    with RecordingReader(file) as reader:
        # Before a pass that may take minutes.
        if target != STDOUT and target.exists():
            _check(target, file, force=force)
        collector = Collector(limit)
        traps = SelectedTraps(reader.messages(), Selection(), collector.hear)
        for trap in with_progress(traps, reader, "reading"):
            collector.add(trap)
        page = render(collector.finish(reader), collector.rows, title)
        with output_file(target) as made, new_files([made], replace=force) as (path,):
            path.write_bytes(page)
        problems = reader.problem_count
    shown = len(collector.rows)
    counts = counted(collector.count, "trap")
    if shown < collector.count:
        counts += f", {shown} shown"
    tell(f"{target}: {counts}, {_size(len(page))}")
    if problems:
        tell(f"the recording has {counted(problems, 'problem')}; the report lists them")
    return 0


def _check(target: Path, recording: Path, *, force: bool) -> None:
    if recording != STDOUT and target.samefile(recording):
        raise ConfigError(f"{target}: is the recording; name another file with -o")
    if not force:
        raise ConfigError(
            f"{target}: already exists; write over it with --force, or name another file with -o"
        )


def _size(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 100_000 else f"{size / 1e3:.1f} kB"


def _say(line: str) -> None:
    sys.stdout.write(f"{printable(line)}\n")

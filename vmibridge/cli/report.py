"""`vmibridge report`: a recording as one HTML page.

A file that is there already is written over only when asked, and the recording itself never.
"""

import sys
from pathlib import Path

import msgspec

from vmibridge.cli.progress import with_progress
from vmibridge.errors import ConfigError
from vmibridge.recording.export import new_files
from vmibridge.recording.reader import RecordingReader
from vmibridge.recording.report.collect import Collector
from vmibridge.recording.report.page import render
from vmibridge.recording.select import SelectedTraps, Selection
from vmibridge.text import printable


class ReportOptions(msgspec.Struct, frozen=True):
    """The options of the command."""

    path: Path
    output: Path | None
    limit: int
    title: str | None
    force: bool


def write_report(options: ReportOptions) -> int:
    """Write it; returns the exit status. Raises `VmiBridgeError`."""
    target = options.output or options.path.with_suffix(".html")
    with RecordingReader(options.path) as reader:
        # Before a pass that may take minutes.
        if target.exists():
            _check(target, options)
        collector = Collector(options.limit)
        traps = SelectedTraps(reader.messages(), Selection(), collector.hear)
        for trap in with_progress(traps, reader, "reading"):
            collector.add(trap)
        page = render(collector.finish(reader), collector.rows, options.title)
        with new_files([target], replace=options.force) as (path,):
            path.write_bytes(page)
        problems = reader.problem_count
    shown = len(collector.rows)
    told = f"{collector.count} traps" + (f", {shown} shown" if shown < collector.count else "")
    _say(f"{target}: {told}, {_size(len(page))}")
    if problems:
        _say(f"the recording has {problems} problems; the report tells them")
    return 0


def _check(target: Path, options: ReportOptions) -> None:
    if target.samefile(options.path):
        raise ConfigError(f"{target}: is the recording; name another file with -o")
    if not options.force:
        raise ConfigError(
            f"{target}: is there already; write over it with --force, or name another file with -o"
        )


def _size(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size >= 100_000 else f"{size / 1e3:.1f} kB"


def _say(line: str) -> None:
    sys.stdout.write(f"{printable(line)}\n")

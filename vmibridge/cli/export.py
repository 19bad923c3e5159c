"""`vmibridge export`: a recording in the format of another tool."""

import signal
import sys
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from types import FrameType

import msgspec

from vmibridge.cli.output import standard_output
from vmibridge.cli.progress import ReadingBar
from vmibridge.errors import ConfigError
from vmibridge.recording.export import Export, Format, target_of, write_all
from vmibridge.recording.export.jsonl import JsonLines
from vmibridge.recording.reader import RecordingReader
from vmibridge.recording.select import Selection
from vmibridge.recording.traps import RecordedTrap
from vmibridge.text import printable


class ExportOptions(msgspec.Struct, frozen=True):
    """The options of the command."""

    path: Path
    to: Format
    output: Path | None
    selection: Selection


def export_recording(options: ExportOptions) -> int:
    """Write it; returns the exit status. Raises `VmiBridgeError`."""
    # By default it ends a process at once, which would leave behind what is half-done.
    signal.signal(signal.SIGTERM, _exit)
    with RecordingReader(options.path) as reader:
        if options.output == Path("-"):
            return _to_standard_output(reader, options)
        target = options.output or target_of(options.path, options.to)
        export = Export(reader, options.to, target, options.selection)
        count = _count(export.write(), reader)
        names = " and ".join(map(str, export.targets))
        _say(f"{count} traps to {names}")
        _say_problems(reader)
    return 0


def _to_standard_output(reader: RecordingReader, options: ExportOptions) -> int:
    if options.to != "jsonl":
        raise ConfigError(f"-o -: {options.to} needs a file; jsonl goes to standard output")
    with standard_output() as out:
        _count(write_all(JsonLines(out), reader, options.selection), reader)
    _say_problems(reader)
    return 0


def _count(traps: Generator[RecordedTrap, None, None], reader: RecordingReader) -> int:
    count = 0
    # Closed here, so that an export that is stopped cleans up at once.
    with closing(traps), ReadingBar(reader, "exporting") as bar:
        for _ in traps:
            bar.step()
            count += 1
    return count


def _say_problems(reader: RecordingReader) -> None:
    for problem in reader.problems:
        _say(f"problem {problem}")
    if reader.problem_count > len(reader.problems):
        _say(f"{reader.problem_count - len(reader.problems)} more problems")


def _say(line: str) -> None:
    sys.stderr.write(f"{printable(line)}\n")


def _exit(number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + number)

"""`vmibridge edit`: recordings made of recordings."""

import sys
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from vmibridge.cli.options import REDACT, RENAME, Json, Output, Recording, renamed
from vmibridge.cli.selection import SelectionOptions
from vmibridge.cli.streams import json_line
from vmibridge.errors import ConfigError
from vmibridge.text import counted

if TYPE_CHECKING:
    from vmibridge.recording.edit.editing import Split

_MAX_SHIFT = 1 << 62


def edit(
    *files: Recording,
    output: Output,
    selection: SelectionOptions | None = None,
    rename: Annotated[list[str] | None, RENAME] = None,
    redact: Annotated[list[str] | None, REDACT] = None,
    shift: Annotated[
        str | None,
        Parameter(
            allow_leading_hyphen=True,
            help="Add so many seconds to each time, as in 3600 or -2.5.",
        ),
    ] = None,
    split: Annotated[
        str | None,
        Parameter(
            help="vm: a file for each VM; else one for so many seconds. They are numbered.",
        ),
    ] = None,
    json: Annotated[Json, Parameter(help="What was made, as one JSON object.")] = False,
) -> int:
    """Cut, merge, split, rename, redact or shift recordings.

    What is selected is kept, in whole requests; of several recordings all goes into one. A note
    in the file tells where traps of before are missing.

    Example: vmibridge edit run.mcap --since 2.5 --until 4 --redact memory -o part.mcap
    """
    if not files:
        raise ConfigError("name a recording, or several; - is standard input")
    chosen = (selection or SelectionOptions()).selection()
    from msgspec.json import encode

    from vmibridge.cli.pipes import STDOUT, clean_up_at_sigterm, output_file, say
    from vmibridge.cli.problems import counts_text
    from vmibridge.cli.progress import with_progress
    from vmibridge.recording.edit.editing import EditOptions
    from vmibridge.recording.edit.editing import edit as edit_recordings
    from vmibridge.recording.file.damage import problem_lines

    options = EditOptions(
        chosen,
        renamed(rename or []),
        tuple(redact or ()),
        0 if shift is None else _nanoseconds("--shift", shift),
        None if split is None else _split(split),
    )
    if output == STDOUT and split is not None:
        raise ConfigError("-o -: --split makes several files; name the first one")
    clean_up_at_sigterm()
    with output_file(output) as path:
        done = edit_recordings(
            files,
            path,
            options,
            lambda messages, reader: with_progress(messages, reader, "reading"),
        )
    for name, counts in done.files.items():
        where = "-" if output == STDOUT else name
        vms = ", ".join(done.vms.get(name, []))
        say(f"{where}: {counts_text(counts)}; VMs: {vms or 'none'}")
    for line in problem_lines(done.problems, done.problem_count):
        say(line)
    if done.problem_count:
        say("what could not be read is not in what was made; a note in it says so")
    if done.cut:
        say(counted(done.cut, "trap was cut", "traps were cut"))
    if json and output != STDOUT:
        sys.stdout.write(json_line(encode(done)).decode())
    return 0


def _nanoseconds(option: str, text: str) -> int:
    try:
        nanoseconds = round(float(text) * 1e9)
    except (ValueError, OverflowError):
        nanoseconds = _MAX_SHIFT
    if abs(nanoseconds) >= _MAX_SHIFT:
        most = f"{_MAX_SHIFT / 1e9:g}"
        raise ConfigError(f"{option} {text[:40]!r}: is not a number of seconds below {most}")
    return nanoseconds


def _split(text: str) -> "Split":
    if text == "vm":
        return "vm"
    nanoseconds = _nanoseconds("--split", text)
    if nanoseconds <= 0:
        raise ConfigError(f"--split {text[:40]!r}: is vm, or a number of seconds above 0")
    return nanoseconds

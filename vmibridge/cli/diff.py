"""`vmibridge diff`: two recordings, compared without handlers."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from vmibridge.cli.options import RENAME, Json, Recording, renamed
from vmibridge.cli.selection import SelectionOptions
from vmibridge.cli.streams import encoded, json_line
from vmibridge.errors import ConfigError, NotReplayedError
from vmibridge.text import counted, printable

if TYPE_CHECKING:
    from vmibridge.recording.diff.comparison import Comparison, Group

_MAX_LINES = 50
"""Groups that are printed for people."""


def diff(
    a: Annotated[Recording, Parameter(help="A recording; - is standard input.")],
    b: Annotated[Recording, Parameter(help="Another one.")],
    /,
    *,
    selection: SelectionOptions | None = None,
    ignore: Annotated[
        list[str] | None,
        Parameter(
            negative=(),
            help="Leave out a field: registers, outcome, handler, rip, value1 to value4, error,"
            " output, read, write or outside; may be given several times.",
        ),
    ] = None,
    rename: Annotated[list[str] | None, RENAME] = None,
    json: Annotated[Json, Parameter(help="As one JSON object.")] = False,
) -> int:
    """Compare two recordings, request by request, without handlers.

    Requests are aligned for each vCPU of each VM; times count for nothing. --rename is of A.

    Exit status: 0 when they are equal, 1 when they differ, 2 when nothing was compared or a file
    could not be read whole.

    Example: vmibridge diff before.mcap after.mcap --ignore registers
    """
    chosen = (selection or SelectionOptions()).selection()
    from msgspec import to_builtins
    from msgspec.json import encode

    from vmibridge.cli.output import standard_output
    from vmibridge.cli.pipes import say
    from vmibridge.cli.problems import unmatched_in
    from vmibridge.recording.diff.comparison import compare
    from vmibridge.recording.diff.requests import FIELDS
    from vmibridge.recording.file.reader import RecordingReader
    from vmibridge.recording.replay.served import check_renamed, sessions_of

    for field in ignore or ():
        if field not in FIELDS or field == "request":
            raise ConfigError(f"--ignore {field[:40]!r}: there are {', '.join(FIELDS[1:])}")
    if str(a) == str(b) == "-":
        raise ConfigError("one of the two may be standard input")
    names = renamed(rename or [])
    with RecordingReader(a) as one, RecordingReader(b) as other:
        if names and str(a) != "-":
            check_renamed(sessions_of(one, with_start=False)[0], names)
        found = compare(one, other, selection=chosen, rename=names, ignored=ignore or ())
        problems = one.problem_lines() + other.problem_lines()
        # Behind that: it is one more pass, which may end early.
        nothing = [] if found.compared else [unmatched_in(each, chosen) for each in (one, other)]
    with standard_output() as out:
        if json:
            told = {"a": str(a), "b": str(b), "same": found.is_same, **to_builtins(found)}
            out.write(json_line(encode(told)))
        else:
            for line in _lines(found, str(a), str(b)):
                out.write(encoded(f"{printable(line)}\n"))
    for problem in problems:
        say(problem)
    if not found.compared:
        raise NotReplayedError(f"nothing was compared: {_why_nothing(found, a, b, nothing)}")
    if found.different or found.only_a or found.only_b:
        return 1
    if found.problems:
        raise NotReplayedError("what could be read is equal, and a file could not be read whole")
    return 0


def _why_nothing(found: "Comparison", a: Path, b: Path, unmatched: Sequence[str | None]) -> str:
    """`unmatched`: that the selection takes nothing of a recording, of each."""
    told = dict.fromkeys(line for line in unmatched if line is not None)
    if told:
        return "; ".join(told)
    if not found.unanswered:
        empty = [str(path) for path, only in ((a, found.only_a), (b, found.only_b)) if not only]
        if empty:
            return f"there is no request in {' and '.join(dict.fromkeys(empty))}"
    return f"no request with a reply is in both; --rename OLD=NEW gives a VM of {a} another name"


def _lines(found: "Comparison", a: str, b: str) -> list[str]:
    lines = [line for group in found.groups[:_MAX_LINES] for line in _group(group, a, b)]
    if len(found.groups) > _MAX_LINES:
        lines.append(
            counted(len(found.groups) - _MAX_LINES, "more kind", "more kinds") + " of differences"
        )
    counts = [
        f"{counted(found.compared, 'request')} compared, {found.different} different",
        *(
            f"{count} {what}"
            for count, what in (
                (found.only_a, f"only in {a}"),
                (found.only_b, f"only in {b}"),
                (found.unanswered, "without a reply in both"),
                (found.partial, "compared in part: something is left out of a recording"),
            )
            if count
        ),
    ]
    return [*lines, ", ".join(counts)]


def _group(group: "Group", a: str, b: str) -> list[str]:
    first = ", ".join(
        f"trap {seq} of {path}"
        for seq, path in ((group.seq_a, a), (group.seq_b, b))
        if seq is not None
    )
    requests = counted(group.count, "request")
    only = {"only in A": f"only in {a}", "only in B": f"only in {b}"}.get(group.field)
    what = f"{group.field} differs in {requests}" if only is None else f"{requests} {only}"
    lines = [f"{group.where}: {what}; the first: VM {group.vm}, vCPU {group.vcpu}, {first}"]
    if group.a or group.b:
        lines += [f"  {a}: {group.a}", f"  {b}: {group.b}"]
    return lines

"""What a replay found, for people and as JSON.

| | standard output | standard error |
|---|---|---|
| for people | of each file the first difference, findings, counts | what changed, is damaged |
| `--json` | an object for each difference, then the counts | the same |

With `-o -` standard output is the new recording, and all of it goes to standard error.
"""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

import msgspec

from vmibridge.cli.streams import json_line
from vmibridge.errors import NotReplayedError
from vmibridge.recording.replay.compare import Difference
from vmibridge.recording.replay.file_result import FileResult, counts_of, result_lines
from vmibridge.recording.replay.options import MISSING
from vmibridge.text import counted, printable

_MAX_NAMED = 5


class ReplayPrinter:
    """Tells what a replay finds."""

    def __init__(self, *, as_json: bool, several: bool = False, out: TextIO | None = None) -> None:
        """`several`: recordings are replayed, and not one. `out`: instead of standard output."""
        self._out = sys.stdout if out is None else out
        self._as_json = as_json
        self._several = several
        self._logged: set[str] = set()

    def difference(self, path: Path, difference: Difference) -> None:
        """One request of a file was answered in another way."""
        if self._as_json:
            of = {"file": str(path)} if self._several else {}
            self._print_json({"difference": difference, **of})

    def notes(self, lines: Iterable[str]) -> None:
        """What else there is to know of a file."""
        for line in lines:
            self._warn(line)

    def failed(self, why: str) -> None:
        """One of several recordings could not be replayed."""
        self._warn(why)

    def accepted(self, count: int, target: Path, *, renamed: bool) -> None:
        """A new recording was made. `renamed`: VMs have other names now than in it."""
        more = "; its VMs are named as before: replay it with the same --rename" if renamed else ""
        self._warn(f"{target}: a new recording, with {counted(count, 'new answer')}{more}")

    def unstable(self, target: Path, found: Sequence[Difference]) -> None:
        """The new recording was replayed, and these requests are answered in another way again."""
        if not found:
            return
        count = len(found)
        traps = ", ".join(f"trap {each.seq} of vm {each.vm}" for each in found[:_MAX_NAMED])
        more = f" and {count - _MAX_NAMED} more" if count > _MAX_NAMED else ""
        fields = ", ".join(dict.fromkeys(one.field for each in found for one in each.fields))
        self._warn(
            f"{target}: replayed once more, {counted(count, 'request')} of it"
            f" {'is' if count == 1 else 'are'} different again: {traps}{more} ({fields}); the"
            " handlers give other answers each time, or have tasks, whose order is not recorded:"
            " see --ignore and vmi.outside, or record these guests again"
        )

    def file(self, result: FileResult) -> None:
        """What came of one recording."""
        if self._as_json:
            if self._several:
                self._print_json({"file": {"path": str(result.path), **_counts([result])}})
            return
        self._print(*result_lines(result))

    def end(
        self,
        results: Sequence[FileResult],
        *,
        strict: bool,
        least: float | None,
        selects: bool,
        accepts: bool,
        unmatched: str | None = None,
    ) -> int:
        """Tell the sums; returns the exit status.

        Raises `NotReplayedError`, after the counts, when there was nothing to compare: a check
        that looks at the status alone must not take that for success. `selects`: a file may have
        nothing to compare. `accepts`: what is different was accepted. `least`: percent.
        `unmatched`: that the selection takes no trap, and why.
        """
        counts = _counts(results)
        compared, different = counts["compared"], counts["different"]
        unchecked: dict[str, int] = counts["unchecked"]
        missing = counts["problems"] + sum(unchecked.get(why, 0) for why in MISSING)
        total = compared + sum(unchecked.values())
        share = 100 * compared / total if total else 0.0
        too_few = least is not None and share < least
        failed = [each for each in results if each.error is not None]
        empty = [each for each in results if each.error is None and not each.compared]
        bad = len(failed) + (0 if selects else len(empty))
        same = compared > 0 and not (different or bad or too_few or (strict and missing))
        if self._as_json:
            self._print_json({"replay": {**counts, "same": same}})
        elif self._several:
            self._print(
                f"{counted(len(results), 'recording')}"
                f"{f', of which {len(failed)} cannot be replayed' if failed else ''}:"
                f" {counted(compared, 'request')} compared, {different} different"
            )
        if strict and missing and not self._as_json:
            self._print("strict: parts of the recording are missing")
        if too_few:
            self._warn(
                f"{share:.1f} % of {counted(total, 'request')} compared; {least:g} % are required"
            )
        if not compared:
            what = results[0].path if len(results) == 1 else counted(len(results), "recording")
            raise NotReplayedError(f"{what}: {unmatched or 'no request could be compared'}")
        for each in empty if not selects and self._several else ():
            self._warn(f"{each.path}: no request could be compared")
        if (different and not accepts) or too_few or (strict and missing):
            return 1
        return 2 if bad else 0

    def _warn(self, text: str) -> None:
        if text not in self._logged:
            self._logged.add(text)
            sys.stderr.write(f"vmibridge: {printable(text)}\n")

    def _print(self, *lines: str) -> None:
        for line in lines:
            self._out.write(f"{printable(line)}\n")

    def _print_json(self, what: object) -> None:
        self._out.write(json_line(msgspec.json.encode(what)).decode())


def _counts(results: Sequence[FileResult]) -> dict[str, Any]:
    counts: dict[str, Any] = {
        "compared": sum(each.compared for each in results),
        "different": sum(each.different for each in results),
        "ignored": sum(each.ignored for each in results),
        "unchecked": counts_of(each.unchecked for each in results),
        "outside": counts_of(each.outside for each in results),
        "problems": sum(each.problems for each in results),
        "findings": [finding for each in results for finding in each.findings],
    }
    failed = [each.error for each in results if each.error is not None]
    return {**counts, "failed": failed} if failed else counts

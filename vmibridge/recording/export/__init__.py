"""A recording in the format of another tool.

| format | module | for | needs the extra |
|---|---|---|---|
| `jsonl` | `jsonl` | jq, and programs of any kind | |
| `foxglove` | `foxglove` | Foxglove, and other tools that read MCAP with JSON | |
| `perfetto` | `perfetto` | ui.perfetto.dev: what happened when, on each vCPU | `perfetto` |
| `sqlite` | `sqlite` | questions in SQL | |
| `parquet` | `parquet` | tables of millions of rows: pandas, Polars, DuckDB | `parquet` |

Rules:

- A file appears under its name when it is whole, and never in place of another one: it is
  written under another name beside it, which is gone when anything goes wrong.
- What is held does not grow with the recording: each format writes in batches.
- Nothing that a recording says can end an export: numbers are cut to the 64 bits that they
  may have, tables of names are bounded.
"""

import os
import secrets
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Literal, TypeAlias, get_args

from vmibridge.errors import ConfigError, MissingExtraError, RecordingError
from vmibridge.files import reason, replaceable
from vmibridge.recording.export.exporter import Exporter
from vmibridge.recording.file.reader import RecordingReader
from vmibridge.recording.selection import SelectedTraps, Selection
from vmibridge.recording.traps import RecordedTrap

Format: TypeAlias = Literal["jsonl", "foxglove", "perfetto", "sqlite", "parquet"]
FORMATS: tuple[Format, ...] = get_args(Format)


def exporter_of(name: Format) -> type[Exporter]:
    """Raises `MissingExtraError` where what a format is made with is not installed."""
    try:
        kind: type[Exporter] = import_module(f"{__name__}.{name}").EXPORTER
    except ModuleNotFoundError as error:
        raise MissingExtraError(f"an export to {name}", name) from error
    return kind


def target_of(source: Path, name: Format) -> Path:
    """Where an export goes when nothing is said."""
    return source.with_suffix(exporter_of(name).suffix)


class Export:
    """One recording on its way to one target."""

    def __init__(
        self, reader: RecordingReader, name: Format, target: Path, selection: Selection
    ) -> None:
        self._reader = reader
        self._kind = exporter_of(name)
        self._selection = selection
        self.targets: tuple[Path, ...] = self._kind.targets(target)
        """The files that there are afterwards."""

    def write(self) -> Generator[RecordedTrap, None, None]:
        """Write it, to the end of the iteration; gives each trap as it is written.

        Raises `ConfigError` for a target that already exists, `RecordingError` for one
        that cannot be written.
        """
        with new_files(self.targets) as paths, self._kind.open(paths) as exporter:
            yield from write_all(exporter, self._reader, self._selection)


def write_all(
    exporter: Exporter, reader: RecordingReader, selection: Selection
) -> Generator[RecordedTrap, None, None]:
    """Write what is selected; gives each trap as it is written."""
    traps = SelectedTraps(reader.messages(), selection, exporter.hear, exporter.other, reader)
    every = selection == Selection()
    for trap in traps.every():
        if every or traps.takes(trap):
            exporter.add(trap, traps.start)
            yield trap
        else:
            exporter.leave_out(trap)
    exporter.finish()


@contextmanager
def new_files(targets: Sequence[Path], *, replace: bool = False) -> Iterator[tuple[Path, ...]]:
    """Files to be written, which get their names at the end of the block, and are gone when
    it raises. Unless `replace`, there may be none of these names.

    Raises `ConfigError`, `RecordingError`. Readable by their owner only, as a recording is.
    """
    made: list[tuple[Path, Path]] = []
    try:
        for name in targets:
            if name.exists() and not replace:
                raise _is_there(name)
            target = replaceable(name) if replace else name
            path = target.with_name(f".vmibridge-{secrets.token_hex(8)}.part")
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            made.append((path, target))
        yield tuple(path for path, _ in made)
        if replace:
            for path, target in made:
                path.replace(target)
        else:
            _give_names(made)
    except OSError as error:
        named = " and ".join(map(str, targets))
        raise RecordingError(f"{named}: {reason(error, targets[0])}") from error
    finally:
        for path, _ in made:
            path.unlink(missing_ok=True)


def _give_names(made: Iterable[tuple[Path, Path]]) -> None:
    """All of them, or none."""
    given: list[Path] = []
    try:
        for path, target in made:
            try:
                # A rename would take the place of a file that has come up meanwhile.
                target.hardlink_to(path)
            except FileExistsError:
                raise _is_there(target) from None
            except OSError:
                # Not each file system has links.
                path.rename(target)
            given.append(target)
    except BaseException:
        for target in given:
            target.unlink(missing_ok=True)
        raise


def _is_there(target: Path) -> ConfigError:
    return ConfigError(
        f"{target}: already exists, and is not written over; name another file with -o"
    )

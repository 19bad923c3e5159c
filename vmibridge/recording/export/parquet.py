"""Parquet: one file with a row for each trap, one beside it with a row for each access.

`run.parquet` has the traps, `run.memory.parquet` the accesses to guest memory; `trap` says
which one an access belongs to. Numbers of 64 bits have no sign. Nothing of a row group is in
memory as Python objects for longer than `_BATCH` rows; a row group ends after `_GROUP` rows,
or `_MAX_BYTES` of memory.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from vmibridge.errors import RecordingError
from vmibridge.recording.export.exporter import Exporter, unsigned
from vmibridge.recording.export.rows import (
    ACCESS_COLUMNS,
    TRAP_COLUMNS,
    Kind,
    Row,
    access_rows,
    trap_row,
)
from vmibridge.recording.traps import RecordedTrap

_BATCH = 5000
_GROUP = 50_000
_MAX_BYTES = 16 << 20
_TYPES = {
    Kind.TEXT: pa.string(),
    Kind.REAL: pa.float64(),
    Kind.BOOL: pa.bool_(),
    Kind.BYTES: pa.binary(),
    Kind.BITS: pa.uint64(),
    Kind.TIME: pa.timestamp("ns", "UTC"),
}


class Table:
    """One file, written by row groups."""

    def __init__(self, path: Path, columns: Mapping[str, Kind]) -> None:
        self._schema = pa.schema([(name, _TYPES[kind]) for name, kind in columns.items()])
        self._writer = pq.ParquetWriter(path, self._schema, compression="zstd")
        self._rows: list[Row] = []
        self._batches: list[Any] = []
        self._count = 0
        self._bytes = 0

    def add(self, row: Row, size: int = 0) -> None:
        """Add a row that holds so many bytes of guest memory."""
        self._rows.append(row)
        self._count += 1
        self._bytes += size
        if len(self._rows) >= _BATCH:
            self._convert()
        if self._count >= _GROUP or self._bytes >= _MAX_BYTES:
            self.flush()

    def flush(self) -> None:
        """End the row group."""
        self._convert()
        if self._batches:
            self._writer.write_table(pa.Table.from_batches(self._batches), row_group_size=_GROUP)
        self._batches.clear()
        self._count = self._bytes = 0

    def close(self) -> None:
        """Write the end of the file."""
        self._writer.close()

    def _convert(self) -> None:
        if self._rows:
            columns = zip(*self._rows, strict=True)
            arrays = [
                pa.array(column, field.type)
                for column, field in zip(columns, self._schema, strict=True)
            ]
            self._batches.append(pa.record_batch(arrays, schema=self._schema))
            self._rows.clear()


class Parquet(Exporter):
    """Writes both files."""

    suffix = ".parquet"

    def __init__(self, traps: Path, memory: Path) -> None:
        self._traps = Table(traps, TRAP_COLUMNS)
        self._memory = Table(memory, ACCESS_COLUMNS)
        self._count = 0

    @classmethod
    def targets(cls, target: Path) -> tuple[Path, ...]:
        """The file of traps, and that of accesses."""
        return target, target.with_suffix(f".memory{target.suffix or cls.suffix}")

    @classmethod
    def open(cls, paths: Sequence[Path]) -> Self:
        """As of `Exporter`."""
        traps, memory = paths
        return cls(traps, memory)

    def close(self) -> None:
        self._traps.close()
        self._memory.close()

    def add(self, trap: RecordedTrap, start: int) -> None:
        self._count += 1
        try:
            self._traps.add(trap_row(self._count, trap, start, unsigned))
            for access, row in zip(
                trap.accesses, access_rows(self._count, trap, unsigned), strict=True
            ):
                self._memory.add(row, len(access.data or b""))
        except pa.ArrowException as error:
            raise RecordingError(f"the table cannot be written: {error}") from error

    def finish(self) -> None:
        self._traps.flush()
        self._memory.flush()


EXPORTER = Parquet

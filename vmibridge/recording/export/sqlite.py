"""An SQLite database.

| table or view | has a row for |
|---|---|
| `sessions` | each VM, and what served it; `versions`, `settings` and `redaction` are JSON |
| `handlers` | each handler of a session; `methods` is JSON |
| `traps` | each trap that was selected, in the order of the replies |
| `accesses` | each access to guest memory that they made |
| `notes` | each note of the recorder |
| `traps_hex`, `accesses_hex` | the same as without `_hex`, with numbers of 64 bits as hex text |

SQLite has integers of 64 bits with a sign. Those without one are kept as the same bits, so
2**64-1 is -1. Bit operations are right, and so is `value1 = 0xffffffffffffffff`: SQLite reads
such a literal as the same bits. Order, sums and decimal output are right below 2**63 only;
the views are for what is above.
"""

import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import msgspec

from vmibridge.errors import RecordingError
from vmibridge.recording.export.exporter import Exporter, signed
from vmibridge.recording.export.rows import (
    ACCESS_COLUMNS,
    TRAP_COLUMNS,
    Kind,
    Row,
    access_rows,
    trap_row,
)
from vmibridge.recording.messages import Note, Session
from vmibridge.recording.traps import RecordedTrap

_BATCH = 5000
_MAX_BYTES = 8 << 20
"""Of memory in a batch."""
_TYPES = {
    Kind.TEXT: "TEXT",
    Kind.REAL: "REAL",
    Kind.BOOL: "INTEGER",
    Kind.BYTES: "BLOB",
    Kind.BITS: "INTEGER",
    Kind.TIME: "INTEGER",
}
_HEX = {"ip", "address_space", "magic", "request", "method", "rip", "address"} | {
    f"{name}{slot}" for name in ("value", "answer") for slot in (1, 2, 3, 4)
}
_TABLES = """
CREATE TABLE sessions (session INTEGER PRIMARY KEY, vm TEXT, started TEXT, loop TEXT,
    versions TEXT, settings TEXT, redaction TEXT);
CREATE TABLE handlers (session INTEGER REFERENCES sessions, name TEXT, type TEXT, magic INTEGER,
    request INTEGER, methods TEXT, source TEXT, sha256 TEXT);
CREATE TABLE notes (kind TEXT, text TEXT, vm TEXT, seq INTEGER, retry_of INTEGER, counts TEXT);
"""
_INDEXES = """
CREATE INDEX traps_by_request ON traps (request, method);
CREATE INDEX traps_by_outcome ON traps (outcome);
CREATE INDEX traps_by_duration ON traps (duration_us);
CREATE INDEX traps_by_vm ON traps (vm, seq);
CREATE INDEX accesses_by_trap ON accesses (trap);
CREATE INDEX accesses_by_address ON accesses (address);
"""


class Sqlite(Exporter):
    """Writes the database, in one transaction."""

    suffix = ".sqlite"

    def __init__(self, path: Path) -> None:
        self._sessions = 0
        self._count = 0
        self._traps: list[Row] = []
        self._accesses: list[Row] = []
        self._bytes = 0
        self._database = sqlite3.connect(path, isolation_level=None)
        try:
            self._begin()
        except BaseException:  # whatever it is, nobody calls `close`
            self._database.close()
            raise

    def _begin(self) -> None:
        # Nobody sees the file before it is whole.
        self._run("PRAGMA journal_mode = OFF")
        self._run("PRAGMA synchronous = OFF")
        self._run("BEGIN")
        for statement in _TABLES.split(";"):
            self._run(statement)
        for name, columns in (("traps", TRAP_COLUMNS), ("accesses", ACCESS_COLUMNS)):
            self._run(f"CREATE TABLE {name} ({_columns(columns)})")
            self._run(f"CREATE VIEW {name}_hex AS SELECT {_shown(columns)} FROM {name}")  # noqa: S608

    @classmethod
    def open(cls, paths: Sequence[Path]) -> Self:
        """As of `Exporter`."""
        return cls(paths[0])

    def close(self) -> None:
        self._database.close()

    def hear(self, message: Session | Note) -> None:
        if isinstance(message, Note):
            self._insert(
                "notes",
                (
                    message.kind,
                    message.text,
                    message.vm,
                    None if message.seq is None else signed(message.seq),
                    None if message.retry_of is None else signed(message.retry_of),
                    _json(message.counts),
                ),
            )
            return
        self._sessions += 1
        versions, settings = _json(message.versions), _json(message.settings)
        redaction = _json([str(rule) for rule in message.redaction])
        self._insert(
            "sessions",
            (
                self._sessions,
                *(message.vm, message.started, message.loop),
                *(versions, settings, redaction),
            ),
        )
        for handler in message.handlers:
            self._insert(
                "handlers",
                (
                    self._sessions,
                    handler.name,
                    handler.type,
                    None if handler.magic is None else signed(handler.magic),
                    signed(handler.request),
                    _json(handler.methods),
                    handler.source,
                    handler.sha256,
                ),
            )

    def add(self, trap: RecordedTrap, start: int) -> None:
        self._count += 1
        self._traps.append(trap_row(self._count, trap, start, signed))
        if trap.accesses:
            self._accesses += access_rows(self._count, trap, signed)
            self._bytes += sum(len(access.data or b"") for access in trap.accesses)
        if len(self._traps) >= _BATCH or len(self._accesses) >= _BATCH or self._bytes >= _MAX_BYTES:
            self._flush()

    def finish(self) -> None:
        self._flush()
        for statement in _INDEXES.split(";"):
            self._run(statement)
        self._run("COMMIT")

    def _flush(self) -> None:
        self._insert("traps", *self._traps)
        self._insert("accesses", *self._accesses)
        self._traps.clear()
        self._accesses.clear()
        self._bytes = 0

    def _insert(self, table: str, *rows: Row) -> None:
        if rows:
            places = ",".join("?" * len(rows[0]))
            try:
                self._database.executemany(f"INSERT INTO {table} VALUES ({places})", rows)  # noqa: S608
            except sqlite3.Error as error:
                raise _lost(error) from error

    def _run(self, statement: str) -> None:
        try:
            self._database.execute(statement)
        except sqlite3.Error as error:
            raise _lost(error) from error


def _columns(columns: Mapping[str, Kind]) -> str:
    return ", ".join(f'"{name}" {_TYPES[kind]}' for name, kind in columns.items())


def _shown(columns: Mapping[str, Kind]) -> str:
    return ", ".join(
        f"CASE WHEN {name} IS NOT NULL THEN printf('0x%x', {name}) END AS {name}"
        if name in _HEX
        else f'"{name}"'
        for name in columns
    )


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _lost(error: sqlite3.Error) -> RecordingError:
    return RecordingError(f"the database cannot be written: {error}")


EXPORTER = Sqlite

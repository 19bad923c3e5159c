"""Entries of the kv handler, in a file of SQLite.

- All work is done in the thread of the connection, one piece after the other, and what changes the
  file in one transaction: another VM, or another process, sees all of it or nothing.
- An entry has a *version*, which is its row number. SQLite gives each number once (AUTOINCREMENT),
  also after an entry was deleted: who finds the version that it knows finds what it knows.
- Whatever is wrong with the file is a reply and a line in the log, once until it works again. One
  that cannot be read is opened again for the next piece of work: it may have been mended.
"""

import logging
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from enum import IntEnum
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, cast

import anyio
import msgspec

from vmibridge.text import printable

if TYPE_CHECKING:
    import apsw
else:
    try:
        import apsw
    except ImportError:
        # An optional dependency: the constructor of the handler says what is missing.
        apsw = None

__all__ = [
    "Limits",
    "Problem",
    "Reply",
    "Store",
    "Work",
    "apsw",
    "delete_entry",
    "get_value",
    "next_name",
    "put_value",
    "version_of",
]

log: logging.Logger = logging.getLogger("vmibridge.kv")

_APPLICATION = 0x564D_494B
"""`application_id` of the file: "VMIK"."""
_FORMAT = 1
"""`user_version` of the file."""
_SCHEMA = """
    CREATE TABLE entries(
        version INTEGER PRIMARY KEY AUTOINCREMENT,
        scope TEXT NOT NULL, name TEXT NOT NULL, value BLOB NOT NULL, size INTEGER NOT NULL,
        UNIQUE(scope, name));
    CREATE INDEX sizes ON entries(scope, size);
"""


class Problem(IntEnum):
    """The code of a failed status."""

    NOT_FOUND = 1
    OTHER_VERSION = 2
    WRONG_SIZE = 3
    FULL = 4
    LOCKED = 5
    BROKEN = 6


class Reply(msgspec.Struct, array_like=True, frozen=True):
    """What became of a piece of work, as a recording has it."""

    problem: int = 0
    """A `Problem`, or 0."""
    number: int = 0
    data: bytes = b""


class Limits(NamedTuple):
    """Of the entries of one scope."""

    entries: int
    size: int
    """Bytes of all names and values."""


Work: TypeAlias = "Callable[[apsw.Connection], Reply]"


class _ForeignFileError(Exception):
    """The file is a database of others."""


class Store:
    """One connection to a file. `path` "" is a database in memory."""

    def __init__(self, path: str, patience: float) -> None:
        """`patience`: seconds to wait for a lock of another connection."""
        self._path = path
        self._patience = patience
        self._opening = anyio.Lock()
        self._db: apsw.AsyncConnection | None = None
        self._is_logged = False

    async def look(self) -> None:
        """Warn of a path that cannot be opened, before a guest finds out. Nothing is made."""
        path = anyio.Path(self._path)
        if self._path and not await path.parent.is_dir():
            log.warning("kv: %s: its folder is not there", printable(self._path))
        elif self._path and await path.is_dir():
            log.warning("kv: %s: is a folder", printable(self._path))

    async def ask(self, work: Work) -> Reply:
        """Do a piece of work, in the thread of the connection. Cancelled, it is undone or done."""
        try:
            db = await self._open()
            reply = cast("Reply", await db.async_run(work, db))
        except (apsw.BusyError, apsw.LockedError) as error:
            return self._fail(Problem.LOCKED, error)
        except apsw.FullError as error:
            return self._fail(Problem.FULL, error)
        except (apsw.Error, _ForeignFileError, OSError) as error:
            await self.aclose()
            return self._fail(Problem.BROKEN, error)
        self._is_logged = False
        return reply

    async def aclose(self) -> None:
        """Close the connection, when its thread has done what it is at."""
        db, self._db = self._db, None
        if db is not None:
            with anyio.CancelScope(shield=True), suppress(apsw.Error):
                await db.aclose(force=True)

    async def _open(self) -> "apsw.AsyncConnection":
        async with self._opening:
            if self._db is None:
                # Cut off in the middle, it would leave a thread behind.
                with anyio.CancelScope(shield=True):
                    self._db = await self._connect()
        assert self._db is not None
        return self._db

    async def _connect(self) -> "apsw.AsyncConnection":
        if self._path:
            await anyio.to_thread.run_sync(_make_private, self._path)
        db = await apsw.Connection.as_async(self._path or ":memory:")
        try:
            await db.async_run(_prepare, db, round(self._patience * 1000))
        except BaseException:  # cancelled, too: its thread has no other owner
            await db.aclose(force=True)
            raise
        return db

    def _fail(self, problem: Problem, error: Exception) -> Reply:
        if not self._is_logged:
            self._is_logged = True
            log.warning("kv: %s: %s", self._path or "memory", printable(str(error)))
        return Reply(problem)


def _make_private(path: str) -> None:
    """SQLite would make it for all to read."""
    # Not opened: a process that closes a file loses all locks that it has on it (POSIX), those of
    # the connections of other VMs, too.
    with suppress(FileExistsError):
        os.mknod(path, stat.S_IFREG | 0o600)


# --- in the thread of the connection ------------------------------------------------------


def _prepare(db: "apsw.Connection", patience: int) -> None:
    """Make the tables of a file that is empty. `patience` in milliseconds."""
    db.set_busy_timeout(patience)
    with _transaction(db):
        found = (db.pragma("application_id"), db.pragma("user_version"))
        if found == (0, 0) and not db.pragma("schema_version"):
            db.execute(_SCHEMA)
            db.pragma("application_id", _APPLICATION)
            db.pragma("user_version", _FORMAT)
        elif found != (_APPLICATION, _FORMAT):
            raise _ForeignFileError("it is a database of another program")


@contextmanager
def _transaction(db: "apsw.Connection") -> Iterator[None]:
    """All of the block, or nothing. Not `with db`: that would hold all threads of Python, while
    it waits for a lock and for the disk."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:  # whatever it is: no transaction stays open
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def _row(db: "apsw.Connection", statement: str, *values: str | bytes | int) -> tuple[Any, ...]:
    """The first row; empty where there is none."""
    return cast("tuple[Any, ...] | None", db.execute(statement, values).fetchone()) or ()


def get_value(scope: str, name: str) -> Work:
    """The value of an entry."""

    def work(db: "apsw.Connection") -> Reply:
        found = _row(db, "SELECT value FROM entries WHERE scope = ? AND name = ?", scope, name)
        return Reply(data=found[0]) if found else Reply(Problem.NOT_FOUND)

    return work


def version_of(scope: str, name: str) -> Work:
    """The version of an entry; 0 where there is none."""

    def work(db: "apsw.Connection") -> Reply:
        found = _row(db, "SELECT version FROM entries WHERE scope = ? AND name = ?", scope, name)
        return Reply(number=found[0] if found else 0)

    return work


def next_name(scope: str, name: str) -> Work:
    """The name that follows `name`, in the order of bytes; empty behind the last."""

    def work(db: "apsw.Connection") -> Reply:
        found = _row(
            db,
            "SELECT name FROM entries WHERE scope = ? AND name > ? ORDER BY name LIMIT 1",
            *(scope, name),
        )
        return Reply(data=found[0].encode() if found else b"")

    return work


def put_value(scope: str, name: str, value: bytes, limits: Limits, wanted: int | None) -> Work:
    """Make or replace an entry; gives its version. `wanted`: the version that it has to have
    before, 0 where there may be none.
    """

    def work(db: "apsw.Connection") -> Reply:
        own = len(name.encode()) + len(value)
        with _transaction(db):
            before = _row(
                db,
                "SELECT version, size FROM entries WHERE scope = ? AND name = ?",
                *(scope, name),
            )
            if wanted is not None and wanted != (before[0] if before else 0):
                return Reply(Problem.OTHER_VERSION)
            # Read from an index alone.
            count, size = _row(
                db, "SELECT count(*), total(size) FROM entries WHERE scope = ?", scope
            )
            if before:
                count, size = count - 1, size - before[1]
            if count >= limits.entries or size + own > limits.size:
                return Reply(Problem.FULL)
            made = _row(
                db,
                "INSERT OR REPLACE INTO entries(scope, name, value, size) VALUES (?, ?, ?, ?)"
                " RETURNING version",
                *(scope, name, value, own),
            )
        return Reply(number=made[0])

    return work


def delete_entry(scope: str, name: str) -> Work:
    """Take an entry away; 1 if there was one."""

    def work(db: "apsw.Connection") -> Reply:
        db.execute("DELETE FROM entries WHERE scope = ? AND name = ?", (scope, name))
        return Reply(number=db.changes())

    return work

"""Let the guest put files into a folder of the host, and get files from it.

    [handlers.files]
    folder = "/srv/guests/web1"

| method | takes | gives |
|---|---|---|
| 0x0001 BEGIN | name, size, mode | a handle |
| 0x0002 PUT | handle, offset, bytes | bytes taken |
| 0x0003 GET | handle, offset, room | bytes put there; 0: the end |
| 0x0004 END | handle, SHA-256 or none | |
| 0x0005 ABORT | handle | |
| 0x0006 STAT | name, room or none | size in bytes |
| 0x0007 LIST | name of a folder, name to go on behind or none, room | bytes put there; 0: the end |
| 0x0008 LENGTH | handle | bytes that are there from the beginning on |
| 0x0011, 0x0016, 0x0017 | as BEGIN, STAT, LIST, with names in UTF-16 | |

Names have `/` between their parts, and are relative to the folder: see `_file_names`. A call that
fails has an errno of Linux both as its code and as its native code.

Every call may be repeated: it gives the same answer again. `_file_store` says what makes it so, and
what is left behind by a guest, a program or a host that ends in the middle: nothing.
"""

import errno
import struct
from collections.abc import Callable
from enum import IntFlag
from types import TracebackType
from typing import Annotated, Self, TypeVar

from vmibridge import (
    U32,
    U64,
    BridgeContext,
    Failed,
    GuestBytes,
    GuestRoom,
    GuestText,
    Room,
    StandardHandler,
    method,
)
from vmibridge.handlers._file_budget import failure
from vmibridge.handlers._file_ends import Caller
from vmibridge.handlers._file_folder import Entry, IfTaken
from vmibridge.handlers._file_names import MAX_NAME
from vmibridge.handlers._file_settings import FolderSettings, OpenFolder
from vmibridge.handlers._file_store import Store

MAX_PIECE = 1 << 20
"""Bytes that one PUT or GET carries, at most."""
_END_TIMEOUT = 120.0
"""Seconds for an END, which may hash a whole file and wait until it is on the disk."""
_END_SOFT_TIMEOUT = 1.0
_RECORD = struct.Struct("<QqII")
"""Size, time of change, kind, bytes of the name."""
_FILE, _FOLDER = 1, 2

R = TypeVar("R")


class Mode(IntFlag):
    """What a BEGIN is for: one of the first three, and HASH or not."""

    READ = 1
    """Get a file. The size is 0."""
    CREATE = 2
    """Put a file whose name must not be taken."""
    REPLACE = 4
    """Put a file in the place of another one, if there is one."""
    HASH = 8
    """END will come with a SHA-256: the host hashes meanwhile, and not at the end."""


class Files(StandardHandler[int]):
    """Files between guests and one folder. Its output is what a method gives, or nothing."""

    REQUEST = 0x0110

    class Settings(FolderSettings, frozen=True, forbid_unknown_fields=True):
        """Which folder, and what a guest may do there."""

        put: bool = True
        """Whether the guest may put files there."""
        get: bool = True
        """Whether it may get, list and look up files."""
        replace: bool = False
        """Whether it may put a file in the place of another one."""

    def __init__(self, settings: Settings | None = None) -> None:
        self._settings = settings or self.Settings()
        self._folder = OpenFolder(self.name, self._settings)

    async def __aenter__(self) -> Self:
        """Open the folder. Raises `ConfigError` where it cannot be opened."""
        await self._folder.open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Remove what is under way, also while being cancelled."""
        await self._folder.close()

    @method(0x0001)
    async def begin(
        self,
        name: Annotated[str, GuestText(MAX_NAME)],
        size: U64,
        mode: Mode,
        vmi: BridgeContext,
    ) -> U32:
        """Begin to put or get a file; gives its handle."""
        return await self._begin(vmi, name, size, mode)

    @method(0x0011)
    async def begin_utf16(
        self,
        name: Annotated[str, GuestText(MAX_NAME, "utf-16-le")],
        size: U64,
        mode: Mode,
        vmi: BridgeContext,
    ) -> U32:
        """The same with a name in UTF-16."""
        return await self._begin(vmi, name, size, mode)

    async def _begin(self, vmi: BridgeContext, name: str, size: int, mode: Mode) -> int:
        hashes = bool(mode & Mode.HASH)
        caller = Caller.of(vmi)
        random = vmi.random

        def make_handle() -> int:
            # A replay gives the same, and a program does not guess that of another one.
            return random.getrandbits(32)

        kind = mode & ~Mode.HASH
        if kind == Mode.READ and size == 0:
            self._check_allowed(self._settings.get)
            return await self._run(
                lambda store: store.begin_get(caller, name, make_handle, hashes=hashes)
            )
        if kind not in (Mode.CREATE, Mode.REPLACE):
            raise _failed(errno.EINVAL)
        replaces = kind == Mode.REPLACE
        self._check_allowed(self._settings.put and (self._settings.replace or not replaces))
        if_taken = IfTaken.REPLACE if replaces else IfTaken.FAIL
        return await self._run(
            lambda store: store.begin_put(
                caller, name, size, make_handle, if_taken=if_taken, hashes=hashes
            )
        )

    @method(0x0002)
    async def put(
        self,
        handle: U32,
        offset: U64,
        data: Annotated[bytes, GuestBytes(MAX_PIECE)],
        vmi: BridgeContext,
    ) -> U32:
        """Write bytes at an offset; gives how many."""
        caller = Caller.of(vmi)
        return await self._run(lambda store: store.put(caller, handle, offset, data))

    @method(0x0003)
    async def get(
        self,
        handle: U32,
        offset: U64,
        into: Annotated[Room, GuestRoom(MAX_PIECE)],
        vmi: BridgeContext,
    ) -> U32:
        """Read bytes at an offset; gives how many, 0 at the end."""
        caller, size = Caller.of(vmi), into.capacity
        try:
            # Mostly the system has it in memory, and a thread would take longer.
            data = self._folder.run_now(
                lambda store: store.get(caller, handle, offset, size, waits=False)
            )
        except OSError:
            data = await self._run(lambda store: store.get(caller, handle, offset, size))
        return await into.fill(data)

    @method(0x0004, timeout=_END_TIMEOUT, soft_timeout=_END_SOFT_TIMEOUT)
    async def end(
        self,
        handle: U32,
        sha256: Annotated[bytes, GuestBytes(32)] | None,
        vmi: BridgeContext,
    ) -> None:
        """Check a file, and give it its name if it was put."""
        caller = Caller.of(vmi)
        if sha256 is not None and len(sha256) != 32:
            raise _failed(errno.EINVAL)
        await self._run(lambda store: store.end(caller, handle, sha256))

    @method(0x0005)
    async def abort(self, handle: U32, vmi: BridgeContext) -> None:
        """End a transfer; nothing is left of a file that was put."""
        caller = Caller.of(vmi)
        await self._run(lambda store: store.abort(caller, handle))

    @method(0x0006)
    async def stat(
        self,
        name: Annotated[str, GuestText(MAX_NAME)],
        into: Annotated[Room, GuestRoom(MAX_PIECE)] | None,
    ) -> U64:
        """Look up a file or a folder; gives its size in bytes."""
        return await self._stat(name, into)

    @method(0x0016)
    async def stat_utf16(
        self,
        name: Annotated[str, GuestText(MAX_NAME, "utf-16-le")],
        into: Annotated[Room, GuestRoom(MAX_PIECE)] | None,
    ) -> U64:
        """The same with a name in UTF-16."""
        return await self._stat(name, into)

    async def _stat(self, name: str, into: Room | None) -> int:
        self._check_allowed(self._settings.get)
        found = await self._run(lambda store: store.look_up(name))
        if into is not None:
            if into.capacity < _RECORD.size:
                raise _failed(errno.ERANGE)
            await into.fill(_record(found, 0))
        return found.size

    @method(0x0007)
    async def list(
        self,
        folder: Annotated[str, GuestText(MAX_NAME)],
        after: Annotated[str, GuestText(MAX_NAME)] | None,
        into: Annotated[Room, GuestRoom(MAX_PIECE)],
    ) -> U32:
        """List a folder in the order of names; gives the bytes of the entries, 0 at the end."""
        return await self._list(folder, after or "", into, "utf-8")

    @method(0x0017)
    async def list_utf16(
        self,
        folder: Annotated[str, GuestText(MAX_NAME, "utf-16-le")],
        after: Annotated[str, GuestText(MAX_NAME, "utf-16-le")] | None,
        into: Annotated[Room, GuestRoom(MAX_PIECE)],
    ) -> U32:
        """The same with names in UTF-16."""
        return await self._list(folder, after or "", into, "utf-16-le")

    async def _list(self, folder: str, after: str, into: Room, encoding: str) -> int:
        self._check_allowed(self._settings.get)
        capacity = into.capacity

        def listed(store: Store) -> bytes:
            found = bytearray()
            for entry in store.list(folder, after):
                name = entry.name.encode(encoding)
                record = _record(entry, len(name)) + name
                # A NUL, of two bytes in UTF-16, and the next record at a multiple of 8.
                record += bytes(8 - len(record) % 8)
                if len(found) + len(record) > capacity:
                    if not found:
                        raise failure(errno.ERANGE)
                    break
                found += record
            return bytes(found)

        return await into.fill(await self._run(listed))

    @method(0x0008)
    async def length(self, handle: U32, vmi: BridgeContext) -> U64:
        """Bytes of a file that are there from its beginning on: go on putting from here."""
        caller = Caller.of(vmi)
        return await self._run(lambda store: store.length(caller, handle))

    def _check_allowed(self, is_allowed: bool) -> None:
        if not is_allowed:
            raise _failed(errno.EACCES)

    async def _run(self, operation: Callable[[Store], R]) -> R:
        try:
            return await self._folder.run(operation)
        except OSError as error:
            raise _failed(error.errno or errno.EIO) from error


def _failed(number: int) -> Failed:
    # A 32-bit guest does not see the native code.
    return Failed(min(number, 0xFF), native=number)


def _record(entry: Entry, size: int) -> bytes:
    """An entry as the guest gets it, but for its name, which has so many bytes."""
    return _RECORD.pack(entry.size, entry.changed, _FOLDER if entry.is_folder else _FILE, size)

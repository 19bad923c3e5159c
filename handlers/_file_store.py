"""Files under way between a guest and a folder.

    BEGIN -> open -> END   -> the file has its name; or it failed, and nothing is left
                  -> ABORT -> nothing is left
                  -> taken over by another BEGIN of the same file, as far as it is there
                  -> unused for a while, or the store is closed: nothing is left

Every operation blocks, may be called in any thread, and is done as a whole or not at all: so a
request that is cancelled while a thread is at it leaves nothing half done. Each raises `OSError`
with the number that the guest is told.

- `_Transfer.lock` is held for whatever touches its file. `Store._lock` guards the tables, is held
  for no I/O, and is taken behind the other.
- A BEGIN may be repeated since a transfer is found by what was asked: an address space that asks
  for the same again gets the handle that it has. Another one takes a file that is put over, with a
  new handle: a program that was killed is run again and goes on, and one that lives writes no more.
- An END or ABORT may be repeated since how a transfer ended is remembered by its handle.
"""

import errno
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from threading import Lock

import msgspec

from vmibridge import BridgeContext
from vmibridge.handlers._file_budget import Budget, Limits, failure
from vmibridge.handlers._file_folder import Entry, Folder, IfTaken, Temporary
from vmibridge.handlers._file_names import parse_name
from vmibridge.handlers._file_progress import Pieces, RunningHash

__all__ = ["MAX_OPEN", "Caller", "Store"]

MAX_OPEN = 1024
"""Transfers that may be under way."""
MAX_ENDED = 1024
"""Ends of transfers that are remembered."""


class Caller(msgspec.Struct, frozen=True):
    """Who asks."""

    address_space: int
    is_kernel: bool = False
    """It may use the transfers of all address spaces, and may run in any of them."""

    @classmethod
    def of(cls, vmi: BridgeContext) -> "Caller":
        """Who made the request."""
        return cls(vmi.event.address_space, vmi.event.ring == 0)

    def may_use(self, owner: "Caller") -> bool:
        """Whether what the other one has begun is its own."""
        return self.is_kernel or self.address_space == owner.address_space


class _Transfer:
    """A file under way. What is below `lock` belongs to who holds it."""

    def __init__(self, key: object, size: int, descriptor: int, hashes: bool) -> None:
        self.key = key
        self.size = size
        """Bytes."""
        self.hashes = hashes
        """A hash is expected at its end, so it is hashed meanwhile."""
        self.handle = 0
        self.owner = Caller(0)
        self.used = 0.0
        self.is_hashing = False

        self.lock = Lock()
        self.is_open = True
        self.descriptor = descriptor
        self.hash = RunningHash(descriptor)
        self.pieces = Pieces()
        self.put: _Put | None = None
        """`None`: the guest gets it."""


class _Put(msgspec.Struct, frozen=True):
    """What is known of a file that a guest puts."""

    temporary: Temporary
    parts: tuple[str, ...]
    if_taken: IfTaken


class _End(msgspec.Struct, frozen=True):
    """How a transfer ended."""

    owner: Caller
    by: str
    """`end`, `abort`, `taken` or `lost`."""
    digest: bytes | None = None
    """Of an END."""
    error: int = 0
    """0: none."""


class Store:
    """The transfers of one guest. Raises `OSError` where the folder cannot be opened."""

    def __init__(
        self,
        path: str,
        limits: Limits,
        *,
        sync: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limits = limits
        self._sync = sync
        self._clock = clock
        self._lock = Lock()
        self._is_closed = False
        self._by_handle: dict[int, _Transfer] = {}
        self._by_key: dict[object, _Transfer] = {}
        self._beginning = 0
        self._ended: OrderedDict[int, _End] = OrderedDict()
        self._folder = Folder(path)
        self._folder.sweep()
        self._budget = Budget(limits, self._folder, clock)
        # Beside what the guest does meanwhile: hashing takes longer than writing.
        self._hasher = ThreadPoolExecutor(1, "vmibridge files hash")

    def close(self) -> None:
        """End all transfers. Waits for operations in other threads; later ones raise EBADF."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            transfers = list(self._by_handle.values())
        for transfer in transfers:
            with transfer.lock:
                if transfer.is_open:
                    self._drop(transfer, "lost", errno.EBADF)
        self._hasher.shutdown()
        self._folder.close()

    def begin_put(
        self,
        caller: Caller,
        name: str,
        size: int,
        make_handle: Callable[[], int],
        *,
        if_taken: IfTaken = IfTaken.FAIL,
        hashes: bool = False,
        key: object = None,
    ) -> int:
        """The handle of a file that the guest will put. With `key` it is one of its own.

        Raises EINVAL, EEXIST, EISDIR, ENOTDIR, EFBIG, EDQUOT, EMFILE, and what the system says.
        """
        parts = _parse(name)
        key = key or ("put", parts, size, if_taken)

        def make() -> _Transfer:
            self._check_free(parts, if_taken)
            self._budget.reserve(size, self._folder.missing_folders(parts))
            try:
                temporary = self._folder.make_temporary()
            except BaseException:
                self._budget.release(size)
                raise
            transfer = _Transfer(key, size, temporary.descriptor, hashes)
            transfer.put = _Put(temporary, parts, if_taken)
            return transfer

        return self._begin(caller, key, make, make_handle)

    def _check_free(self, parts: tuple[str, ...], if_taken: IfTaken) -> None:
        try:
            found = self._folder.look_up(parts)
        except FileNotFoundError:
            return
        if if_taken is IfTaken.FAIL:
            raise failure(errno.EEXIST)
        if if_taken is IfTaken.REPLACE and found.is_folder:
            raise failure(errno.EISDIR)

    def begin_get(
        self,
        caller: Caller,
        name: str,
        make_handle: Callable[[], int],
        *,
        hashes: bool = False,
    ) -> int:
        """The handle of a file that the guest will get.

        Raises EINVAL, ENOENT, EISDIR, ENOTDIR, EACCES, EFBIG, EMFILE, and what the system says.
        """
        parts = _parse(name)
        # Nothing is lost if two address spaces have a handle each.
        key = ("get", parts, caller.address_space)

        def make() -> _Transfer:
            descriptor = self._folder.open_file(parts)
            size = os.fstat(descriptor).st_size
            if size > self._limits.max_file:
                os.close(descriptor)
                raise failure(errno.EFBIG)
            return _Transfer(key, size, descriptor, hashes)

        return self._begin(caller, key, make, make_handle)

    def _begin(
        self,
        caller: Caller,
        key: object,
        make: Callable[[], _Transfer],
        make_handle: Callable[[], int],
    ) -> int:
        self._drop_idle()
        while True:
            with self._lock:
                found = self._by_key.get(key)
                if found is None:
                    self._check_room()
                    self._beginning += 1
            if found is not None:
                with found.lock:
                    if found.is_open:
                        return self._hand_over(found, caller, make_handle)
                continue
            try:
                transfer = make()
            except BaseException:
                with self._lock:
                    self._beginning -= 1
                raise
            with transfer.lock:
                with self._lock:
                    self._beginning -= 1
                    # Another vCPU may have begun the same meanwhile.
                    is_late = self._is_closed or key in self._by_key
                    if not is_late:
                        self._by_key[key] = transfer
                if not is_late:
                    return self._hand_over(transfer, caller, make_handle)
                self._close_file(transfer)

    def _check_room(self) -> None:
        if self._is_closed:
            raise failure(errno.EBADF)
        if len(self._by_key) + self._beginning >= self._limits.max_open:
            raise failure(errno.EMFILE)

    def _hand_over(
        self, transfer: _Transfer, caller: Caller, make_handle: Callable[[], int]
    ) -> int:
        """The handle by which the caller has it, under its lock."""
        transfer.used = self._clock()
        if transfer.handle and transfer.owner == caller:
            return transfer.handle
        with self._lock:
            if transfer.handle:
                del self._by_handle[transfer.handle]
                self._remember(transfer.handle, _End(transfer.owner, "taken", error=errno.ESTALE))
            handle = make_handle()
            while not handle or handle in self._by_handle or handle in self._ended:
                handle = make_handle()
            transfer.handle, transfer.owner = handle, caller
            self._by_handle[handle] = transfer
        return handle

    def put(self, caller: Caller, handle: int, offset: int, data: bytes) -> int:
        """Write bytes at an offset; returns how many that are.

        Raises EBADF, ESTALE; EFBIG beyond the size; ENOBUFS for too many gaps; and what the system
        says, such as ENOSPC. Then what was there counts as there.
        """
        end = offset + len(data)
        with self._using(caller, handle) as transfer:
            if transfer.put is None:
                raise failure(errno.EBADF)
            if end > transfer.size:
                raise failure(errno.EFBIG)
            if not data:
                return 0
            transfer.pieces.check(offset, end)
            known = min(end, transfer.pieces.first) - offset
            # What may have been hashed: a repetition brings the same again, and nothing changes.
            is_other = known > 0 and os.pread(transfer.descriptor, known, offset) != data[:known]
            try:
                _write(transfer.descriptor, data, offset)
            finally:
                if is_other:
                    transfer.hash.forget()
            transfer.pieces.add(offset, end)
            self._hash_meanwhile(transfer)
        return len(data)

    def get(self, caller: Caller, handle: int, offset: int, size: int) -> bytes:
        """Read bytes at an offset: less at the end of the file, none behind it.

        Raises EBADF, and what the system says.
        """
        with self._using(caller, handle) as transfer:
            if transfer.put is not None:
                raise failure(errno.EBADF)
            left = transfer.size - offset
            if left <= 0:
                return b""
            data = os.pread(transfer.descriptor, min(size, left), offset)
            if transfer.hashes:
                with suppress(OSError):
                    transfer.pieces.check(offset, offset + len(data))
                    transfer.pieces.add(offset, offset + len(data))
                self._hash_meanwhile(transfer)
        return data

    def length(self, caller: Caller, handle: int) -> int:
        """Bytes of a file to get; of one that is put those that are there from its beginning on,
        without a gap. Raises EBADF, ESTALE."""
        with self._using(caller, handle) as transfer:
            return transfer.size if transfer.put is None else transfer.pieces.first

    def end(self, caller: Caller, handle: int, digest: bytes | None = None) -> str:
        """Give a file that was put its name, which is returned, or close one that was got.

        Raises EBADF, ESTALE; ENODATA while bytes are missing, and then it may go on. Raises EBADMSG
        if its SHA-256 is another one, EEXIST, EISDIR, what the system says: then nothing is left.
        """
        with suppress(_GoneError), self._using(caller, handle) as transfer:
            put = transfer.put
            if put is not None and transfer.pieces.first != transfer.size:
                raise failure(errno.ENODATA)
            name = ""
            try:
                if digest is not None and transfer.hash.finish(transfer.size) != digest:
                    raise failure(errno.EBADMSG)
                if put is not None:
                    name = self._publish(transfer, put)
            except OSError as error:
                self._drop(transfer, "end", error.errno or errno.EIO, digest)
                raise
            self._drop(transfer, "end", 0, digest)
            return name
        self._check_repeated(caller, handle, "end", digest)
        return ""

    def abort(self, caller: Caller, handle: int) -> None:
        """End a transfer; nothing is left of it. Raises EBADF, ESTALE."""
        with suppress(_GoneError), self._using(caller, handle) as transfer:
            self._drop(transfer, "abort")
            return
        self._check_repeated(caller, handle, "abort", None)

    def look_up(self, name: str) -> Entry:
        """The file or folder of this name; the folder itself has none. Raises EINVAL, ENOENT."""
        return self._folder.look_up(_parse(name) if name else ())

    def list(self, name: str, after: str) -> Iterator[Entry]:
        """What is in a folder, from behind a name on. Raises EINVAL, ENOENT, ENOTDIR, EFBIG."""
        return self._folder.list(_parse(name) if name else (), after)

    @contextmanager
    def _using(self, caller: Caller, handle: int) -> Iterator[_Transfer]:
        """The transfer of a handle, under its lock. Raises EBADF, ESTALE, by `_GoneError`."""
        with self._lock:
            transfer = self._by_handle.get(handle)
        if transfer is None or not caller.may_use(transfer.owner):
            raise _GoneError(self._why_gone(caller, handle))
        with transfer.lock:
            # It may have been handed over, or have ended, until now.
            if not transfer.is_open or transfer.handle != handle:
                raise _GoneError(self._why_gone(caller, handle))
            transfer.used = self._clock()
            yield transfer
            transfer.used = self._clock()

    def _why_gone(self, caller: Caller, handle: int) -> int:
        with self._lock:
            end = self._ended.get(handle)
        if end is not None and end.by == "taken" and caller.may_use(end.owner):
            return errno.ESTALE
        return errno.EBADF

    def _check_repeated(self, caller: Caller, handle: int, by: str, digest: bytes | None) -> None:
        """Raise as this call did before; as for an unknown handle, if it was not made before."""
        with self._lock:
            end = self._ended.get(handle)
        if end is None or end.by != by or end.digest != digest or not caller.may_use(end.owner):
            raise failure(self._why_gone(caller, handle))
        if end.error:
            raise failure(end.error)

    def _publish(self, transfer: _Transfer, put: _Put) -> str:
        transfer.hash.close()
        # Whatever becomes of it, its temporary file is no more.
        transfer.put = None
        transfer.descriptor = -1
        try:
            parts = self._folder.publish(put.temporary, put.parts, put.if_taken, sync=self._sync)
        except BaseException:
            self._budget.release(transfer.size)
            raise
        self._budget.keep(parts, transfer.size)
        return "/".join(parts)

    def _drop(
        self, transfer: _Transfer, by: str, error: int = 0, digest: bytes | None = None
    ) -> None:
        """End a transfer, under its lock."""
        self._close_file(transfer)
        with self._lock:
            del self._by_key[transfer.key]
            del self._by_handle[transfer.handle]
            self._remember(transfer.handle, _End(transfer.owner, by, digest, error))

    def _close_file(self, transfer: _Transfer) -> None:
        transfer.is_open = False
        transfer.hash.close()
        if transfer.put is not None:
            self._folder.discard(transfer.put.temporary)
            self._budget.release(transfer.size)
        elif transfer.descriptor >= 0:
            os.close(transfer.descriptor)
        transfer.descriptor = -1

    def _remember(self, handle: int, end: _End) -> None:
        self._ended[handle] = end
        if len(self._ended) > MAX_ENDED:
            self._ended.popitem(last=False)

    def _drop_idle(self) -> None:
        before = self._clock() - self._limits.idle_timeout
        with self._lock:
            idle = [each for each in self._by_handle.values() if each.used < before]
        for transfer in idle:
            # One that is locked is in use.
            if transfer.lock.acquire(blocking=False):
                try:
                    if transfer.is_open and transfer.used < before:
                        self._drop(transfer, "lost", errno.EBADF)
                finally:
                    transfer.lock.release()

    def _hash_meanwhile(self, transfer: _Transfer) -> None:
        if transfer.hashes and not transfer.is_hashing:
            transfer.is_hashing = True
            self._hasher.submit(_hash_on, transfer)


class _GoneError(OSError):
    """A handle that is none, or none any more."""

    def __init__(self, number: int) -> None:
        super().__init__(number, os.strerror(number))


def _hash_on(transfer: _Transfer) -> None:
    # An error of the disk is met again by the END.
    with suppress(OSError):
        while transfer.hash.go_on(transfer.pieces.first):
            pass
    transfer.is_hashing = False


def _parse(name: str) -> tuple[str, ...]:
    try:
        return parse_name(name)
    except ValueError as error:
        raise failure(errno.EINVAL) from error


def _write(descriptor: int, data: bytes, offset: int) -> None:
    rest = memoryview(data)
    while rest:
        count = os.pwrite(descriptor, rest, offset)
        rest = rest[count:]
        offset += count

"""Files under way between a guest and a folder.

    BEGIN -> open -> END   -> the file has its name; or it failed, and nothing is left
                  -> ABORT -> nothing is left
                  -> taken over by another BEGIN of the same file, as far as it is there
                  -> unused for a while, or the store is closed: nothing is left

Every operation blocks, may be called in any thread, and is done as a whole or not at all: so a
request that is cancelled while a thread is at it leaves nothing half done. Each raises `OSError`
with the number that the guest is told.

- `Transfer.lock` is held for whatever touches its file. `Store._lock` guards the tables, is held
  for no I/O, and is taken behind the other.
- A BEGIN may be repeated since a transfer is found by what was asked: an address space that asks
  for the same again gets the handle that it has. Another one takes a file that is put over, with a
  new handle: a program that was killed is run again and goes on, and one that lives writes no more.
- An END or ABORT may be repeated since how a transfer ended is remembered by its handle.
"""

import errno
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from threading import Condition, Lock

from vmibridge.handlers._file_budget import Budget, Limits, failure
from vmibridge.handlers._file_ends import Caller, End, Ends, GoneError
from vmibridge.handlers._file_folder import Entry, Folder, IfTaken
from vmibridge.handlers._file_names import parse_name
from vmibridge.handlers._file_progress import Put, Transfer

__all__ = ["MAX_OPEN", "Store"]

MAX_OPEN = 1024
"""Transfers that may be under way."""


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
        self._at_work = 0
        """Operations that run: the folder is closed behind the last of them."""
        self._all_done = Condition(self._lock)
        self._reads_now = True
        """Whether the file system reads without waiting, as far as is known."""
        self._by_handle: dict[int, Transfer] = {}
        self._by_key: dict[object, Transfer] = {}
        self._beginning = 0
        self._ends = Ends()
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
            self._all_done.wait_for(lambda: not self._at_work)
            transfers = list(self._by_handle.values())
        for transfer in transfers:
            with transfer.lock:
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

        def make() -> Transfer:
            self._check_free(parts, if_taken)
            self._budget.reserve(size, self._folder.missing_folders(parts))
            try:
                temporary = self._folder.make_temporary()
            except BaseException:  # whatever it is: these bytes are not used
                self._budget.release(size)
                raise
            transfer = Transfer(key, size, temporary.descriptor, hashes)
            transfer.put = Put(temporary, parts, if_taken)
            return transfer

        with self._working():
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

        def make() -> Transfer:
            descriptor = self._folder.open_file(parts)
            size = os.fstat(descriptor).st_size
            if size > self._limits.max_file:
                os.close(descriptor)
                raise failure(errno.EFBIG)
            return Transfer(key, size, descriptor, hashes)

        with self._working():
            return self._begin(caller, key, make, make_handle)

    def _begin(
        self,
        caller: Caller,
        key: object,
        make: Callable[[], Transfer],
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
            except BaseException:  # whatever it is: it has not begun
                with self._lock:
                    self._beginning -= 1
                raise
            with transfer.lock:
                with self._lock:
                    self._beginning -= 1
                    # Another vCPU may have begun the same meanwhile.
                    is_late = key in self._by_key
                    if not is_late:
                        self._by_key[key] = transfer
                if not is_late:
                    return self._hand_over(transfer, caller, make_handle)
                self._close_file(transfer)

    def _check_room(self) -> None:
        if len(self._by_key) + self._beginning >= self._limits.max_open:
            raise failure(errno.EMFILE)

    def _hand_over(self, transfer: Transfer, caller: Caller, make_handle: Callable[[], int]) -> int:
        """The handle by which the caller has it, under its lock."""
        transfer.used = self._clock()
        if transfer.handle and transfer.owner == caller:
            return transfer.handle
        with self._lock:
            if transfer.handle:
                del self._by_handle[transfer.handle]
                self._ends.remember(
                    transfer.handle, End(transfer.owner, "taken", error=errno.ESTALE)
                )
            handle = make_handle()
            while not handle or handle in self._by_handle or handle in self._ends:
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

    def get(
        self, caller: Caller, handle: int, offset: int, size: int, *, waits: bool = True
    ) -> bytes:
        """Read bytes at an offset: less at the end of the file, none behind it.

        Raises EBADF, and what the system says; `BlockingIOError` if it would have to wait for a
        disk or another thread, and is not to.
        """
        with self._using(caller, handle, waits) as transfer:
            if transfer.put is not None:
                raise failure(errno.EBADF)
            left = transfer.size - offset
            if left <= 0:
                return b""
            read = os.pread if waits else self._read_now
            data = read(transfer.descriptor, min(size, left), offset)
            if transfer.hashes:
                with suppress(OSError):
                    transfer.pieces.check(offset, offset + len(data))
                    transfer.pieces.add(offset, offset + len(data))
                self._hash_meanwhile(transfer)
        return data

    def _read_now(self, descriptor: int, size: int, offset: int) -> bytes:
        """What the system has in memory. Raises `BlockingIOError` unless that is all of it."""
        if not self._reads_now:
            raise failure(errno.EAGAIN)
        data = bytearray(size)
        try:
            count = os.preadv(descriptor, [data], offset, os.RWF_NOWAIT)
        except OSError as error:
            # Not every file system tells; it is not asked again.
            self._reads_now = error.errno != errno.EOPNOTSUPP
            raise failure(errno.EAGAIN) from error
        if count < size:
            raise failure(errno.EAGAIN)
        return bytes(data)

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
        with suppress(GoneError), self._using(caller, handle) as transfer:
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
        self._ends.check_repeated(caller, handle, "end", digest)
        return ""

    def abort(self, caller: Caller, handle: int) -> None:
        """End a transfer; nothing is left of it. Raises EBADF, ESTALE."""
        with suppress(GoneError), self._using(caller, handle) as transfer:
            self._drop(transfer, "abort")
            return
        self._ends.check_repeated(caller, handle, "abort", None)

    def look_up(self, name: str) -> Entry:
        """The file or folder of this name; the folder itself has none. Raises EINVAL, ENOENT."""
        with self._working():
            return self._folder.look_up(_parse(name) if name else ())

    def list(self, name: str, after: str) -> Iterator[Entry]:
        """What is in a folder, from behind a name on. Raises EINVAL, ENOENT, ENOTDIR, EFBIG."""
        with self._working():
            yield from self._folder.list(_parse(name) if name else (), after)

    @contextmanager
    def _using(self, caller: Caller, handle: int, waits: bool = True) -> Iterator[Transfer]:
        """The transfer of a handle, under its lock.

        Raises EBADF, ESTALE, by `GoneError`; `BlockingIOError` if it does not wait for the lock.
        """
        with self._working(), self._locked(caller, handle, waits) as transfer:
            transfer.used = self._clock()
            yield transfer
            transfer.used = self._clock()

    @contextmanager
    def _working(self) -> Iterator[None]:
        """An operation. Raises EBADF when the store is closed, which waits for its end."""
        with self._lock:
            if self._is_closed:
                raise failure(errno.EBADF)
            self._at_work += 1
        try:
            yield
        finally:
            with self._lock:
                self._at_work -= 1
                self._all_done.notify_all()

    @contextmanager
    def _locked(self, caller: Caller, handle: int, waits: bool) -> Iterator[Transfer]:
        with self._lock:
            transfer = self._by_handle.get(handle)
        if transfer is None or not caller.may_use(transfer.owner):
            raise GoneError(self._ends.why_gone(caller, handle))
        if not transfer.lock.acquire(blocking=waits):
            raise failure(errno.EAGAIN)
        try:
            # It may have been handed over, or have ended, until now.
            if not transfer.is_open or transfer.handle != handle:
                raise GoneError(self._ends.why_gone(caller, handle))
            yield transfer
        finally:
            transfer.lock.release()

    def _publish(self, transfer: Transfer, put: Put) -> str:
        transfer.hash.close()
        # Whatever becomes of it, its temporary file is no more.
        transfer.put = None
        transfer.descriptor = -1
        try:
            parts = self._folder.publish(put.temporary, put.parts, put.if_taken, sync=self._sync)
        except BaseException:  # whatever it is: these bytes are not used
            self._budget.release(transfer.size)
            raise
        self._budget.keep(parts, transfer.size)
        return "/".join(parts)

    def _drop(
        self, transfer: Transfer, by: str, error: int = 0, digest: bytes | None = None
    ) -> None:
        """End a transfer, under its lock."""
        self._close_file(transfer)
        with self._lock:
            del self._by_key[transfer.key]
            del self._by_handle[transfer.handle]
            self._ends.remember(transfer.handle, End(transfer.owner, by, digest, error))

    def _close_file(self, transfer: Transfer) -> None:
        transfer.is_open = False
        transfer.hash.close()
        if transfer.put is not None:
            self._folder.discard(transfer.put.temporary)
            self._budget.release(transfer.size)
        elif transfer.descriptor >= 0:
            os.close(transfer.descriptor)
        transfer.descriptor = -1

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

    def _hash_meanwhile(self, transfer: Transfer) -> None:
        if transfer.hashes and not transfer.is_hashing:
            transfer.is_hashing = True
            self._hasher.submit(_hash_on, transfer)


def _hash_on(transfer: Transfer) -> None:
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

"""Take files from guests of vmi-rs: its file transfer, bit for bit.

    [handlers.file_transfer]
    folder = "/srv/samples"

| method | value1 | value2 | value3 | value4 | value1 out |
|---|---|---|---|---|---|
| 0x0001 BEGIN | its own handle | size, signed | address of a name | its bytes | a transfer |
| 0x0002 SET_BUFFER | handle | address | | | a gate |
| 0x0003 CHUNK | handle | bytes in the buffer | | | a gate |
| 0x0004 CLOSE | handle | 0 for success | | | a gate |
| 0xffff EXIT | encoded status | native code | | | left alone |

A transfer is a handle of 1 to 4095, or'ed with the size of a chunk in bytes, 65536, shifted left
by 12; 0 rejects. A gate is CONTINUE or ABORT: this guest knows no WAIT, and is never told to.

Unlike upstream's host it leaves nothing behind of a file that was not closed with success and in
its declared size; a file that is there stays as it is, and the other one gets a number in its name;
and handles are used again.
"""

import errno
import itertools
import logging
import math
from contextlib import suppress
from types import TracebackType
from typing import Self

from vmibridge import (
    BridgeContext,
    BridgePacket,
    BridgeResponse,
    Gate,
    GuestMemoryError,
    StandardHandler,
    Status,
    method,
)
from vmibridge.handlers._file_budget import failure
from vmibridge.handlers._file_ends import Caller
from vmibridge.handlers._file_folder import IfTaken
from vmibridge.handlers._file_names import MAX_NAME
from vmibridge.handlers._file_settings import FolderSettings, OpenFolder
from vmibridge.handlers._upstream_exit import EXIT, exit_status
from vmibridge.text import printable

log: logging.Logger = logging.getLogger(__name__)

MAX_HANDLE = 4095
CHUNK_SIZE = 64 << 10
"""Bytes."""
_HANDLE_BITS = 12


class _Transfer:
    """Where a file of the guest stands."""

    __slots__ = ("buffer", "caller", "offset", "size")

    def __init__(self, caller: Caller, size: int) -> None:
        self.caller = caller
        self.size = size
        self.buffer: int | None = None
        """The guest's, by virtual address."""
        self.offset = 0


class FileTransfer(StandardHandler[str | Status]):
    """Keeps the files that guests send. Its output is the name of a file that is there whole, and
    the status of a guest that is done."""

    REQUEST = 0x0012
    may_wait = False
    soft_timeout = math.inf
    wait = None

    class Settings(FolderSettings, frozen=True, forbid_unknown_fields=True):
        """Which folder, and how much."""

    def __init__(self, settings: Settings | None = None) -> None:
        self._folder = OpenFolder(self.name, settings or self.Settings())
        self._handles = itertools.cycle(range(1, MAX_HANDLE + 1))
        self._transfers: dict[int, _Transfer] = {}

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
        self._transfers.clear()
        await self._folder.close()

    @method(0x0001)
    async def begin(self, vmi: BridgeContext, packet: BridgePacket) -> BridgeResponse[str | Status]:
        """Begin a file; its size and its name are the guest's."""
        size, caller = packet.value2, Caller.of(vmi)
        try:
            name = await _read_name(vmi, packet)
            handle = await self._folder.run(
                lambda store: store.begin_put(
                    caller,
                    name,
                    size,
                    lambda: next(self._handles),
                    if_taken=IfTaken.BESIDE,
                    # This guest asks once: another BEGIN is another file.
                    key=object(),
                )
            )
        except (GuestMemoryError, OSError, UnicodeDecodeError) as error:
            log.warning("vm %s: a file was refused: %s", printable(vmi.vm), _reason(error))
            return BridgeResponse(0)
        self._transfers[handle] = _Transfer(caller, size)
        return BridgeResponse(CHUNK_SIZE << _HANDLE_BITS | handle)

    @method(0x0002)
    async def set_buffer(
        self, vmi: BridgeContext, packet: BridgePacket
    ) -> BridgeResponse[str | Status]:
        """Where the guest puts each chunk."""
        transfer = self._find(vmi, packet)
        if transfer is None:
            return BridgeResponse(Gate.ABORT)
        transfer.buffer = packet.value2
        return BridgeResponse(Gate.CONTINUE)

    @method(0x0003)
    async def chunk(self, vmi: BridgeContext, packet: BridgePacket) -> BridgeResponse[str | Status]:
        """Take the next bytes out of the guest's buffer; a failure ends the transfer."""
        handle, count = packet.value1, packet.value2
        transfer = self._find(vmi, packet)
        if transfer is None:
            return BridgeResponse(Gate.ABORT)
        # Taken now: a chunk of another vCPU comes behind it.
        offset, transfer.offset = transfer.offset, transfer.offset + count
        try:
            if transfer.buffer is None or count > CHUNK_SIZE:
                raise failure(errno.EINVAL)
            data = await vmi.memory.read(transfer.buffer, count)
            caller = transfer.caller
            await self._folder.run(lambda store: store.put(caller, handle, offset, data))
        except (GuestMemoryError, OSError) as error:
            log.warning("vm %s: a chunk was refused: %s", printable(vmi.vm), _reason(error))
            await self._drop(handle, transfer)
            return BridgeResponse(Gate.ABORT)
        return BridgeResponse(Gate.CONTINUE)

    @method(0x0004)
    async def close(self, vmi: BridgeContext, packet: BridgePacket) -> BridgeResponse[str | Status]:
        """End a file: it counts if the guest says so, and if it has its size."""
        handle = packet.value1
        transfer = self._find(vmi, packet)
        if transfer is None:
            return BridgeResponse(Gate.ABORT)
        if packet.value2:
            await self._drop(handle, transfer)
            return BridgeResponse(Gate.CONTINUE)
        caller = transfer.caller
        try:
            name = await self._folder.run(lambda store: store.end(caller, handle))
        except OSError as error:
            log.warning("vm %s: a file was not kept: %s", printable(vmi.vm), _reason(error))
            await self._drop(handle, transfer)
            return BridgeResponse(Gate.ABORT)
        self._forget(handle, transfer)
        return BridgeResponse(Gate.CONTINUE, output=name)

    @method(EXIT)
    async def exit(self, vmi: BridgeContext, packet: BridgePacket) -> BridgeResponse[str | Status]:
        """The guest is done."""
        return BridgeResponse(output=exit_status(packet))

    def _find(self, vmi: BridgeContext, packet: BridgePacket) -> _Transfer | None:
        """The transfer of a handle; none that another address space has begun."""
        transfer = self._transfers.get(packet.value1)
        if transfer is None or not Caller.of(vmi).may_use(transfer.caller):
            return None
        return transfer

    async def _drop(self, handle: int, transfer: _Transfer) -> None:
        self._forget(handle, transfer)
        with suppress(OSError):
            await self._folder.run(lambda store: store.abort(transfer.caller, handle))

    def _forget(self, handle: int, transfer: _Transfer) -> None:
        # Another vCPU may have ended it meanwhile, and the handle may be in use again.
        if self._transfers.get(handle) is transfer:
            del self._transfers[handle]


async def _read_name(vmi: BridgeContext, packet: BridgePacket) -> str:
    """The name of a file, without its folders.

    Raises `OSError` (EINVAL), `UnicodeDecodeError` and `GuestMemoryError`.
    """
    if packet.value4 > MAX_NAME or packet.value2 >> 63:
        raise failure(errno.EINVAL)
    raw = await vmi.memory.read(packet.value3, packet.value4)
    # Windows has two separators; what is before the last of them is of the guest alone.
    path = raw.decode("utf-16-le").rstrip("\0")
    return path.replace("\\", "/").rpartition("/")[2]


def _reason(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)

"""The device side of vfio-user, as QEMU 11.1 speaks it. Sans-I/O: bytes and descriptors in and out.

`VfioUser.receive` takes what a read of the socket brought, answers what is about the device itself
into `out`, and gives the rest to a `Host`. An access to the BAR is answered by `reply`, at once or
later, and by no other.

A message: `HEADER` (16 bytes, the host's byte order, which is little-endian on every host of QEMU
that has the device), then the body of its command. A reply has the same id and command.

| from QEMU | what comes of it |
|---|---|
| VERSION | the first message, and once; answered by what is offered here |
| DMA_MAP, DMA_UNMAP | `Host.map`, `Host.unmap` |
| DEVICE_GET_INFO, GET_REGION_INFO, GET_IRQ_INFO | answered here: one BAR, config space, MSI |
| SET_IRQS | `Host.set_interrupts` |
| REGION_READ, REGION_WRITE | config space here; BAR 0 by `Host.access` |
| DEVICE_RESET | `Host.reset` |
| a reply to DMA_READ or DMA_WRITE | `Host.transferred` |
| any other command | ENOTSUP |

Invariants
----------

- QEMU is hostile input: each length, count and offset is checked before use. A message that cannot
  be framed, or is not in its turn, raises `ValueError`, after which nothing may be received; one
  that asks for what there is not gets an errno.
- What is kept is bounded: a message by `MAX_MESSAGE`, its descriptors by `MAX_DESCRIPTORS`, our own
  requests by `MAX_TRANSFERS`. What is in `out` is bounded by who sends it.
- Each descriptor is given to the host exactly once: by `map`, `set_interrupts` or `drop`.
- While `is_mute`, no reply is made: QEMU has given those requests up, and takes the body of a reply
  that is late for the next header.

Source: QEMU 11.1, docs/interop/vfio-user.rst; the structs of linux/vfio.h.
"""

import errno
import struct
from collections import deque
from collections.abc import Sequence
from itertools import count
from typing import Final, NamedTuple, Protocol

import msgspec

from vmibridge.backends.device.pci import CONFIG_SIZE, MAX_VECTORS, ConfigSpace

__all__ = ["Access", "Bar", "DmaMap", "Host", "VfioUser"]

HEADER: Final = struct.Struct("<HHIII")
"""Id, command, bytes of the whole message, flags, errno."""
ACCESS: Final = struct.Struct("<QII")
"""Offset, region, bytes."""
DMA_MAP: Final = struct.Struct("<IIQQQ")
"""argsz, flags, offset in the descriptor's file, guest address, bytes."""
DMA_UNMAP: Final = struct.Struct("<IIQQ")
"""argsz, flags, guest address, bytes."""
TRANSFER: Final = struct.Struct("<QQ")
"""Guest address, bytes."""
_INFO = struct.Struct("<IIII")
_REGION = struct.Struct("<IIIIQQ")
_SPARSE = struct.Struct("<HHIII")
_AREA = struct.Struct("<QQ")
_IRQ = struct.Struct("<IIII")
_IRQS = struct.Struct("<IIIII")

MAX_TRANSFER: Final = 1 << 16
"""Bytes of data in one message, either way."""
MAX_MESSAGE: Final = HEADER.size + TRANSFER.size + MAX_TRANSFER
MAX_DESCRIPTORS: Final = MAX_VECTORS
MAX_TRANSFERS: Final = 64
MAX_ACCESS: Final = 8
"""Bytes of an access to the BAR: a vCPU's widest."""
_MAX_CAPABILITIES = 4096

VERSION, MAP, UNMAP, GET_INFO, GET_REGION, GET_IO_FDS, GET_IRQ, SET_IRQS = range(1, 9)
READ, WRITE, DMA_READ, DMA_WRITE, RESET = range(9, 14)

TYPE: Final = 0xF
REPLY: Final = 1
NO_REPLY: Final = 0x10
ERROR: Final = 0x20

CONFIG_REGION: Final = 7
_REGIONS, _IRQ_KINDS, _MSI = 9, 5, 1
_READABLE, _WRITABLE, _MAPPABLE, _HAS_CAPABILITIES = 1, 2, 4, 8
_DEVICE_RESETS, _DEVICE_PCI = 1, 2
_UNMAP_ALL = 2
_EVENTFDS, _TRIGGER, _NO_DATA = 4, 0x20, 1


class Access(NamedTuple):
    """A guest's access to the BAR."""

    number: int
    """Of its message."""
    offset: int
    size: int
    data: bytes | None
    """What is written; `None`: it is a read."""
    wants_reply: bool


class Bar(NamedTuple):
    """BAR 0, and what of it is mapped into the guest, as (offset, size)."""

    size: int
    descriptor: int
    areas: tuple[tuple[int, int], ...]


class DmaMap(NamedTuple):
    """A range of guest memory."""

    address: int
    size: int
    offset: int
    """Where it begins in the descriptor's file."""
    readable: bool
    writable: bool


class Host(Protocol):
    """What the device does. Nothing here may raise; an `int` is an errno, or 0."""

    def access(self, access: Access) -> None:
        """An access to the BAR, which is within it. It is answered by `VfioUser.reply`."""

    def map(self, mapping: DmaMap, descriptor: int | None) -> int:
        """A range of memory, and whose file it is in, if there is one."""

    def unmap(self, address: int, size: int) -> int:
        """That range is no more."""

    def unmap_all(self) -> None:
        """No range is any more."""

    def set_interrupts(self, first: int, count: int, descriptors: Sequence[int]) -> None:
        """The eventfds of so many vectors from the first; those without one have none any more."""

    def reset(self) -> None:
        """The machine was reset."""

    def transferred(self, transfer: int, data: bytes | None) -> None:
        """A transfer has ended; `None`: it failed. That of a write is empty."""

    def drop(self, descriptors: Sequence[int]) -> None:
        """Descriptors that came and are of no use: close them."""


class _Capabilities(msgspec.Struct, frozen=True):
    """What a client says of itself; the limits are ours to keep as they are its own."""

    max_msg_fds: int = 1
    max_data_xfer_size: int = 1 << 20


class _Offer(msgspec.Struct, frozen=True):
    capabilities: _Capabilities = _Capabilities()


class VfioUser:
    """One connection of one QEMU. Raises `ValueError` for a wrong number of interrupts."""

    def __init__(self, host: Host, bar: Bar, vectors: int = 1) -> None:
        self.out: deque[tuple[bytes, tuple[int, ...]]] = deque()
        """What is to be sent: messages with the descriptors that go along, in their order."""
        self.is_mute: bool = False
        """Set by the caller, for what it receives next."""
        self.config: ConfigSpace = ConfigSpace(vectors)
        self._host, self._bar = host, bar
        self.has_begun: bool = False
        """Whether the versions were exchanged."""
        self._rest = b""
        self._descriptors: list[int] = []
        """Of the message in `_rest`."""
        self._ids = count(1)
        self._transfers: dict[int, tuple[int, int]] = {}
        """By the id of a message of ours: its command, and the bytes that its reply has."""
        self._max_transfer = MAX_TRANSFER

    # --- what comes -----------------------------------------------------------------

    def receive(self, data: bytes, descriptors: Sequence[int] = ()) -> None:
        """Take what one read brought. Raises `ValueError` when the peer broke the protocol.

        Descriptors are of the last message of which bytes are in it: the kernel does not read
        past a message that has some (unix(7)).
        """
        if descriptors:
            self._descriptors += descriptors
            if len(self._descriptors) > MAX_DESCRIPTORS:
                raise ValueError(f"{len(self._descriptors)} descriptors with one message")
        if self._rest:
            data = self._rest + data
        at, end = 0, len(data)
        while end - at >= HEADER.size:
            number, command, size, flags, error = HEADER.unpack_from(data, at)
            if not HEADER.size <= size <= MAX_MESSAGE:
                raise ValueError(f"a message of {size} bytes")
            if at + size > end:
                break
            at += size
            # A descriptor that this one is not for is one of a message behind it.
            passed: list[int] = []
            if at == end:
                passed, self._descriptors = self._descriptors, passed
            self._take(number, command, flags, error, data[at - size + HEADER.size : at], passed)
        self._rest = data[at:]

    def close(self) -> None:
        """The connection is gone: give back what was kept of a message."""
        self._drop(self._descriptors)
        self._descriptors = []
        self._rest = b""

    def _drop(self, descriptors: Sequence[int]) -> None:
        if descriptors:
            self._host.drop(descriptors)

    def _take(
        self, number: int, command: int, flags: int, error: int, body: bytes, passed: list[int]
    ) -> None:
        kind = flags & TYPE
        if kind == REPLY:
            self._drop(passed)
            self._take_reply(number, command, error if flags & ERROR else 0, body)
            return
        if kind:
            self._drop(passed)
            raise ValueError(f"a message of type {kind}")
        if (command == VERSION) == self.has_begun:
            self._drop(passed)
            raise ValueError(f"command {command} {'once more' if self.has_begun else 'first'}")
        wants_reply = not flags & NO_REPLY
        if command in (READ, WRITE):
            self._drop(passed)
            self._take_access(number, command, body, wants_reply)
            return
        if command not in (MAP, SET_IRQS):
            self._drop(passed)
            passed = []
        answer: bytes = b""
        sent: tuple[int, ...] = ()
        try:
            answer, sent, why = self._answer(command, body, passed)
        except struct.error:
            # Too short for what it says that it is.
            self._drop(passed)
            why = errno.EINVAL
        if wants_reply:
            self._send(number, command, answer, sent, why)

    def _take_reply(self, number: int, command: int, error: int, body: bytes) -> None:
        expected, size = self._transfers.pop(number, (0, 0))
        if not expected or command != expected:
            raise ValueError(f"a reply to command {command} that was not asked")
        if error:
            self._host.transferred(number, None)
            return
        data = body[TRANSFER.size :]
        if len(data) != size:
            raise ValueError(f"{len(data)} bytes of memory instead of {size}")
        self._host.transferred(number, data)

    def _take_access(self, number: int, command: int, body: bytes, wants_reply: bool) -> None:
        """An access of no length, or beyond its region, gets an error."""
        why = errno.EINVAL
        if len(body) >= ACCESS.size:
            offset, region, size = ACCESS.unpack_from(body)
            data = body[ACCESS.size :] if command == WRITE else None
            is_whole = 1 <= size <= MAX_TRANSFER and (data is None or len(data) == size)
            access = Access(number, offset, size, data, wants_reply)
            if is_whole and region == 0:
                if size <= MAX_ACCESS and offset + size <= self._bar.size:
                    self._host.access(access)
                    return
            elif is_whole and region == CONFIG_REGION and offset + size <= CONFIG_SIZE:
                if data is not None:
                    self.config.write(offset, data)
                self._reply(access, CONFIG_REGION, self.config.read(offset, size))
                return
        if wants_reply:
            self._send(number, command, error=why)

    def _answer(
        self, command: int, body: bytes, passed: list[int]
    ) -> tuple[bytes, tuple[int, ...], int]:
        """The body of a reply, its descriptors, and an errno. Raises `struct.error`."""
        if command == VERSION:
            return self._begin(body), (), 0
        if command == MAP:
            return b"", (), self._map(body, passed)
        if command == UNMAP:
            _, flags, address, size = DMA_UNMAP.unpack_from(body)
            if flags & _UNMAP_ALL:
                self._host.unmap_all()
                return body, (), 0
            return body, (), self._host.unmap(address, size)
        if command == GET_INFO:
            info = _INFO.pack(_INFO.size, _DEVICE_RESETS | _DEVICE_PCI, _REGIONS, _IRQ_KINDS)
            return info, (), 0
        if command == GET_REGION:
            argsz, _, index, *_ = _REGION.unpack_from(body)
            return *self._region(argsz, index), 0 if index < _REGIONS else errno.EINVAL
        if command == GET_IRQ:
            index = _IRQ.unpack_from(body)[2]
            # A count of 0 for one that there is not would make QEMU print a warning.
            if index != _MSI:
                return b"", (), errno.EINVAL
            return _IRQ.pack(_IRQ.size, 0b1001, index, self.config.vectors), (), 0
        if command == SET_IRQS:
            return b"", (), self._set_interrupts(body, passed)
        if command == RESET:
            self.config.reset()
            self._host.reset()
            return b"", (), 0
        return b"", (), errno.ENOTSUP

    def _begin(self, body: bytes) -> bytes:
        """Raises `ValueError` for a version, or capabilities, that cannot be."""
        major, minor = struct.unpack_from("<HH", body)
        if major != 0:
            raise ValueError(f"version {major}.{minor} of vfio-user, where 0 is known")
        text = body[4:].partition(b"\0")[0]
        if len(text) > _MAX_CAPABILITIES:
            raise ValueError(f"{len(text)} bytes of capabilities")
        try:
            offered = msgspec.json.decode(text or b"{}", type=_Offer).capabilities
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise ValueError(f"capabilities that are none: {error}") from error
        if offered.max_data_xfer_size < 1:
            raise ValueError(f"{offered.max_data_xfer_size} bytes of data at most")
        self._max_transfer = min(MAX_TRANSFER, offered.max_data_xfer_size)
        self.has_begun = True
        ours = _Offer(_Capabilities(MAX_DESCRIPTORS, MAX_TRANSFER))
        return struct.pack("<HH", 0, 0) + msgspec.json.encode(ours) + b"\0"

    def _map(self, body: bytes, passed: list[int]) -> int:
        _, flags, offset, address, size = DMA_MAP.unpack_from(body)
        if not size or address + size > 1 << 64 or offset + size > 1 << 63 or len(passed) > 1:
            self._drop(passed)
            return errno.EINVAL
        mapping = DmaMap(address, size, offset, bool(flags & _READABLE), bool(flags & _WRITABLE))
        return self._host.map(mapping, passed[0] if passed else None)

    def _set_interrupts(self, body: bytes, passed: list[int]) -> int:
        _, flags, index, start, several = _IRQS.unpack_from(body)
        if index != _MSI:
            self._drop(passed)
            # To have none of what there is not is no mistake.
            return errno.EINVAL if several else 0
        if flags == (_NO_DATA | _TRIGGER) and not several:
            self._drop(passed)
            self._host.set_interrupts(0, self.config.vectors, ())
            return 0
        is_there = start + several <= self.config.vectors
        if flags != (_EVENTFDS | _TRIGGER) or not is_there or len(passed) > several:
            self._drop(passed)
            return errno.EINVAL
        self._host.set_interrupts(start, several, passed)
        return 0

    def _region(self, argsz: int, index: int) -> tuple[bytes, tuple[int, ...]]:
        if index == CONFIG_REGION:
            flags = _READABLE | _WRITABLE
            return _REGION.pack(_REGION.size, flags, index, 0, CONFIG_SIZE, 0), ()
        if index != 0:
            return _REGION.pack(_REGION.size, 0, index, 0, 0, 0), ()
        flags = _READABLE | _WRITABLE | _MAPPABLE | _HAS_CAPABILITIES
        areas = b"".join([_AREA.pack(*area) for area in self._bar.areas])
        sparse = _SPARSE.pack(1, 1, 0, len(self._bar.areas), 0) + areas
        need = _REGION.size + len(sparse)
        # QEMU wants the offset of the capabilities also in an answer that has no room for them.
        head = _REGION.pack(need, flags, index, _REGION.size, self._bar.size, 0)
        # Without the room that it has to have, it asks again.
        return (head + sparse, (self._bar.descriptor,)) if argsz >= need else (head, ())

    # --- what goes ------------------------------------------------------------------

    def reply(self, access: Access, data: bytes = b"") -> None:
        """Answer an access to the BAR; a read with the `size` bytes that it asked for.

        Whether it comes in time is for the caller to know: `is_mute` counts here, too.
        """
        self._reply(access, 0, data)

    def _reply(self, access: Access, region: int, data: bytes) -> None:
        if not access.wants_reply:
            return
        command = WRITE
        if access.data is None:
            command = READ
        else:
            data = b""
        body = ACCESS.pack(access.offset, region, access.size) + data
        self._send(access.number, command, body)

    def read_memory(self, address: int, size: int) -> int:
        """Ask QEMU for `size` bytes, at most `max_transfer`; returns the id of the transfer.

        Never while an access waits: QEMU answers when that is over. Raises `BufferError` when as
        many are under way as may be.
        """
        return self._ask(DMA_READ, TRANSFER.pack(address, size), size)

    def write_memory(self, address: int, data: bytes) -> int:
        """The same for a write of at most `max_transfer` bytes."""
        return self._ask(DMA_WRITE, TRANSFER.pack(address, len(data)) + data, 0)

    @property
    def max_transfer(self) -> int:
        """Bytes of one transfer."""
        return self._max_transfer

    @property
    def transfers(self) -> int:
        """How many transfers are under way."""
        return len(self._transfers)

    def _ask(self, command: int, body: bytes, size: int) -> int:
        if len(self._transfers) >= MAX_TRANSFERS:
            raise BufferError(f"{MAX_TRANSFERS} transfers are under way")
        number = next(each & 0xFFFF for each in self._ids if each & 0xFFFF not in self._transfers)
        self._transfers[number] = command, size
        self.out.append((HEADER.pack(number, command, HEADER.size + len(body), 0, 0) + body, ()))
        return number

    def _send(
        self,
        number: int,
        command: int,
        body: bytes = b"",
        descriptors: tuple[int, ...] = (),
        error: int = 0,
    ) -> None:
        if self.is_mute:
            return
        flags = REPLY
        if error:
            flags, body, descriptors = REPLY | ERROR, b"", ()
        head = HEADER.pack(number, command, HEADER.size + len(body), flags, error)
        self.out.append((head + body, descriptors))


def refusal(message: bytes) -> bytes:
    """A reply of `EBUSY` to a message that has come first, or nothing where it is none."""
    if len(message) < HEADER.size:
        return b""
    number, command, _, _, _ = HEADER.unpack_from(message)
    return HEADER.pack(number, command, HEADER.size, REPLY | ERROR, errno.EBUSY)

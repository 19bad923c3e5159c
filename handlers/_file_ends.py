"""How files under way ended: an END or ABORT that is repeated gets the same answer."""

import errno
import os
from collections import OrderedDict
from threading import Lock

import msgspec

from vmibridge import BridgeContext
from vmibridge.handlers._file_budget import failure

__all__ = ["MAX_ENDED", "Caller", "End", "Ends", "GoneError"]

MAX_ENDED = 1024
"""Ends that are remembered."""


class Caller(msgspec.Struct, frozen=True):
    """Who asks."""

    address_space: int
    """Or the slot of a device."""
    is_kernel: bool = False
    """It may use the transfers of all address spaces, and may run in any of them."""

    @classmethod
    def of(cls, vmi: BridgeContext) -> "Caller":
        """Who made the request."""
        return cls(vmi.event.caller, vmi.event.ring == 0)

    def may_use(self, owner: "Caller") -> bool:
        """Whether what the other one has begun is its own."""
        return self.is_kernel or self.address_space == owner.address_space


class End(msgspec.Struct, frozen=True):
    """How a transfer ended."""

    owner: Caller
    by: str
    """`end`, `abort`, `taken` or `lost`."""
    digest: bytes | None = None
    """Of an END."""
    error: int = 0
    """0: none."""


class GoneError(OSError):
    """A handle that is none, or none any more."""

    def __init__(self, number: int) -> None:
        super().__init__(number, os.strerror(number))


class Ends:
    """The last ones of a guest, by handle. May be used in any thread."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._by_handle: OrderedDict[int, End] = OrderedDict()

    def __contains__(self, handle: int) -> bool:
        return handle in self._by_handle

    def remember(self, handle: int, end: End) -> None:
        """Keep it, in the place of the oldest one."""
        with self._lock:
            self._by_handle[handle] = end
            if len(self._by_handle) > MAX_ENDED:
                self._by_handle.popitem(last=False)

    def why_gone(self, caller: Caller, handle: int) -> int:
        """What a caller is told of a handle that it cannot use: EBADF, or ESTALE."""
        with self._lock:
            end = self._by_handle.get(handle)
        if end is not None and end.by == "taken" and caller.may_use(end.owner):
            return errno.ESTALE
        return errno.EBADF

    def check_repeated(self, caller: Caller, handle: int, by: str, digest: bytes | None) -> None:
        """Raise as this call did before; as for an unknown handle, if it was not made before."""
        with self._lock:
            end = self._by_handle.get(handle)
        if end is None or end.by != by or end.digest != digest or not caller.may_use(end.owner):
            raise failure(self.why_gone(caller, handle))
        if end.error:
            raise failure(end.error)

"""Who may ask for what, how often, and for how many bytes: decided for each trap that is ours,
before its handler.

| a trap is denied | by |
|---|---|
| of another ring, address space or place in the code | `rings`, `address_spaces`, `instructions` |
| for which a bucket has nothing left | `vm`, `address_space` |
| of one address space too many | `max_address_spaces` |

Invariants:

- A quota is two token buckets: one of requests, one of bytes. A request takes its token when
  it is let through. Bytes are taken as a handler moves them, and how many is not known
  beforehand: so that bucket may be overdrawn, and denies until the debt is paid.
- A trap that is denied, by whatever rule, takes nothing from any bucket.
- A guest makes up address spaces at will. So their number is bounded, and what is kept of one
  is forgotten only when both its buckets are full again: then nothing is lost by it.
- Nothing is done for each address space at each trap. A heap holds, for each of them, a time
  before which its buckets are not full. A trap of a new address space that finds no room looks
  at the first of the heap only. If its time has come, it is either forgotten, or was charged
  since, and goes back into the heap with a later time: that trap has paid for this step.
"""

import math
import sys
from bisect import bisect_right
from collections.abc import Callable
from functools import reduce
from heapq import heappop, heappush, heapreplace
from operator import or_
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from vmibridge.bridge.bounds import Count, check_fields
from vmibridge.bridge.response import BridgeResponse
from vmibridge.vm.arch import ARCHITECTURES
from vmibridge.vm.memory import PhysicalMemory
from vmibridge.vm.trap import TrapEvent

__all__ = ["AddressRange", "Policy", "Quota", "Rate"]

# A policy is made before the VM is known, so what some architecture has is allowed.
_RINGS = max(each.rings for each in ARCHITECTURES)
_ROOTS = reduce(or_, (each.roots for each in ARCHITECTURES))
_LOW_BITS = (_ROOTS & -_ROOTS).bit_length() - 1
_FINITE = sys.float_info.max
"""The largest number that is finite: msgspec takes no bound that is not."""
_Address = Annotated[int, Meta(ge=0)]
_Ring = Annotated[int, Meta(ge=0, le=_RINGS - 1)]
_Root = Annotated[
    int,
    Meta(
        ge=0,
        le=_ROOTS,
        multiple_of=1 << _LOW_BITS,
        extra={
            "words": f"a page-table root of {_ROOTS.bit_length()} bits, the low {_LOW_BITS} clear",
            "format": "#x",
        },
    ),
]


class Rate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One token bucket, full at first. Raises `ValueError` if a number is out of range."""

    burst: Annotated[float, Meta(gt=0, le=_FINITE, extra={"words": "a finite number above 0"})]
    """What the bucket holds when it is full: the most at once."""
    rate: Annotated[
        float, Meta(ge=0, le=_FINITE, extra={"words": "a finite number, 0 or more"})
    ] = 0.0
    """What flows back each second. 0: nothing, so that `burst` is for the whole run."""

    def __post_init__(self) -> None:
        check_fields(self)


class Quota(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one VM or one address space may use; `None` is without bounds.

    Raises `ValueError` for a burst of less than one request: none would ever be let through.
    """

    requests: Rate | None = None
    """Traps that are ours."""
    bytes: Rate | None = None
    """Bytes of guest memory that handlers read and write, with the page tables on the way."""

    def __post_init__(self) -> None:
        if self.requests is not None and self.requests.burst < 1:
            raise ValueError(f"requests.burst is at least one request, got {self.requests.burst!r}")


class AddressRange(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Addresses of 64 bits. Raises `ValueError` for more bits, and for an end before the start."""

    start: _Address
    end: _Address
    """The last one: it belongs to the range."""

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.end < 1 << 64:
            raise ValueError(
                "a range goes up from start to end, addresses of 64 bits, "
                f"got {self.start:#x} to {self.end:#x}"
            )


class Policy(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a guest may ask for. The default denies nothing.

    Raises `ValueError` if a value is out of range.
    """

    rings: Annotated[frozenset[_Ring], Meta(min_length=1)] = frozenset({0, 1, 2, 3})
    """Privilege levels that may ask."""
    address_spaces: frozenset[_Root] | None = None
    """Those that may ask, as `TrapEvent.address_space` names them. `None`: all."""
    instructions: tuple[AddressRange, ...] | None = None
    """Where the trapping instruction may start, as `TrapEvent.ip` tells. `None`: anywhere."""
    vm: Quota = Quota()
    """For each VM."""
    address_space: Quota = Quota()
    """For each address space of a VM."""
    max_address_spaces: Count = 4096
    """How many address spaces of a VM may be using their quota at a time."""
    denied: Literal["native", "skip"] | BridgeResponse[Any] = "native"
    """What a denied trap gets. `"native"`: the instruction runs as if no host were there.
    `"skip"`: registers stay, and the guest moves past it. Or a reply."""

    def __post_init__(self) -> None:
        if not isinstance(self.denied, BridgeResponse) and self.denied not in ("native", "skip"):
            raise ValueError(f"denied is 'native', 'skip' or a response, got {self.denied!r}")
        check_fields(self)

    @property
    def has_quota(self) -> bool:
        """Whether requests or bytes are limited, for the VM or for each address space."""
        return self.vm != Quota() or self.address_space != Quota()


class _Account:
    """What the two buckets of one VM or address space hold, and as of when.

    The two times are apart because a sum may be too small to change the other bucket: a rate
    would be lost in rounding if it were added at each trap.
    """

    __slots__ = ("bytes", "bytes_at", "requests", "requests_at")

    requests: float
    requests_at: float
    bytes: float
    bytes_at: float


class _Buckets:
    """The sizes and rates of a quota, and what follows from them. Without bounds is infinite."""

    __slots__ = ("bytes", "bytes_rate", "requests", "requests_rate")

    def __init__(self, quota: Quota) -> None:
        requests, size = quota.requests, quota.bytes
        self.requests = math.inf if requests is None else float(requests.burst)
        self.requests_rate = 0.0 if requests is None else float(requests.rate)
        self.bytes = math.inf if size is None else float(size.burst)
        self.bytes_rate = 0.0 if size is None else float(size.rate)

    def full(self, now: float) -> _Account:
        account = _Account()
        account.requests = self.requests
        account.bytes = self.bytes
        account.requests_at = account.bytes_at = now
        return account

    def requests_left(self, account: _Account, now: float) -> float:
        left = account.requests + self.requests_rate * (now - account.requests_at)
        if left > self.requests:
            return self.requests
        return left

    def bytes_left(self, account: _Account, now: float) -> float:
        left = account.bytes + self.bytes_rate * (now - account.bytes_at)
        if left > self.bytes:
            return self.bytes
        return left

    def full_at(self, account: _Account) -> float:
        """When both are full again, if nothing is taken until then."""
        return max(
            _full_at(account.requests, self.requests, self.requests_rate, account.requests_at),
            _full_at(account.bytes, self.bytes, self.bytes_rate, account.bytes_at),
        )


def _full_at(level: float, burst: float, rate: float, at: float) -> float:
    if level >= burst:
        return at
    return at + (burst - level) / rate if rate else math.inf


class Guard:
    """The policy of one VM at run time: its quotas, and how much of them is used.

    For one event loop: none of it may be called by two threads at a time.
    """

    def __init__(self, policy: Policy) -> None:
        self._rings = policy.rings
        self._allowed = policy.address_spaces
        self._borders = None if policy.instructions is None else _borders(policy.instructions)
        self._vm = _Buckets(policy.vm)
        self._vm_account = self._vm.full(0.0)
        self._space = _Buckets(policy.address_space)
        self._spaces: dict[int, _Account] | None = None if policy.address_space == Quota() else {}
        self._max_spaces = policy.max_address_spaces
        self._heap: list[tuple[float, int]] = []
        self._names_spaces = self._allowed is not None or self._spaces is not None
        self._meters_bytes = policy.vm.bytes is not None or policy.address_space.bytes is not None
        # As `TrapEvent.address_space`, with the architecture of the trap before, which has
        # registers of the same type: to look it up would cost as much as the root itself.
        self._kind: type[object] | None = None
        self._page_root: Callable[[Any], int]

    @property
    def meters_bytes(self) -> bool:
        """Whether bytes are counted: otherwise `charge` has nothing to do."""
        return self._meters_bytes

    def denies(self, event: TrapEvent, now: float) -> str | None:
        """Why this trap is denied, or `None`: then it took one request from each bucket.

        `now` is in seconds, of the clock that `charge` is given too.
        """
        if event.ring not in self._rings:
            return f"ring {event.ring} is not allowed"
        # It costs as much as all the other rules together.
        root = 0
        if self._names_spaces:
            registers = event.registers
            if type(registers) is not self._kind:
                self._kind, self._page_root = type(registers), event.architecture.page_root
            root = self._page_root(registers)
        if self._allowed is not None and root not in self._allowed:
            return f"address space {root:#x} is not allowed"
        # An address within a range has an odd number of borders at or below it.
        if self._borders is not None and not bisect_right(self._borders, event.ip) & 1:
            return f"instruction at {event.ip:#x} is not allowed"
        vm = self._vm_account
        vm_left = self._vm.requests_left(vm, now)
        if vm_left < 1:
            return "over the request quota of the VM"
        # What is stored has at least this much: only a debt has to be worked out.
        if vm.bytes <= 0 and self._vm.bytes_left(vm, now) <= 0:
            return "over the byte quota of the VM"
        if self._spaces is not None:
            space = self._spaces.get(root)
            if space is None:
                if not self._has_room(now):
                    return "too many address spaces"
                space = self._open(root, now)
            left = self._space.requests_left(space, now)
            if left < 1:
                return "over the request quota of the address space"
            if space.bytes <= 0 and self._space.bytes_left(space, now) <= 0:
                return "over the byte quota of the address space"
            space.requests = left - 1
            space.requests_at = now
        vm.requests = vm_left - 1
        vm.requests_at = now
        return None

    def charge(self, event: TrapEvent, size: int, now: float) -> None:
        """Take `size` bytes for the handler of a trap that was let through.

        This may overdraw a bucket: traps are then denied until the debt is paid.
        """
        vm = self._vm_account
        vm.bytes = self._vm.bytes_left(vm, now) - size
        vm.bytes_at = now
        if self._spaces is not None:
            root = event.address_space
            space = self._spaces.get(root)
            if space is None:
                # Forgotten while its handler waited. It goes over the bound of the table, by
                # no more than there are traps without an answer; new ones wait until it is met.
                space = self._open(root, now)
            space.bytes = self._space.bytes_left(space, now) - size
            space.bytes_at = now

    def _open(self, root: int, now: float) -> _Account:
        assert self._spaces is not None
        account = self._spaces[root] = self._space.full(now)
        heappush(self._heap, (now, root))
        return account

    def _has_room(self, now: float) -> bool:
        """Whether there is room for one more address space; makes it, where nothing is lost."""
        spaces, heap = self._spaces, self._heap
        assert spaces is not None
        while len(spaces) >= self._max_spaces:
            not_before, root = heap[0]
            if not_before > now:
                return False
            full_at = self._space.full_at(spaces[root])
            if full_at > now:
                heapreplace(heap, (full_at, root))
            else:
                heappop(heap)
                del spaces[root]
        return True


def _borders(ranges: tuple[AddressRange, ...]) -> list[int]:
    """Where ranges begin, and where they are over, in turn and ascending."""
    borders: list[int] = []
    for part in sorted(ranges, key=lambda part: part.start):
        if borders and part.start <= borders[-1]:
            borders[-1] = max(borders[-1], part.end + 1)
        else:
            borders += part.start, part.end + 1
    return borders


class MeteredMemory:
    """Physical memory that charges each access to a guard, before it is made.

    An access that fails is charged, too: the guest chose the address. It raises what the
    memory behind it raises.
    """

    __slots__ = ("_clock", "_guard", "_physical")

    def __init__(self, physical: PhysicalMemory, guard: Guard, clock: Callable[[], float]) -> None:
        self._physical = physical
        self._guard = guard
        self._clock = clock

    async def read_physical(self, event: TrapEvent, address: int, size: int) -> bytes:
        """`size` bytes."""
        self._guard.charge(event, size, self._clock())
        return await self._physical.read_physical(event, address, size)

    async def write_physical(self, event: TrapEvent, address: int, data: bytes) -> None:
        """All of `data` or nothing."""
        self._guard.charge(event, len(data), self._clock())
        await self._physical.write_physical(event, address, data)

"""Give the guest random bytes, which a replay gives again.

| 0x0001 FILL | in | out |
|---|---|---|
| value1 | address of a buffer | status |
| value2 | its capacity in bytes, at most 1 MiB | bytes written, at most `limit` |

| status | when |
|---|---|
| success | |
| invalid parameters, code 1 | a capacity of more than 1 MiB, or a buffer that is not writable |
| touch | a page of the buffer is not present |

They are `vmi.random`, and no secret: the seed of a VM has 48 bits, which can be guessed from some
of the bytes, and is in the recording. Keys are for RDRAND. In return the bytes cost a recording
nothing, and each replay has them again.
"""

from typing import Annotated

import msgspec

from vmibridge import U32, BridgeContext, GuestRoom, Room, StandardHandler, method

MAX_FILL = 1 << 20
"""Bytes of a buffer."""


class Random(StandardHandler[int]):
    """Fills buffers with random bytes; how many is its output."""

    REQUEST = 0x0115

    class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
        """How much is given. Raises `ValueError` if it is out of range."""

        limit: int = 65536
        """Bytes that one request gives, at most."""

        def __post_init__(self) -> None:
            if not 1 <= self.limit <= MAX_FILL:
                raise ValueError(f"limit is 1 to {MAX_FILL} bytes, got {self.limit!r}")

    def __init__(self, settings: Settings | None = None) -> None:
        self._limit = (settings or self.Settings()).limit

    @method(0x0001)
    async def fill(self, vmi: BridgeContext, into: Annotated[Room, GuestRoom(MAX_FILL)]) -> U32:
        """Fill a buffer with random bytes; gives how many."""
        return await into.fill(vmi.random.randbytes(min(into.capacity, self._limit)))

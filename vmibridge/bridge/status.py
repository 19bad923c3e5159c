"""The encoded status: how a guest reports where it stands, in 64 bits.

| bits | meaning |
|---|---|
| 0-7 | stage, the guest's own |
| 8-15 | kind |
| 16-23 | code, specific to the stage |
| 24-31 | reserved: encoded as 0, ignored when decoded |
| 32-63 | native code: NTSTATUS, HRESULT or errno |

The layout and the gate's codes are those of vmi-utils 0.11 (module `bridge`).
A kind that has no name here is kept as it is: a newer guest may know more.
"""

from enum import IntEnum

import msgspec

__all__ = ["Gate", "Status", "StatusKind"]


class StatusKind(IntEnum):
    """Bits 8-15 of an encoded status."""

    SUCCESS = 0x00
    WAITING = 0x01
    TOUCH = 0x02
    """Ours: a page is not present. The guest touches the address in value2, and asks again."""
    INVALID_PARAMETERS = 0xFD
    FAILED = 0xFE
    ABORTED = 0xFF


_KINDS = frozenset(StatusKind)


class Gate(IntEnum):
    """value1 of a gate's response: what the guest does next."""

    CONTINUE = 0
    WAIT = 1
    """Sleep (upstream: 250 ms) and send the request again."""
    ABORT = 0xFFFFFFFF


class Status(msgspec.Struct, frozen=True, gc=False):
    """A decoded status. Raises `ValueError` for a field that is out of its range."""

    stage: int = 0
    kind: int = StatusKind.SUCCESS
    code: int = 0
    native: int = 0

    def __post_init__(self) -> None:
        if (self.stage | self.kind | self.code) >> 8 or self.native >> 32:
            raise ValueError(f"out of range: {self!r} (stage, kind, code 8 bits, native 32)")

    def __repr__(self) -> str:
        # In its own words, as a test that fails shows it.
        kind = StatusKind(self.kind).name if self.kind in _KINDS else f"{self.kind:#x}"
        return f"Status(stage={self.stage}, kind={kind}, code={self.code}, native={self.native})"

    def encode(self) -> int:
        """The 64 bits that travel in a value; bits 24-31 are 0."""
        return self.stage | self.kind << 8 | self.code << 16 | self.native << 32

    @classmethod
    def decode(cls, value: int) -> "Status":
        """Read 64 bits; any value of 64 bits is a status. Raises `ValueError` beyond."""
        if value >> 64:
            raise ValueError(f"a status has 64 bits, got {value:#x}")
        return cls(value & 0xFF, value >> 8 & 0xFF, value >> 16 & 0xFF, value >> 32)

"""The end of a guest as it says it itself: an output, which `vmibridge run` ends with."""

import msgspec

from vmibridge.bridge.numbers import unsigned

__all__ = ["GuestExit"]


class GuestExit(msgspec.Struct, frozen=True):
    """The output of a request by which a guest says that it is done, as of the handler `exit`.

    Raises `TypeError` and `ValueError` for a status that is no whole number of 32 bits.
    """

    status: int
    """32 bits; 0 where all is well. A process ends with at most 255: see `exit_status`."""
    reason: str | None = None
    """What the guest says of it: hostile text."""

    def __post_init__(self) -> None:
        unsigned(self.status, "the status of a guest", 32)

    @property
    def exit_status(self) -> int:
        """The status of a process, 0 to 255; what is more is 255, since 256 would be 0."""
        return min(self.status, 255)

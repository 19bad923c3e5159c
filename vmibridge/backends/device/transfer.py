"""Guest memory that was asked of QEMU, and is waited for."""

import anyio

__all__ = ["Transfer"]


class Transfer:
    """One message to QEMU, of which `ended` is set when its reply has come, or will not."""

    __slots__ = ("data", "ended")

    def __init__(self) -> None:
        self.ended: anyio.Event = anyio.Event()
        self.data: bytes | None = None
        """What came; `None`: nothing, it failed."""

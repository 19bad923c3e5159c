"""A call between its ring and its answer."""

from vmibridge.backends.device.slots import Call
from vmibridge.backends.device.vfio_user import Access
from vmibridge.vm.trap import TrapEvent

__all__ = ["Pending"]


class Pending:
    """A call that was taken, until its trap is resumed."""

    __slots__ = ("access", "call", "event", "sent_after", "since")

    def __init__(self, call: Call, access: Access, since: float, sent_after: float) -> None:
        self.call: Call = call
        self.event: TrapEvent | None = None
        self.access: Access | None = access
        """What QEMU waits for; `None`: it was answered."""
        self.since: float = since
        self.sent_after: float = sent_after
        """When the socket was empty last, before it came."""
